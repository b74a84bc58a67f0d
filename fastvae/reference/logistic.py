"""Discretised logistic distributions in plain PyTorch; see :mod:`fastvae.functional.logistic`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .gaussian import _compute
from .scale import ScaleMap, scale_map

__all__ = ["discretized_logistic_log_prob", "discretized_logistic_mixture_log_prob"]


def _log_bin(x: Tensor, mean: Tensor, s: Tensor, num_bins: int, scale: ScaleMap) -> Tensor:
    """Log-probability of each value's bin: log (1 - e^-w) sigmoid(p) sigmoid(-m), w = p - m."""
    half = 1.0 / (num_bins - 1)
    log_scale = scale.log_sigma(s)
    inverse_scale = torch.where(log_scale.isnan(), log_scale, scale.any_inverse_sigma(s))
    above, below = x - mean + half, x - mean - half
    # where a scale is 0, an edge met exactly still is: not 0 * inf
    p = torch.where(above == 0, 0.0, above * inverse_scale)
    m = torch.where(below == 0, 0.0, below * inverse_scale)
    w = 2.0 * half * inverse_scale
    wide, tiny = w >= 1.0, w < 1e-6
    large = torch.log1p(-torch.exp(-torch.where(wide, w, 1.0)))
    between = torch.where(wide | tiny, 1.0, w)
    small = torch.where(tiny, -0.5 * w, torch.log(-torch.expm1(-between) / between))
    mass = torch.where(wide, large, math.log(2.0 * half) - log_scale + small)
    interior = mass + logsigmoid(p) + logsigmoid(-m)
    edge = 1.0 - half
    return torch.where(x < -edge, logsigmoid(p), torch.where(x > edge, logsigmoid(-m), interior))


def discretized_logistic_log_prob(
    x: Tensor,
    mu: Tensor,
    log_scale: Tensor,
    num_bins: int = 256,
    parameterization: str = "log_scale",
) -> Tensor:
    scale = scale_map("discretized_logistic_log_prob", parameterization)
    x, mu, s = _compute(x, mu, log_scale)
    return _log_bin(x, mu, s, num_bins, scale).sum(-1)


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    logits: Tensor,
    mu: Tensor,
    log_scale: Tensor,
    coeffs: Tensor | None = None,
    num_bins: int = 256,
    parameterization: str = "log_scale",
) -> Tensor:
    scale = scale_map("discretized_logistic_mixture_log_prob", parameterization)
    x, logits, mu, s = _compute(x, logits, mu, log_scale)
    channels = x.shape[-1]
    means = list(mu.unbind(-2))
    if coeffs is not None:
        pairs = iter(torch.tanh(_compute(coeffs)[0]).unbind(-2))
        for c in range(channels):
            for j in range(c):
                means[c] = means[c] + next(pairs) * x[..., j : j + 1]
    score = torch.log_softmax(logits, -1)
    for c in range(channels):
        score = score + _log_bin(x[..., c : c + 1], means[c], s[..., c, :], num_bins, scale)
    return torch.logsumexp(score, -1)
