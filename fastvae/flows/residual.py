"""Residual flows as transforms: stacks of planar, radial, Householder or Sylvester steps, each in
one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..functional import (
    householder_columns,
    householder_flow,
    orthogonal_columns,
    planar_flow,
    radial_flow,
    sylvester_flow,
)
from .transform import TwoWay

__all__ = ["Householder", "Planar", "Radial", "Sylvester"]


class _Residual(TwoWay):
    """K steps, the same for all rows; or, given a context, each row's own (amortised).

    A step is one row of parameters: here its vectors, of the size of z, then its numbers.
    """

    flow: Callable[..., tuple[Tensor, Tensor]]  # (z, *parts) -> z, log_det
    vectors: int
    spread = 0.0  # of a conditioner's weights, to what torch begins with; 0: all rows start alike

    def start(self) -> Tensor:
        """The steps to begin with, ``[K, size]``."""
        raise NotImplementedError

    def __init__(self, dim: int, length: int, context_dim: int = 0) -> None:
        super().__init__()
        if dim < 1 or length < 1:
            raise ValueError(
                f"{type(self).__name__}: dim and length must be positive, got {dim} and {length}"
            )
        self.dim, self.length, self.context_dim = dim, length, context_dim
        start = self.start()
        if context_dim:
            self.conditioner = nn.Linear(context_dim, start.numel())
            with torch.no_grad():
                self.conditioner.weight *= self.spread
                self.conditioner.bias.copy_(start.flatten())
        else:
            self.steps = nn.Parameter(start)

    def lines(self, context: Tensor | None) -> Tensor:
        """The steps, ``[K, size]``, or those of a context, ``[..., K, size]``."""
        if context is None:
            return self.steps
        return self.conditioner(context).unflatten(-1, (self.length, -1))  # type: ignore[no-any-return]

    def parts(self, steps: Tensor) -> Sequence[Tensor]:
        """What the op takes, of the steps, ``[..., K, size]``."""
        end = self.vectors * self.dim
        return *steps[..., :end].split(self.dim, -1), *steps[..., end:].unbind(-1)

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.flow(x, *self.parts(self.lines(context)), inverse=inverse)

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

    flow = staticmethod(planar_flow)
    vectors = 2

    def start(self) -> Tensor:
        """Each along a direction of its own, w; u is what the constraint takes away again."""
        w = nn.functional.normalize(torch.randn(self.length, self.dim), dim=-1)
        return torch.cat([math.log(math.e - 1.0) * w, w, torch.randn(self.length, 1)], -1)


class Radial(_Residual):
    """K radial steps, :func:`fastvae.radial_flow`; at first the identity. As :class:`Planar`.

    >>> x, log_det = fastvae.flows.Radial(2, length=8).forward_and_log_det(torch.randn(5, 2))
    """

    flow = staticmethod(radial_flow)
    vectors = 1

    def start(self) -> Tensor:
        return torch.cat([torch.randn(self.length, self.dim), torch.zeros(self.length, 2)], -1)


class Householder(_Residual):
    """An orthogonal map, by :func:`fastvae.householder_flow`; at first a random one.

    Args:
        dim: D.
        length: K reflections; default: D, with which every rotation can be had (of even K).
        context_dim: C of a ``context``, of which a linear layer makes each row's own reflections;
            default: none, and all rows share them.

    >>> x, log_det = fastvae.flows.Householder(3).forward_and_log_det(torch.randn(5, 3))
    """

    flow = staticmethod(householder_flow)
    vectors = 1
    spread = 1.0

    def __init__(self, dim: int, length: int | None = None, context_dim: int = 0) -> None:
        super().__init__(dim, dim if length is None else length, context_dim)

    def start(self) -> Tensor:
        return torch.randn(self.length, self.dim)


_COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "householder": householder_columns,
    "orthogonal": orthogonal_columns,
}


class Sylvester(_Residual):
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

    flow = staticmethod(sylvester_flow)
    order: Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        rank: int | None = None,
        kind: str = "householder",
        context_dim: int = 0,
    ) -> None:
        if rank is not None and not 1 <= rank <= dim:
            raise ValueError(f"Sylvester: rank must be within 1 and {dim}, got {rank}")
        if kind not in (*_COLUMNS, "triangular"):
            kinds = ", ".join((*_COLUMNS, "triangular"))
            raise ValueError(f"Sylvester: kind must be one of {kinds}, got {kind}")
        self.rank, self.kind = dim if rank is None else rank, kind
        super().__init__(dim, length, context_dim)
        if kind not in _COLUMNS:
            eye = torch.eye(dim)
            order = [(eye.flip(0) if k % 2 else eye)[:, : self.rank] for k in range(length)]
            self.register_buffer("order", torch.stack(order), persistent=False)

    def start(self) -> Tensor:
        """R and S, the two triangles of a matrix of one column more than rows, of which R is 0;
        b; and what the columns are made of."""
        k, m = self.length, self.rank
        triangles = (torch.randn(k, m, m + 1) / math.sqrt(m)).tril()
        columns = torch.randn(k, self.dim * m if self.kind in _COLUMNS else 0)
        return torch.cat([triangles.flatten(1), torch.randn(k, m), columns], -1)

    def parts(self, steps: Tensor) -> Sequence[Tensor]:
        m = self.rank
        triangles = steps[..., : m * (m + 1)].unflatten(-1, (m, m + 1))
        b, columns = steps[..., m * (m + 1) :].tensor_split((m,), dim=-1)
        if self.kind in _COLUMNS:
            q = _COLUMNS[self.kind](columns.unflatten(-1, (self.dim, m)))
        else:
            q = self.order.to(b.dtype).expand(*b.shape[:-1], self.dim, m)
        return q, triangles[..., 1:], triangles[..., :-1].mT, b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, kind={self.kind}"
