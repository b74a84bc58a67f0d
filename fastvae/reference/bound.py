"""Importance-weighted bounds in plain PyTorch; see :mod:`fastvae.functional.bound`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gaussian import _compute

__all__ = ["log_mean_exp"]


def log_mean_exp(log_w: Tensor) -> Tensor:
    (log_w,) = _compute(log_w)
    samples = log_w.shape[-1]
    if samples == 0:
        return log_w.sum(-1) - math.inf
    top = log_w.detach().amax(-1, keepdim=True)
    shift = torch.where(top.isinf(), 0.0, top)  # not inf - inf
    mean = torch.exp(log_w - shift).sum(-1) / samples
    nothing = mean == 0.0  # all weights are: a bound of -inf, which has no gradient
    log_mean = torch.log(torch.where(nothing, 1.0, mean))
    return torch.where(nothing, -math.inf, shift.squeeze(-1) + log_mean)
