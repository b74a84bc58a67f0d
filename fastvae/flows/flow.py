"""A density: that of a base, moved by transforms."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import gaussian_log_prob
from .transform import Transform, no_determinant

__all__ = ["Chain", "Flow", "StandardNormal"]


class StandardNormal(nn.Module):
    """N(0, I) of D dimensions, on the device and in the dtype that the module is moved to.

    >>> fastvae.flows.StandardNormal(2).log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """

    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"StandardNormal: dim must be positive, got {dim}")
        self.dim = dim
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Nats per row, ``[...]``."""
        zero = self.zero.to(z.dtype)
        return gaussian_log_prob(z, zero, zero)

    def rsample(self, shape: Sequence[int] = ()) -> Tensor:
        return torch.randn(*shape, self.dim, dtype=self.zero.dtype, device=self.zero.device)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _total(log_dets: list[Tensor], x: Tensor) -> Tensor:
    return functools.reduce(torch.add, log_dets) if log_dets else no_determinant(x)


class Chain(nn.Module):
    """Transforms one after the other, from noise to data; each is handed the context."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        chain = list(transforms)
        for transform in chain:
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"{type(self).__name__}: transforms must be of fastvae.flows.Transform, got "
                    f"{type(transform).__name__}"
                )
        self.transforms = nn.ModuleList(chain)

    def _chain(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_det)`` through all transforms."""
        log_dets = []
        for transform in self._chain():
            z, log_det = transform.forward_and_log_det(z, context)
            log_dets.append(log_det)
        return z, _total(log_dets, z)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(z, log_det)`` back through all transforms."""
        log_dets = []
        for transform in reversed(self._chain()):
            x, log_det = transform.inverse_and_log_det(x, context)
            log_dets.append(log_det)
        return x, _total(log_dets, x)


class Flow(Chain):
    r"""The density of :math:`x = f_K(\dots f_1(z))` for z of a base density.

    .. math:: \log p(x) = \log p_0(z) + \sum_k \log|\det \partial z_{k-1} / \partial z_k|

    Args:
        base: has ``log_prob(z)``, one number a row, and ``rsample(shape)``: a
            :class:`StandardNormal`, or a ``torch.distributions.Independent``.
        transforms: from noise to data, in that order. A ``context``, ``[..., C]``, is handed to
            each of them.

    Raises:
        ValueError: of a context, where no transform has a ``context_dim``.

    >>> flow = fastvae.flows.realnvp(2, length=4)
    >>> loss = -flow.log_prob(torch.randn(16, 2)).mean()
    >>> loss.backward()
    >>> flow.sample(5).shape
    torch.Size([5, 2])
    """

    def __init__(self, base: Any, transforms: Iterable[Transform]) -> None:
        super().__init__(transforms)
        self.base = base

    def _check(self, context: Tensor | None) -> None:
        if context is None:
            return
        if not any(isinstance(one, Transform) and one.context_dim for one in self.modules()):
            raise ValueError(
                f"{type(self).__name__}: context must be None where no transform has a "
                f"context_dim, got {list(context.shape)}"
            )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Nats per row, ``[...]``, of ``x``, ``[..., D]`` (or as transforms make of such rows)."""
        self._check(context)
        z, log_det = self.inverse_and_log_det(x, context)
        return self.base.log_prob(z) + log_det  # type: ignore[no-any-return]

    def rsample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples, ``[*shape, D]``, and their log-density, in one pass, with gradients to all
        parameters. With a ``context``, ``[..., C]``: ``[*shape, ..., D]``."""
        self._check(context)
        leading = (shape,) if isinstance(shape, int) else tuple(shape)
        if context is not None:
            leading += context.shape[:-1]
            context = context.expand(*leading, context.shape[-1])
        z = self.base.rsample(leading)
        x, log_det = self.forward_and_log_det(z, context)
        return x, self.base.log_prob(z) - log_det

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Samples alone, ``[*shape, ..., D]``, without gradients."""
        with torch.no_grad():
            return self.rsample_and_log_prob(shape, context)[0]
