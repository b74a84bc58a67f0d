"""Diagonal Gaussians in plain PyTorch; see :mod:`fastvae.functional.gaussian`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import random
from .scale import scale_map

__all__ = ["gaussian_kl", "gaussian_log_prob", "reparameterize", "reparameterize_kl"]


def _compute(*tensors: Tensor) -> list[Tensor]:
    """Half types compute in float32, as in the kernels."""
    half = (torch.bfloat16, torch.float16)
    return [t.float() if t.dtype in half else t for t in tensors]


def reparameterize(
    mu: Tensor, log_var: Tensor, key: Tensor, parameterization: str = "log_var"
) -> Tensor:
    scale = scale_map("reparameterize", parameterization)
    mu_c, s = torch.broadcast_tensors(*_compute(mu, log_var))
    eps = random.normal(key, mu_c.shape, mu_c.dtype)
    return (mu_c + scale.sigma(s) * eps).to(mu.dtype)


def reparameterize_kl(
    mu: Tensor,
    log_var: Tensor,
    key: Tensor,
    parameterization: str = "log_var",
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    kl = _kl("reparameterize_kl", mu, log_var, None, None, parameterization, free_bits)
    return reparameterize(mu, log_var, key, parameterization), kl


def gaussian_kl(
    mu_q: Tensor,
    log_var_q: Tensor,
    mu_p: Tensor | None = None,
    log_var_p: Tensor | None = None,
    parameterization: str = "log_var",
    free_bits: float = 0.0,
) -> Tensor:
    return _kl("gaussian_kl", mu_q, log_var_q, mu_p, log_var_p, parameterization, free_bits)


def _kl(
    op: str,
    mu_q: Tensor,
    log_var_q: Tensor,
    mu_p: Tensor | None,
    log_var_p: Tensor | None,
    parameterization: str,
    free_bits: float,
) -> Tensor:
    scale = scale_map(op, parameterization)
    if not free_bits >= 0:
        raise ValueError(f"fastvae::{op}: free_bits must be non-negative, got {free_bits}")
    mu_q, s_q = _compute(mu_q, log_var_q)
    if mu_p is None or log_var_p is None:
        kl = 0.5 * (mu_q * mu_q + scale.twice_kl(s_q))
    else:
        mu_p, s_p = _compute(mu_p, log_var_p)
        score = (mu_q - mu_p) * scale.inverse_sigma(s_p)
        kl = 0.5 * (score * score + scale.twice_relative_kl(s_q, s_p))
    if free_bits > 0:
        kl = torch.where(kl < free_bits, free_bits, kl)
    return kl.sum(-1)


def gaussian_log_prob(
    x: Tensor, mu: Tensor, log_var: Tensor, parameterization: str = "log_var"
) -> Tensor:
    scale = scale_map("gaussian_log_prob", parameterization)
    x, mu, s = _compute(x, mu, log_var)
    score = (x - mu) * scale.inverse_sigma(s)
    log_var = 2.0 * scale.finite_log_sigma(s)
    log_var = log_var.clamp(min=torch.finfo(log_var.dtype).min)
    return (-0.5 * (math.log(2.0 * math.pi) + log_var + score * score)).sum(-1)
