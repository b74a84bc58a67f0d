"""Gaussians of full covariance in plain PyTorch; see :mod:`fastvae.functional.covariance`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import random
from .gaussian import _compute
from .scale import scale_map

__all__ = ["reparameterize_tril_kl"]


def reparameterize_tril_kl(
    mu: Tensor, scale_tril: Tensor, key: Tensor, parameterization: str = "scale"
) -> tuple[Tensor, Tensor]:
    scale = scale_map("reparameterize_tril_kl", parameterization)
    mu_c, tril_c = _compute(mu, scale_tril)
    s, below = tril_c.diagonal(dim1=-2, dim2=-1), tril_c.tril(-1)
    shape = torch.broadcast_shapes(mu_c.shape, s.shape)
    eps = random.normal(key, shape, mu_c.dtype)
    z = mu_c + scale.sigma(s) * eps + (below @ eps.unsqueeze(-1)).squeeze(-1)
    diagonal = 0.5 * (mu_c * mu_c + scale.twice_kl(s))
    return z.to(mu.dtype), diagonal.sum(-1) + 0.5 * below.square().sum((-2, -1))
