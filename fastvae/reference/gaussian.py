"""Diagonal Gaussians in plain PyTorch; see :mod:`fastvae.functional.gaussian`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import random

__all__ = ["gaussian_kl", "gaussian_log_prob", "reparameterize", "reparameterize_kl"]


def _compute(*tensors: Tensor) -> list[Tensor]:
    """Half types compute in float32, as in the kernels."""
    half = (torch.bfloat16, torch.float16)
    return [t.float() if t.dtype in half else t for t in tensors]


def _expm1_minus(x: Tensor) -> Tensor:
    """``e^x - 1 - x`` without the cancellation at ``|x| << 1``, where a Taylor series serves."""
    near = x.abs() < 0.5
    s = torch.where(near, x, 0.0)  # keeps the unused branch, and its gradient, finite
    q = torch.ones_like(s)
    for k in range(17, 2, -1):
        q = 1.0 + q * s / k
    finite = x.clamp(max=torch.finfo(x.dtype).max)  # at +inf the exponential wins: not inf - inf
    return torch.where(near, 0.5 * s * s * q, torch.expm1(torch.where(near, 0.0, x)) - finite)


def _inverse_sigma(log_var: Tensor) -> Tensor:
    return torch.exp(-0.5 * log_var).clamp(max=torch.finfo(log_var.dtype).max)


def reparameterize(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    mu_c, log_var_c = torch.broadcast_tensors(*_compute(mu, log_var))
    eps = random.normal(key, mu_c.shape, mu_c.dtype)
    return (mu_c + torch.exp(0.5 * log_var_c) * eps).to(mu.dtype)


def reparameterize_kl(mu: Tensor, log_var: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return reparameterize(mu, log_var, key), gaussian_kl(mu, log_var)


def gaussian_kl(
    mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor | None = None, log_var_p: Tensor | None = None
) -> Tensor:
    mu_q, log_var_q = _compute(mu_q, log_var_q)
    if mu_p is None or log_var_p is None:
        return (0.5 * (mu_q * mu_q + _expm1_minus(log_var_q))).sum(-1)
    mu_p, log_var_p = _compute(mu_p, log_var_p)
    score = (mu_q - mu_p) * _inverse_sigma(log_var_p)
    return (0.5 * (score * score + _expm1_minus(log_var_q - log_var_p))).sum(-1)


def gaussian_log_prob(x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    x, mu, log_var = _compute(x, mu, log_var)
    score = (x - mu) * _inverse_sigma(log_var)
    log_var = log_var.clamp(min=torch.finfo(log_var.dtype).min)  # not -inf + inf
    return (-0.5 * (math.log(2.0 * math.pi) + log_var + score * score)).sum(-1)
