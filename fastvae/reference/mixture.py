"""Mixtures of Gaussians in plain PyTorch; see :mod:`fastvae.functional.mixture`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gaussian import _compute
from .scale import ScaleMap, scale_map

__all__ = ["aggregate_posterior", "gaussian_mixture_log_prob"]


def _log_density(z: Tensor, mu: Tensor, s: Tensor, scale: ScaleMap) -> Tensor:
    """Of each dimension. So far away that the score overflows: -inf, and a gradient of zero."""
    score = (z - mu) * scale.inverse_sigma(s)
    far = torch.isinf(score)
    score = torch.where(far, 0.0, score)
    log_var = (2.0 * scale.log_sigma(s)).clamp(min=torch.finfo(s.dtype).min)  # not -inf + inf
    density = -0.5 * (math.log(2.0 * math.pi) + log_var + score * score)
    return torch.where(far, -math.inf, density)


def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    log_weights: Tensor | None = None,
    parameterization: str = "log_var",
) -> Tensor:
    scale = scale_map("gaussian_mixture_log_prob", parameterization)
    z, mu, s = _compute(z, mu, log_var)
    density = _log_density(z.unsqueeze(-2), mu, s, scale).sum(-1)
    if log_weights is None:
        return torch.logsumexp(density - math.log(max(1, mu.shape[0])), -1)
    return torch.logsumexp(density + _compute(log_weights)[0], -1)


def _importance_log_weights(
    batch: int, dataset_size: int | None, estimator: str, legacy: bool, like: Tensor
) -> Tensor:
    """``[B, B]``: how much the posterior of column j weighs in row i."""
    if dataset_size is not None and dataset_size < batch:
        raise ValueError(
            "fastvae::aggregate_posterior: dataset_size must be at least the size of the batch, "
            f"got {dataset_size} and {batch}"
        )
    if estimator == "mws":
        return torch.full_like(like, -math.log(max(1, batch) * (dataset_size or 1)))
    if batch <= 1:  # a single row stands for all the others
        return torch.zeros_like(like)
    assert dataset_size is not None
    m = batch - 1
    rest, own = torch.full_like(like, 1 / m), torch.full_like(like, 1 / dataset_size)
    following = torch.full_like(like, (dataset_size - m) / (dataset_size * m))
    i = torch.arange(batch, device=like.device)[:, None]
    j = torch.arange(batch, device=like.device)
    if legacy:
        first = torch.where(i == batch - 2, following, own)
        weights = torch.where(j == 0, first, torch.where(j == 1, following, rest))
    else:
        weights = torch.where(j == i, own, torch.where(j == (i + 1) % batch, following, rest))
    return weights.log()


def aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    dataset_size: int | None = None,
    estimator: str = "mws",
    legacy_mss: bool = False,
    parameterization: str = "log_var",
) -> tuple[Tensor, Tensor]:
    scale = scale_map("aggregate_posterior", parameterization)
    z, mu, s = _compute(z, mu, log_var)
    density = _log_density(z.unsqueeze(1), mu, s, scale)  # [B, B, D]
    like = torch.empty((z.shape[0], z.shape[0]), dtype=z.dtype, device=z.device)
    log_w = _importance_log_weights(z.shape[0], dataset_size, estimator, legacy_mss, like)
    log_qz = torch.logsumexp(log_w + density.sum(-1), 1)
    return log_qz, torch.logsumexp(log_w.unsqueeze(-1) + density, 1).sum(-1)
