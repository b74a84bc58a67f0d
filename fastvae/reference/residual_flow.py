"""Residual flows in plain PyTorch; see :mod:`fastvae.functional.residual_flow`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .gaussian import _compute

__all__ = ["householder_flow", "planar_flow", "radial_flow", "sylvester_flow"]


def planar_flow(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    x, u, w, b = _compute(z, u, w, b)
    dot, square = (w * u).sum(-1), (w * w).sum(-1)
    tiny = torch.finfo(x.dtype).tiny
    flat = square < tiny  # a translation, for which any u will do
    pull = (softplus(-dot, threshold=40.0) - 1.0) / torch.where(flat, 1.0, square)
    v = u + torch.where(flat, 0.0, pull).unsqueeze(-1) * w
    gain = torch.where(flat, 1.0, softplus(dot, threshold=40.0).clamp(min=tiny))  # 1 + w.v
    x, log_det = _begin(x, u)
    for k in _order(u, inverse):
        a = (w[..., k, :] * x).sum(-1) + b[..., k]
        if inverse:
            a = _planar_argument(a, *torch.broadcast_tensors(a, gain[..., k])[1:])
        h = torch.tanh(a)
        x = x + v[..., k, :] * (-h if inverse else h).unsqueeze(-1)
        slope = (1.0 - h) * (1.0 + h)
        log_det = log_det + _log_stretch(slope * (gain[..., k] - 1.0), h * h + slope * gain[..., k])
    return x.to(z.dtype), -log_det if inverse else log_det


def _planar_argument(c: Tensor, n: Tensor) -> Tensor:
    """The root of ``a + e tanh(a) = c``, ``e = n - 1``: bounds on it, Halley's and Newton's steps.

    The last three are Newton's, to be differentiated: where a derivative is known to order m, one
    step more knows it to order 2 m + 1, and the root as a constant is of order 0.
    """
    info = torch.finfo(c.dtype)
    finite = c.abs() <= info.max
    e, y = n - 1.0, torch.where(finite, c, 0.0)

    def tangent(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.tanh(a)
        f = (1.0 - t) * (1.0 + t) * e
        other = (t * t + (1.0 - t) * (1.0 + t) * n).clamp(min=info.tiny)
        return t, f, torch.where(f > -0.5, 1.0 + f, other)

    y_, e_, n_ = y.detach().abs(), e.detach(), n.detach()
    far = (0.5 * torch.log(4.0 * e_.clamp(min=1.0))).clamp(min=0.5)
    s = torch.minimum(e_, (e_ - y_).clamp(min=0.0) + far)
    above = torch.where(e_ > 0.0, 0.5 * torch.log((e_ - s + e_) / s), 0.0)
    above = torch.maximum(torch.maximum(above, y_ - e_), y_ / n_)
    cube = 4.2 * (y_ / (-e_).clamp(min=0.5))
    below = torch.minimum(torch.where(cube <= 1.0, cube.pow(1.0 / 3.0), y_ - e_), y_ / n_)
    a = torch.where(e_ < 0.0, below, above)
    low, high = 0.99 * torch.minimum(a, y_), 1.01 * torch.maximum(a, y_)
    for _ in range(4):
        t, f, gain = tangent(a.detach())
        newton = ((a - y_) + e_ * t) / gain.detach()
        a = a - newton / (1.0 + newton * (f.detach() / gain.detach()) * t).clamp(min=0.5)
        a = torch.minimum(torch.maximum(a, low), high)
    a = torch.where(y.detach() < 0.0, -a, a)
    for _ in range(3):
        t, _, gain = tangent(a)
        a = a - ((a - y) + e * t) / gain
    return torch.where(finite, a, c)


def radial_flow(
    z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    x, center, alpha, beta = _compute(z, center, alpha, beta)
    a = softplus(alpha, threshold=40.0).clamp(min=1e-12)
    g = softplus(beta, threshold=40.0).clamp(min=torch.finfo(x.dtype).tiny)
    x, log_det = _begin(x, center)
    if x.shape[-1] == 0:
        return x.to(z.dtype), log_det
    for k in _order(center, inverse):
        d, a_k, g_k = x - center[..., k, :], a[..., k], g[..., k]
        square = (d * d).sum(-1)
        inside = square == 0.0  # where the norm has no gradient
        r = torch.where(inside, 0.0, torch.where(inside, 1.0, square).sqrt())
        if inverse:
            r = _radius_before(r, a_k, g_k)
        h = 1.0 / (a_k + r)
        f = (g_k - a_k) * h
        stretch = torch.where(f > -0.5, 1.0 + f, (r + g_k) * h)
        x = x + ((1.0 / stretch - 1.0) if inverse else f).unsqueeze(-1) * d
        along = r * h * ((2.0 * a_k + r) * h) + g_k * h * (a_k * h)
        log_det = log_det + (x.shape[-1] - 1) * _log_stretch(f, (r + g_k) * h)
        log_det = log_det + _log_stretch(f * (a_k * h), along)
    return x.to(z.dtype), -log_det if inverse else log_det


def _radius_before(after: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """The root of ``r (g + r) / (a + r) = after``, of the two forms that which does not cancel."""
    p = after - g
    finite = after.abs() <= torch.finfo(after.dtype).max
    root = torch.sqrt(torch.where(finite, p * p + 4.0 * a * after, 1.0))
    outside = p > 0.0
    inner = 2.0 * a * after / torch.where(outside, 1.0, root - p)
    return torch.where(finite, torch.where(outside, 0.5 * (p + root), inner), after)


def householder_flow(z: Tensor, v: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    x, v = _compute(z, v)
    square = (v * v).sum(-1, keepdim=True)
    flat = square < torch.finfo(x.dtype).tiny
    n = torch.where(flat, 0.0, v * torch.where(flat, 1.0, square).rsqrt())
    x, log_det = _begin(x, v)
    for k in _order(v, inverse):
        along = (n[..., k, :] * x).sum(-1)
        x = x - 2.0 * along.unsqueeze(-1) * n[..., k, :]
        log_det = log_det + 0.0 * along  # NaN passes
    return x.to(z.dtype), log_det


def sylvester_flow(
    z: Tensor, q: Tensor, r: Tensor, s: Tensor, b: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    x, q, r, s, b = _compute(z, q, r, s, b)
    tiny = torch.finfo(x.dtype).tiny
    first, second = r.diagonal(dim1=-2, dim2=-1), s.diagonal(dim1=-2, dim2=-1)
    product = torch.tanh(first) * torch.tanh(second)
    # 1 + it, which may cancel: cosh(x + y) / (cosh x cosh y), by logarithms
    log = _log_cosh(first + second) - _log_cosh(first) - _log_cosh(second) + math.log(2.0)
    gain = torch.where(product > -0.5, 1.0 + product, log.exp()).clamp(min=tiny)
    upper = [t.triu(1) + torch.diag_embed(t.diagonal(dim1=-2, dim2=-1).tanh()) for t in (r, s)]
    inside, outside = q @ upper[1].mT, q @ upper[0]
    x, log_det = _begin(x, b)
    if x.shape[-1] == 0:
        return x.to(z.dtype), log_det
    for k in _order(b, inverse):
        a = (x.unsqueeze(-2) @ inside[..., k, :, :]).squeeze(-2) + b[..., k, :]
        if inverse:
            a = _sylvester_argument(a, gain[..., k, :], (upper[1] @ upper[0])[..., k, :, :])
        h = torch.tanh(a)
        moved = (h.unsqueeze(-2) @ outside[..., k, :, :].mT).squeeze(-2)
        x = x - moved if inverse else x + moved
        slope = (1.0 - h) * (1.0 + h)
        other = h * h + slope * gain[..., k, :]
        log_det = log_det + _log_stretch(slope * product[..., k, :], other).sum(-1)
    return x.to(z.dtype), -log_det if inverse else log_det


def _sylvester_argument(c: Tensor, n: Tensor, t: Tensor) -> Tensor:
    """The root of ``a + t tanh(a) = c``, the upper triangle t of diagonal ``n - 1``."""
    n, above = n.expand_as(c), t.triu(1)
    a: list[Tensor] = []
    for m in range(c.shape[-1] - 1, -1, -1):
        a.insert(0, _planar_argument(c[..., m], n[..., m]))
        c = c - above[..., :, m] * torch.tanh(a[0]).unsqueeze(-1)
    return torch.stack(a, -1) if a else c


def _log_cosh(x: Tensor) -> Tensor:
    """And the logarithm of 2."""
    return x.abs() + torch.log1p(torch.exp(-2.0 * x.abs()))


def _log_stretch(f: Tensor, other: Tensor) -> Tensor:
    """``log(1 + f)``, where ``other`` is ``1 + f`` without cancelling when ``f`` is near -1."""
    near = ~(f <= -0.5)
    floor = other.clamp(min=torch.finfo(f.dtype).tiny)
    return torch.where(
        near, torch.log1p(torch.where(near, f, 0.0)), torch.log(torch.where(near, 1.0, floor))
    )


def _order(lines: Tensor, inverse: bool) -> range:
    steps = lines.shape[-2]
    return range(steps - 1, -1, -1) if inverse else range(steps)


def _begin(x: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, broadcast to the leading dimensions of ``[..., K, D]``, and their sums, zero."""
    x = x.expand(torch.broadcast_shapes(x.shape, lines.shape[:-2] + x.shape[-1:]))
    return x, x.new_zeros(x.shape[:-1])
