"""Likelihoods in plain PyTorch; see :mod:`fastvae.functional.likelihood`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gaussian import _compute
from .scale import scale_map

__all__ = ["bernoulli_log_prob", "continuous_bernoulli_log_prob", "laplace_log_prob"]


def _linear(x: Tensor, logits: Tensor) -> Tensor:
    """``(x - [l > 0]) l``, and 0 for a certain, right bet: not 0 * inf."""
    miss = torch.where(logits > 0, x - 1.0, x)
    sure = (miss == 0) & torch.isinf(logits)
    return torch.where(sure, 0.0, miss * torch.where(sure, 0.0, logits))


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    x, logits = _compute(x, logits)
    # -softplus as a clamp and a log1p, each with the right slope where logits == 0
    return (
        _linear(x, logits) - torch.log1p(torch.exp(torch.where(logits > 0, -logits, logits)))
    ).sum(-1)


# B_2n / (2n)!, of the Bernoulli numbers B_2n, n = 1, 2, ...
_BERNOULLI = [1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000]
_BERNOULLI += [1 / 74724249600, -3617 / 10670622842880000, 43867 / 5109094217170944000]
_BERNOULLI += [-174611 / 802857662698291200000, 77683 / 14101100039391805440000]


def continuous_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    x, logits = torch.broadcast_tensors(*_compute(x, logits))
    near = logits.abs() < 1.0
    s = torch.where(near, logits, 0.0).square()  # keeps the unused branch, and its gradient, finite
    series = torch.zeros_like(s)
    for n in range(len(_BERNOULLI), 0, -1):
        series = (series + _BERNOULLI[n - 1] / (2 * n)) * s
    a = torch.where(near, 1.0, logits.abs()).clamp(max=torch.finfo(logits.dtype).max)
    far = _linear(x, logits) + torch.log(a) - torch.log(-torch.expm1(-a))
    return torch.where(near, (x - 0.5) * torch.where(near, logits, 0.0) - series, far).sum(-1)


def laplace_log_prob(
    x: Tensor, mu: Tensor, log_scale: Tensor, parameterization: str = "log_scale"
) -> Tensor:
    scale = scale_map("laplace_log_prob", parameterization)
    x, mu, s = _compute(x, mu, log_scale)
    mean = x == mu  # there 0, not 0 * inf
    deviation = torch.where(mean, 0.0, (x - mu).abs() * scale.any_inverse_sigma(s))
    return (-math.log(2.0) - scale.finite_log_sigma(s) - deviation).sum(-1)
