"""Linear transforms, whose determinants are products of diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import householder_flow, linear_flow
from .transform import Transform

__all__ = ["Householder", "Linear"]


class Linear(Transform):
    """x = W z + b, by :func:`fastvae.linear_flow`; at first the identity.

    Args:
        dim: D.
        kind: of W: ``"lu"``, or a triangle, ``"lower"`` or ``"upper"``. After a
            :class:`Householder` one, which is a QR decomposition, or a :class:`Permutation`, any.

    >>> x, log_det = fastvae.flows.Linear(3).forward_and_log_det(torch.randn(5, 3))
    """

    def __init__(self, dim: int, kind: str = "lu") -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"Linear: dim must be positive, got {dim}")
        if kind not in ("lu", "lower", "upper"):
            raise ValueError(f"Linear: kind must be one of lu, lower, upper, got {kind}")
        self.dim, self.kind = dim, kind
        self.matrix = nn.Parameter(torch.zeros(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(z, None)
        return linear_flow(z, self.matrix, self.bias, kind=self.kind)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x, None)
        return linear_flow(x, self.matrix, self.bias, kind=self.kind, inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class Householder(Transform):
    """An orthogonal map, by :func:`fastvae.householder_flow`; at first a random one.

    Args:
        dim: D.
        length: K reflections; default: D, with which every rotation can be had (of even K).
        context_dim: C of a ``context``, of which a linear layer makes each row's own reflections;
            default: none, and all rows share them.

    >>> x, log_det = fastvae.flows.Householder(3).forward_and_log_det(torch.randn(5, 3))
    """

    def __init__(self, dim: int, length: int | None = None, context_dim: int = 0) -> None:
        super().__init__()
        length = dim if length is None else length
        if dim < 1 or length < 1:
            raise ValueError(
                f"Householder: dim and length must be positive, got {dim} and {length}"
            )
        self.dim, self.length, self.context_dim = dim, length, context_dim
        start = torch.randn(length, dim)
        if context_dim:
            self.conditioner = nn.Linear(context_dim, start.numel())
            with torch.no_grad():
                self.conditioner.bias.copy_(start.flatten())
        else:
            self.v = nn.Parameter(start)

    def _reflect(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        context = self.check(x, context)
        v = self.v if context is None else self.conditioner(context).unflatten(-1, (-1, self.dim))
        return householder_flow(x, v, inverse=inverse)

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._reflect(z, context, inverse=False)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._reflect(x, context, inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}"
