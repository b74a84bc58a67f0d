"""Monotonic maps of one number to one, of which a network gives the parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..functional import affine_coupling, rational_quadratic_spline

__all__ = ["Affine", "Element", "Spline"]

KINDS = ("exp", "tanh_exp", "sigmoid", "gated", "additive")


class Element:
    """What moves each of n columns by P parameters of its own.

    Parameters come as a network gives them, ``[..., n P]``; :meth:`columns` says of which column
    each is. To write another: set :attr:`parameters`, and define ``__call__`` and :meth:`columns`.
    """

    parameters: int  # P

    def columns(self, n: int) -> Tensor:
        """The column that each parameter is of, ``[n P]``."""
        raise NotImplementedError

    def start(self, n: int) -> Tensor:
        """Parameters, ``[n P]``, to start from."""
        return torch.zeros(n * self.parameters)

    def __call__(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """``(y, log_det)`` of ``x``, ``[..., n]``, and ``parameters``, ``[..., n P]``."""
        raise NotImplementedError


class Affine(Element):
    """The step of :func:`fastvae.affine_coupling`; parameters are all shifts, then all scales."""

    def __init__(self, kind: str = "exp") -> None:
        if kind not in KINDS:
            raise ValueError(f"Affine: kind must be one of {', '.join(KINDS)}, got {kind}")
        self.kind = kind
        self.parameters = 1 if kind == "additive" else 2

    def columns(self, n: int) -> Tensor:
        return torch.arange(n).repeat(self.parameters)

    def start(self, n: int) -> Tensor:
        start = super().start(n)
        if self.kind == "gated":  # open, as IAF's paper has it
            start[n:] = 2.0
        return start

    def __call__(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.kind == "additive":
            return affine_coupling(x, parameters, inverse=inverse)
        shift, scale = parameters.chunk(2, -1)
        return affine_coupling(x, shift, scale, kind=self.kind, inverse=inverse)

    def __repr__(self) -> str:
        return f"kind={self.kind}"


class Spline(Element):
    """A :func:`fastvae.rational_quadratic_spline` for each column; starts as the identity."""

    def __init__(self, bins: int = 8, bound: float = 3.0) -> None:
        if bins < 1:
            raise ValueError(f"Spline: bins must be positive, got {bins}")
        self.bins, self.bound = bins, bound
        self.parameters = 3 * bins - 1

    def columns(self, n: int) -> Tensor:
        return torch.arange(n).repeat_interleave(self.parameters)

    def start(self, n: int) -> Tensor:
        """Bins that are equal, and slopes of 1 = 0.001 + softplus(s)."""
        start = super().start(n).view(n, self.parameters)
        start[:, 2 * self.bins :] = math.log(math.expm1(1.0 - 1e-3))
        return start.flatten()

    def __call__(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        parts = parameters.unflatten(-1, (x.shape[-1], self.parameters))
        widths, heights, derivatives = parts.split([self.bins, self.bins, self.bins - 1], -1)
        return rational_quadratic_spline(
            x, widths, heights, derivatives, bound=self.bound, inverse=inverse
        )

    def __repr__(self) -> str:
        return f"bins={self.bins}, bound={self.bound}"
