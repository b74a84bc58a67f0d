"""How a network gives a scale, ``csrc/scale.h`` in plain PyTorch: a number s and a map to sigma."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["ScaleMap", "scale_map"]

_ONE = math.log(math.e - 1.0)  # where softplus is 1


def _expm1_minus(x: Tensor) -> Tensor:
    """``e^x - 1 - x`` without the cancellation at ``|x| << 1``, where a Taylor series serves."""
    near = x.abs() < 0.5
    s = torch.where(near, x, 0.0)  # keeps the unused branch, and its gradient, finite
    q = torch.ones_like(s)
    for k in range(17, 2, -1):
        q = 1.0 + q * s / k
    finite = x.clamp(max=torch.finfo(x.dtype).max)  # at +inf the exponential wins: not inf - inf
    return torch.where(near, 0.5 * s * s * q, torch.expm1(torch.where(near, 0.0, x)) - finite)


def _excess(f: Tensor, log_q: Tensor) -> Tensor:
    """``(q^2 - 1) / 2 - log q``, twice, of ``q = 1 + f``; near 1 by the series of atanh."""
    near = f.abs() < 0.25
    s = torch.where(near, f, 0.0)
    r = s / (2.0 + s)
    series = torch.zeros_like(s)
    for k in range(12, 0, -1):
        series = (series + 1.0 / (2 * k + 1)) * r * r
    log1p_minus = 2.0 * r * series - r * s  # log(1 + s) - s
    g = torch.where(near, 1.0, f)
    finite = torch.where(near, 0.0, log_q).clamp(max=0.25 * torch.finfo(f.dtype).max)
    far = g * g + 2.0 * g - 2.0 * finite  # not inf - inf
    return torch.where(near, s * s - 2.0 * log1p_minus, far)


def _softplus_difference(a: Tensor, b: Tensor | float) -> Tensor:
    b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
    d = a - b
    near = d.abs() < 1.0
    close = torch.log1p(torch.sigmoid(b) * torch.expm1(torch.where(near, d, 0.0)))
    return torch.where(near, close, softplus(a, threshold=40.0) - softplus(b, threshold=40.0))


@dataclass(frozen=True)
class ScaleMap:
    """What a formula asks of a scale given by ``s``."""

    name: str

    def sigma(self, s: Tensor) -> Tensor:
        if self.name == "log_var":
            return torch.exp(0.5 * s)
        if self.name == "log_scale":
            return torch.exp(s)
        return s if self.name == "scale" else softplus(s, threshold=40.0)

    def log_sigma(self, s: Tensor) -> Tensor:
        if self.name == "log_var":
            return 0.5 * s
        if self.name == "log_scale":
            return s
        if self.name == "scale":
            return torch.log(s)
        small = s < -0.7 * (24 if s.dtype == torch.float32 else 53)  # there sigma is e^s
        return torch.where(
            small, s, torch.log(softplus(torch.where(small, 0.0, s), threshold=40.0))
        )

    def finite_log_sigma(self, s: Tensor) -> Tensor:
        return self.log_sigma(s).clamp(min=torch.finfo(s.dtype).min)  # not -inf + inf

    def inverse_sigma(self, s: Tensor) -> Tensor:
        """Finite: a sample exactly at the mean scores 0, not 0 * inf."""
        return self.any_inverse_sigma(s).clamp(max=torch.finfo(s.dtype).max)

    def any_inverse_sigma(self, s: Tensor) -> Tensor:
        if self.name == "log_var":
            return torch.exp(-0.5 * s)
        if self.name == "log_scale":
            return torch.exp(-s)
        return 1.0 / (self.sigma(s) + 0.0)  # of -0 as of 0

    def twice_kl(self, s: Tensor) -> Tensor:
        r"""``sigma^2 - 1 - log sigma^2``."""
        if self.name == "log_var":
            return _expm1_minus(s)
        if self.name == "log_scale":
            return _expm1_minus(2.0 * s)
        f = s - 1.0 if self.name == "scale" else _softplus_difference(s, _ONE)
        return _excess(f, self.log_sigma(s))

    def twice_relative_kl(self, q: Tensor, p: Tensor) -> Tensor:
        """``r^2 - 1 - log r^2`` of ``r = sigma_q / sigma_p``."""
        if self.name == "log_var":
            return _expm1_minus(q - p)
        if self.name == "log_scale":
            return _expm1_minus(2.0 * (q - p))
        log_r = self.log_sigma(q) - self.log_sigma(p)
        rise = q - p if self.name == "scale" else _softplus_difference(q, p)
        limit = torch.finfo(p.dtype).max  # a p of infinite scale is infinitely far away
        f = (rise.clamp(min=-limit) / self.sigma(p).clamp(max=limit)).clamp(min=-1.0)
        return torch.where(log_r.isnan(), log_r, _excess(f, log_r))


def scale_map(op: str, parameterization: str) -> ScaleMap:
    known = ("log_var", "log_scale", "scale", "softplus")
    if parameterization not in known:
        raise ValueError(
            f"fastvae::{op}: parameterization must be one of {', '.join(known)}, "
            f"got {parameterization}"
        )
    return ScaleMap(parameterization)
