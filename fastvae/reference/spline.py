"""Monotonic splines in plain PyTorch; see :mod:`fastvae.functional.spline`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from .gaussian import _compute

__all__ = ["rational_quadratic_spline"]

_STEEPEST = 1e9


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float = 3.0,
    tails: str = "linear",
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    v, widths, heights, derivatives = _compute(x, widths, heights, derivatives)
    shape = torch.broadcast_shapes(v.shape, widths.shape[:-1])
    v = v.expand(shape)
    turns = 2.0 * bound * torch.floor((v.detach() + bound) / (2.0 * bound))
    outside = (v < -bound) | (v > bound)
    if tails == "circular":
        outside = torch.zeros_like(outside)
    else:
        turns = torch.zeros_like(turns)
    at = torch.where(outside, 0.0, v - turns)

    size_x, knots_x = _bins(widths, bound, min_bin_width)
    size_y, knots_y = _bins(heights, bound, min_bin_height)
    slopes = (min_derivative + softplus(derivatives, threshold=40.0)).clamp(max=_STEEPEST)
    if tails == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    else:
        slopes = pad(slopes, (1, 1), value=1.0)
    bins = widths.shape[-1]
    inner = (knots_y if inverse else knots_x)[..., 1:]
    index = (at.unsqueeze(-1) >= inner).sum(-1, keepdim=True)

    def pick(numbers: Tensor, beyond: int = 0) -> Tensor:
        return numbers.expand(*shape, numbers.shape[-1]).gather(-1, index + beyond).squeeze(-1)

    left, width, bottom, height = (pick(n) for n in (knots_x, size_x, knots_y, size_y))
    a = pick(slopes[..., :bins]) * (width / height)
    b = pick(slopes[..., 1:]) * (width / height)
    if inverse:
        xi = _within((at - bottom) / height)
        eta = 1.0 - xi
        tilt = a * eta - b * xi
        root = 0.5 * (tilt.abs() + torch.sqrt(tilt * tilt + 4.0 * xi * eta))
        ahead, behind = torch.where(tilt < 0.0, root, xi), torch.where(tilt < 0.0, eta, root)
        theta, rest = ahead / (ahead + behind), behind / (ahead + behind)
    else:
        theta = _within((at - left) / width)
        rest = 1.0 - theta
    low, high = theta * theta + a * theta * rest, rest * rest + b * theta * rest
    bend = b * theta * theta + 2.0 * theta * rest + a * rest * rest
    y = left + width * theta if inverse else bottom + height * (low / (low + high))
    log_slope = torch.log(height / width * (bend / (low + high) / (low + high)))
    y = torch.where(outside, v, y + turns)
    log_slope = torch.where(outside, 0.0, -log_slope if inverse else log_slope)
    return y.to(x.dtype), log_slope.sum(-1)


def _within(x: Tensor) -> Tensor:
    """In [0, 1], where it is but for rounding, and with the gradient of x there too."""
    return x + (x.clamp(0.0, 1.0) - x).detach()


def _bins(numbers: Tensor, bound: float, smallest: float) -> tuple[Tensor, Tensor]:
    """The sizes of the bins, and the knots where they begin."""
    share = torch.softmax(numbers, -1)
    sizes = 2.0 * bound * (smallest + (1.0 - smallest * numbers.shape[-1]) * share)
    return sizes, pad(sizes[..., :-1].cumsum(-1), (1, 0)) - bound
