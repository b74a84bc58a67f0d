"""Residual flows in plain PyTorch; see :mod:`fastvae.functional.residual_flow`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .gaussian import _compute

__all__ = ["planar_flow", "radial_flow"]


def planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x, u, w, b = _compute(z, u, w, b)
    dot, square = (w * u).sum(-1), (w * w).sum(-1)
    tiny = torch.finfo(x.dtype).tiny
    flat = square < tiny  # a translation, for which any u will do
    pull = (softplus(-dot, threshold=40.0) - 1.0) / torch.where(flat, 1.0, square)
    v = u + torch.where(flat, 0.0, pull).unsqueeze(-1) * w
    gain = torch.where(flat, 1.0, softplus(dot, threshold=40.0).clamp(min=tiny))  # 1 + w.v
    x, log_det = _begin(x, u)
    for k in range(u.shape[-2]):
        h = torch.tanh((w[..., k, :] * x).sum(-1) + b[..., k])
        x = x + v[..., k, :] * h.unsqueeze(-1)
        slope = (1.0 - h) * (1.0 + h)
        log_det = log_det + _log_stretch(slope * (gain[..., k] - 1.0), h * h + slope * gain[..., k])
    return x.to(z.dtype), log_det


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    x, center, alpha, beta = _compute(z, center, alpha, beta)
    a = softplus(alpha, threshold=40.0).clamp(min=1e-12)
    g = softplus(beta, threshold=40.0).clamp(min=torch.finfo(x.dtype).tiny)
    x, log_det = _begin(x, center)
    if x.shape[-1] == 0:
        return x.to(z.dtype), log_det
    for k in range(center.shape[-2]):
        d, a_k, g_k = x - center[..., k, :], a[..., k], g[..., k]
        square = (d * d).sum(-1)
        inside = square == 0.0  # where the norm has no gradient
        r = torch.where(inside, 0.0, torch.where(inside, 1.0, square).sqrt())
        h = 1.0 / (a_k + r)
        f = (g_k - a_k) * h
        x = x + f.unsqueeze(-1) * d
        along = r * h * ((2.0 * a_k + r) * h) + g_k * h * (a_k * h)
        log_det = log_det + (x.shape[-1] - 1) * _log_stretch(f, (r + g_k) * h)
        log_det = log_det + _log_stretch(f * (a_k * h), along)
    return x.to(z.dtype), log_det


def _log_stretch(f: Tensor, other: Tensor) -> Tensor:
    """``log(1 + f)``, where ``other`` is ``1 + f`` without cancelling when ``f`` is near -1."""
    near = ~(f <= -0.5)
    floor = other.clamp(min=torch.finfo(f.dtype).tiny)
    return torch.where(
        near, torch.log1p(torch.where(near, f, 0.0)), torch.log(torch.where(near, 1.0, floor))
    )


def _begin(x: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, broadcast to the leading dimensions of ``[..., K, D]``, and their sums, zero."""
    x = x.expand(torch.broadcast_shapes(x.shape, lines.shape[:-2] + x.shape[-1:]))
    return x, x.new_zeros(x.shape[:-1])
