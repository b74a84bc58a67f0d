"""Residual flows as transforms: stacks of planar, radial or Sylvester steps, in one launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import (
    householder_columns,
    orthogonal_columns,
    planar_flow,
    radial_flow,
    sylvester_flow,
)
from .transform import Transform

__all__ = ["FAMILIES", "Family", "Planar", "Radial", "Sylvester"]


class Family(NamedTuple):
    """Steps of which each has vectors of the size of z and numbers, in this order in one row."""

    flow: Callable[..., tuple[Tensor, Tensor]]  # (z, *vectors, *numbers) -> z, log_det
    vectors: int
    numbers: int
    identity: Callable[[int, int], Tensor]  # (steps, size of z) -> the rows that move nothing

    def size(self, dim: int) -> int:
        """Of the row that is a step."""
        return self.vectors * dim + self.numbers

    def __call__(self, z: Tensor, steps: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``(z, log_det)`` of ``z``, ``[..., D]``, and ``steps``, ``[K, size]`` or
        ``[..., K, size]``."""
        dim = z.shape[-1]
        vectors = steps[..., : self.vectors * dim].split(dim, dim=-1)
        numbers = steps[..., self.vectors * dim :].unbind(-1)
        return self.flow(z, *vectors, *numbers, inverse=inverse)


def _planar_identity(steps: int, dim: int) -> Tensor:
    """Each along a direction of its own, w; u is what the constraint takes away again."""
    w = nn.functional.normalize(torch.randn(steps, dim), dim=-1)
    return torch.cat([math.log(math.e - 1.0) * w, w, torch.randn(steps, 1)], -1)


def _radial_identity(steps: int, dim: int) -> Tensor:
    return torch.cat([torch.randn(steps, dim), torch.zeros(steps, 2)], -1)


FAMILIES = {
    "planar": Family(planar_flow, 2, 1, _planar_identity),
    "radial": Family(radial_flow, 1, 2, _radial_identity),
}


class _Residual(Transform):
    """K steps, the same for all rows; or, given a context, each row's own (amortised)."""

    family: Family

    def __init__(self, dim: int, length: int, context_dim: int = 0) -> None:
        super().__init__()
        if dim < 1 or length < 1:
            raise ValueError(
                f"{type(self).__name__}: dim and length must be positive, got {dim} and {length}"
            )
        self.dim, self.length, self.context_dim = dim, length, context_dim
        start = self.family.identity(length, dim)
        if context_dim:
            self.conditioner = nn.Linear(context_dim, start.numel())
            with torch.no_grad():
                self.conditioner.weight *= 0.1
                self.conditioner.bias.copy_(start.flatten())
        else:
            self.steps = nn.Parameter(start)

    def _lines(self, x: Tensor, context: Tensor | None) -> Tensor:
        context = self.check(x, context)
        if context is None:
            return self.steps
        return self.conditioner(context).unflatten(-1, (self.length, -1))  # type: ignore[no-any-return]

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.family(z, self._lines(z, context))

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.family(x, self._lines(x, context), inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}"


class Planar(_Residual):
    """K planar steps, :func:`fastvae.planar_flow`; at first the identity.

    Args:
        dim: D.
        length: K.
        context_dim: C of a ``context``, of which a linear layer makes each row's own steps;
            default: none, and all rows share the steps.

    >>> x, log_det = fastvae.flows.Planar(2, length=8).forward_and_log_det(torch.randn(5, 2))
    """

    family = FAMILIES["planar"]


class Radial(_Residual):
    """K radial steps, :func:`fastvae.radial_flow`; at first the identity. As :class:`Planar`.

    >>> x, log_det = fastvae.flows.Radial(2, length=8).forward_and_log_det(torch.randn(5, 2))
    """

    family = FAMILIES["radial"]


_COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "householder": householder_columns,
    "orthogonal": orthogonal_columns,
}


class Sylvester(Transform):
    """K Sylvester steps, :func:`fastvae.sylvester_flow`; at first the identity.

    Args:
        dim: D.
        length: K.
        rank: M, of each step; default: D.
        kind: of the orthonormal columns: ``"householder"``, :func:`fastvae.householder_columns`;
            ``"orthogonal"``, :func:`fastvae.orthogonal_columns`; or ``"triangular"``, the first
            ones of the identity, and at every other step the last ones, in reverse.
        context_dim: C of a ``context``, of which a linear layer makes each row's own steps;
            default: none, and all rows share the steps.

    Paper: van den Berg et al., "Sylvester Normalizing Flows for Variational Inference", UAI 2018.

    >>> x, log_det = fastvae.flows.Sylvester(4, length=8).forward_and_log_det(torch.randn(5, 4))
    """

    order: Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        rank: int | None = None,
        kind: str = "householder",
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        if dim < 1 or length < 1:
            raise ValueError(f"Sylvester: dim and length must be positive, got {dim} and {length}")
        if not 1 <= rank <= dim:
            raise ValueError(f"Sylvester: rank must be within 1 and {dim}, got {rank}")
        if kind not in (*_COLUMNS, "triangular"):
            kinds = ", ".join((*_COLUMNS, "triangular"))
            raise ValueError(f"Sylvester: kind must be one of {kinds}, got {kind}")
        self.dim, self.length, self.rank, self.kind = dim, length, rank, kind
        self.context_dim = context_dim
        # R and S are the two triangles of a matrix of one column more than rows; R is 0 at first.
        triangles = (torch.randn(length, rank, rank + 1) / math.sqrt(rank)).tril()
        parts = [triangles.flatten(1), torch.randn(length, rank)]
        if kind in _COLUMNS:
            parts.append(torch.randn(length, dim * rank))
        else:
            eye = torch.eye(dim)
            order = [(eye.flip(0) if k % 2 else eye)[:, :rank] for k in range(length)]
            self.register_buffer("order", torch.stack(order), persistent=False)
        start = torch.cat(parts, -1)
        if context_dim:
            self.conditioner = nn.Linear(context_dim, start.numel())
            with torch.no_grad():
                self.conditioner.weight *= 0.1
                self.conditioner.bias.copy_(start.flatten())
        else:
            self.steps = nn.Parameter(start)

    def _move(self, z: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        context = self.check(z, context)
        if context is None:
            steps: Tensor = self.steps
        else:
            steps = self.conditioner(context).unflatten(-1, (self.length, -1))
        m = self.rank
        triangles = steps[..., : m * (m + 1)].unflatten(-1, (m, m + 1))
        b, columns = steps[..., m * (m + 1) :].tensor_split((m,), dim=-1)
        if self.kind in _COLUMNS:
            q = _COLUMNS[self.kind](columns.unflatten(-1, (self.dim, m)))
        else:
            q = self.order.to(b.dtype).expand(*b.shape[:-1], self.dim, m)
        return sylvester_flow(z, q, triangles[..., 1:], triangles[..., :-1].mT, b, inverse)

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._move(z, context, inverse=False)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._move(x, context, inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}, rank={self.rank}, kind={self.kind}"
