"""Residual flows as transforms: stacks of planar or radial steps, shared by all rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import planar_flow, radial_flow
from .transform import Transform

__all__ = ["Planar", "Radial"]


class _Residual(Transform):
    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        if dim < 1 or length < 1:
            raise ValueError(
                f"{type(self).__name__}: dim and length must be positive, got {dim} and {length}"
            )
        self.dim, self.length = dim, length

    def extra_repr(self) -> str:
        return f"dim={self.dim}, length={self.length}"


class Planar(_Residual):
    """K planar steps, :func:`fastvae.planar_flow`, in one launch.

    >>> x, log_det = fastvae.flows.Planar(2, length=8).forward_and_log_det(torch.randn(5, 2))
    """

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length)
        w = nn.functional.normalize(torch.randn(length, dim), dim=-1)
        self.u = nn.Parameter(0.1 * torch.randn(length, dim))
        self.w = nn.Parameter(w)
        self.b = nn.Parameter(torch.randn(length))

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return planar_flow(z, self.u, self.w, self.b)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return planar_flow(x, self.u, self.w, self.b, inverse=True)


class Radial(_Residual):
    """K radial steps, :func:`fastvae.radial_flow`, in one launch; at first the identity.

    >>> x, log_det = fastvae.flows.Radial(2, length=8).forward_and_log_det(torch.randn(5, 2))
    """

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(dim, length)
        self.center = nn.Parameter(torch.randn(length, dim))
        self.alpha = nn.Parameter(torch.zeros(length))
        self.beta = nn.Parameter(torch.zeros(length))

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return radial_flow(z, self.center, self.alpha, self.beta)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return radial_flow(x, self.center, self.alpha, self.beta, inverse=True)
