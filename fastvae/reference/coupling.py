"""Affine couplings in plain PyTorch; see :mod:`fastvae.functional.coupling`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .gaussian import _compute

__all__ = ["affine_coupling"]

_LOG_SIGMA = {
    "exp": lambda s: s,
    "tanh_exp": torch.tanh,
    "sigmoid": lambda s: logsigmoid(s + 2.0),
    "gated": logsigmoid,
}


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    kind: str = "exp",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    if kind not in _LOG_SIGMA:
        known = ", ".join(_LOG_SIGMA)
        raise ValueError(f"fastvae::affine_coupling: kind must be one of {known}, got {kind}")
    x_c, t, s = torch.broadcast_tensors(*_compute(x, shift, scale))
    log_sigma = _LOG_SIGMA[kind](s)
    sigma = torch.exp(-log_sigma if inverse else log_sigma)
    if kind == "sigmoid":
        y = x_c * sigma - t if inverse else sigma * (x_c + t)
    elif kind == "gated":
        rest = torch.sigmoid(-s)
        y = t + (x_c - t) * sigma if inverse else sigma * x_c + rest * t
    else:
        y = (x_c - t) * sigma if inverse else sigma * x_c + t
    if mask is not None:
        side = torch.sign(mask - 0.5)  # which gives the mask a gradient, of zero
        passes, log_sigma = side > 0.0, log_sigma + 0.0 * side
        y = torch.where(passes, x_c, y)
        log_sigma = torch.where(passes, 0.0, log_sigma)
    log_det = (-log_sigma if inverse else log_sigma).sum(-1)
    return y.to(x.dtype), log_det
