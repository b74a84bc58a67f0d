"""Likelihoods in plain PyTorch; see :mod:`fastvae.functional.likelihood`."""

from __future__ import annotations

import torch
from torch import Tensor

from .gaussian import _compute

__all__ = ["bernoulli_log_prob"]


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    x, logits = _compute(x, logits)
    # -softplus as a clamp and a log1p, each with the right slope where logits == 0
    miss = torch.where(logits > 0, x - 1.0, x)
    sure = (miss == 0) & torch.isinf(logits)  # a certain, right bet: 0, not 0 * inf
    linear = torch.where(sure, 0.0, miss * torch.where(sure, 0.0, logits))
    return (linear - torch.log1p(torch.exp(torch.where(logits > 0, -logits, logits)))).sum(-1)
