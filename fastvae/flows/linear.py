"""Linear transforms, whose determinants are products of diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import linear_flow
from ..functional.linear import KINDS
from .transform import TwoWay

__all__ = ["Linear"]


class Linear(TwoWay):
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
        if kind not in KINDS:
            raise ValueError(f"Linear: kind must be one of {', '.join(KINDS)}, got {kind}")
        self.dim, self.kind = dim, kind
        self.matrix = nn.Parameter(torch.zeros(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return linear_flow(x, self.matrix, self.bias, kind=self.kind, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"
