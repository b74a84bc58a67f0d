"""Likelihoods of counts in plain PyTorch; see :mod:`fastvae.functional.counts`."""

from __future__ import annotations

import torch
from torch import Tensor

from .gaussian import _compute

__all__ = [
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]


def _is_count(x: Tensor) -> Tensor:
    return (x >= 0) & torch.isfinite(x)


def poisson_log_prob(x: Tensor, log_rate: Tensor) -> Tensor:
    x, log_rate = torch.broadcast_tensors(*_compute(x, log_rate))
    large = torch.finfo(x.dtype).max ** 0.5  # beyond, the exponential wins: not inf - inf
    none = (x == 0) & torch.isinf(log_rate)
    linear = x * torch.where(none, 0.0, log_rate).clamp(max=large)
    value = linear - torch.exp(log_rate) - torch.lgamma(x + 1.0)
    return torch.where(_is_count(x), value, torch.nan).sum(-1)


def _negative_binomial(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    x, mu, theta = torch.broadcast_tensors(x, mu, theta)
    log_m = torch.log(mu + theta)
    log_mu = torch.log(torch.where((x == 0) & (mu == 0), 1.0, mu))
    value = (
        (torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1.0))
        + theta * (torch.log(theta) - log_m)
        + x * (log_mu - torch.where((x == 0) & torch.isinf(log_m), 0.0, log_m))
    )
    valid = _is_count(x) & _is_count(mu) & (theta > 0) & torch.isfinite(theta)
    return torch.where(valid, value, torch.nan)


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    return _negative_binomial(*_compute(x, mu, theta)).sum(-1)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, logits: Tensor
) -> Tensor:
    x, mu, theta, logits = _compute(x, mu, theta, logits)
    counts = _negative_binomial(x, mu, theta)
    zero = torch.nn.functional.softplus(counts - logits) - torch.nn.functional.softplus(-logits)
    other = counts - torch.nn.functional.softplus(logits)
    return torch.where(x == 0, zero, other).sum(-1)
