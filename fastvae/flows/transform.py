"""What a transform is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Transform", "TwoWay", "no_determinant"]


def no_determinant(x: Tensor) -> Tensor:
    """The log-determinant, 0, of a map that keeps volumes: ``[...]`` of rows ``[..., D]``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_zeros(x.shape[:-1], dtype=wide)


class Transform(nn.Module):
    r"""An invertible map of rows, ``[..., D]``, from noise z to data x, perhaps given a context.

    Both methods return the result and, in nats, ``[...]``, the log-determinant of the map that they
    take: :math:`\log|\det \partial x / \partial z|` forward,
    :math:`\log|\det \partial z / \partial x|`, which is minus that, inverse.
    """

    dim: int
    context_dim = 0  # C of the context that it wants

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_det)`` of ``z``, ``[..., D]``, and ``context``, ``[..., C]``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward direction")

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(z, log_det)`` of ``x``, ``[..., D]``, and ``context``, ``[..., C]``."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse direction")

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward_and_log_det(z, context)

    def check(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context, if one is wanted; it and ``x`` are checked."""
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x must be [..., {self.dim}], got {list(x.shape)}"
            )
        if not self.context_dim:
            return None
        if context is None or context.shape[-1] != self.context_dim:
            shape = None if context is None else list(context.shape)
            raise ValueError(
                f"{type(self).__name__}: context must be [..., {self.context_dim}], got {shape}"
            )
        return context

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")


class TwoWay(Transform):
    """A transform both of whose directions are :meth:`move`, of rows and a context checked."""

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """``(x, log_det)`` of ``z``, or, with ``inverse``, ``(z, log_det)`` of ``x``."""
        raise NotImplementedError(f"{type(self).__name__} has no direction")

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.move(z, self.check(z, context), inverse=False)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.move(x, self.check(x, context), inverse=True)
