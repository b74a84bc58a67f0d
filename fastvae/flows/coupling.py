"""Couplings: some columns pass, and through a network make the numbers that move the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .element import Affine, Element, Spline
from .networks import Conditioner, mlp, network_for
from .transform import TwoWay

__all__ = ["AffineCoupling", "Conditional", "Coupling", "SplineCoupling"]


class Coupling(TwoWay):
    """``passing`` of D columns pass; the others move as these say.

    Args:
        dim: D.
        element: moves a column: :class:`Affine`, :class:`Spline`, or your own :class:`Element`.
        flip: the last columns pass, not the first: alternate.
        passing: how many pass; default: half of D, rounded up.
        context_dim: C, of the ``context`` that the network sees too; default: none.
        conditioner: makes the network of its numbers of inputs and outputs; default: ``mlp()``.
    """

    def __init__(
        self,
        dim: int,
        element: Element,
        *,
        flip: bool = False,
        passing: int | None = None,
        context_dim: int = 0,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if dim < 2:
            raise ValueError(f"{name}: dim must be at least 2, got {dim}")
        self.dim, self.element, self.flip, self.context_dim = dim, element, flip, context_dim
        self.passing = (dim + 1) // 2 if passing is None else passing
        if not 0 < self.passing < dim:
            raise ValueError(f"{name}: passing must be within 1 and {dim - 1}, got {passing}")
        self.moving = dim - self.passing
        inputs = self.passing + context_dim
        self.conditioner = network_for(conditioner, inputs, element, self.moving)

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.flip:
            moving, passing = x.split([self.moving, self.passing], -1)
        else:
            passing, moving = x.split([self.passing, self.moving], -1)
        given = passing
        if context is not None:
            given = torch.cat([passing, context.expand(*passing.shape[:-1], -1)], -1)
        moved, log_det = self.element(moving, self.conditioner(given), inverse)
        return torch.cat([moved, passing] if self.flip else [passing, moved], -1), log_det

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, passing={self.passing}, flip={self.flip}, {self.element}"


class AffineCoupling(Coupling):
    """A coupling by :func:`fastvae.affine_coupling`.

    Args:
        dim: D.
        kind: ``"exp"``, ``"tanh_exp"`` (RealNVP), ``"sigmoid"`` (Glow), ``"gated"`` (IAF), or
            ``"additive"`` (NICE).
        others: as :class:`Coupling`.

    >>> coupling = fastvae.flows.AffineCoupling(4, kind="tanh_exp")
    >>> x, log_det = coupling.forward_and_log_det(torch.randn(3, 4))
    """

    def __init__(self, dim: int, kind: str = "tanh_exp", **others: Any) -> None:
        super().__init__(dim, Affine(kind), **others)


class SplineCoupling(Coupling):
    """A coupling by :func:`fastvae.rational_quadratic_spline` (Durkan et al. 2019).

    Args:
        dim: D.
        bins: K of each spline.
        bound: B: splines act within [-B, B], and beyond are the identity.
        others: as :class:`Coupling`.

    >>> coupling = fastvae.flows.SplineCoupling(4, bins=8)
    >>> x, log_det = coupling.forward_and_log_det(torch.randn(3, 4))
    """

    def __init__(self, dim: int, bins: int = 8, bound: float = 3.0, **others: Any) -> None:
        super().__init__(dim, Spline(bins, bound), **others)


class Conditional(TwoWay):
    """All columns move as the context alone says: of N(0, I) an :class:`Affine` one makes the
    diagonal Gaussian of a recognition network.

    Args:
        dim: D.
        context_dim: C.
        element: moves a column; default: ``Affine("exp")``, :math:`x = e^s z + t`.
        conditioner: makes the network of its numbers of inputs and outputs; default: one linear
            layer.

    >>> transform = fastvae.flows.Conditional(4, context_dim=3)
    >>> x, log_det = transform.forward_and_log_det(torch.randn(5, 4), torch.randn(5, 3))
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        element: Element | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or context_dim < 1:
            raise ValueError(
                f"Conditional: dim and context_dim must be positive, got {dim} and {context_dim}"
            )
        self.dim, self.context_dim = dim, context_dim
        self.element = Affine("exp") if element is None else element
        self.conditioner = network_for(conditioner or mlp(()), context_dim, self.element, dim)

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.element(x, self.conditioner(context), inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.element}"
