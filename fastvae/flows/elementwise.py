"""Transforms of each column by itself, or of their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import affine_coupling
from .transform import Transform, TwoWay, no_determinant

__all__ = ["ActNorm", "BatchNorm", "Permutation"]


class ActNorm(TwoWay):
    r"""A scale and a shift for each column, :math:`x = e^s z + t`.

    The first batch of two rows or more that it meets in training, in either direction, sets them so
    that what comes out has mean 0 and variance 1 (Kingma & Dhariwal, "Glow", NeurIPS 2018).

    >>> norm = fastvae.flows.ActNorm(3)
    >>> z, _ = norm.inverse_and_log_det(5.0 + 2.0 * torch.randn(1000, 3))
    >>> bool(z.mean().abs() < 1e-5)
    True
    """

    is_set: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"ActNorm: dim must be positive, got {dim}")
        self.dim = dim
        self.shift = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def _set(self, rows: Tensor, inverse: bool) -> None:
        rows = rows.reshape(-1, self.dim)
        if self.is_set or not self.training or len(rows) < 2:  # one row has no variance
            return
        mean, deviation = rows.mean(0), rows.std(0, unbiased=False).clamp(min=1e-6)
        self.log_scale.copy_(deviation.log() if inverse else -deviation.log())
        self.shift.copy_(mean if inverse else -mean / deviation)
        self.is_set.fill_(True)

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        self._set(x, inverse)
        return affine_coupling(x, self.shift, self.log_scale, inverse=inverse)


class BatchNorm(Transform):
    r"""Batch normalisation from data to noise, :math:`z = e^s (x - m) / \sqrt{v + \epsilon} + t`.

    In training the inverse direction takes mean m and variance v of its batch, with gradients
    through them, and averages them into running ones; these are what it takes in evaluation, and
    the forward direction always (Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real
    NVP", ICLR 2017; Papamakarios et al., "Masked autoregressive flow", NeurIPS 2017).

    Args:
        dim: D.
        momentum: the part of a running value that is new at each batch.
        eps: :math:`\epsilon`.

    >>> norm = fastvae.flows.BatchNorm(3)
    >>> z, _ = norm.inverse_and_log_det(5.0 + 2.0 * torch.randn(1000, 3))
    >>> bool(z.mean().abs() < 1e-5)
    True
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if dim < 1 or not 0.0 < momentum <= 1.0 or not eps > 0.0:
            raise ValueError(
                "BatchNorm: dim and eps must be positive, and momentum within 0 and 1, got "
                f"{dim}, {eps} and {momentum}"
            )
        self.dim, self.momentum, self.eps = dim, momentum, eps
        self.shift = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(z, None)
        start, log_det = affine_coupling(z, self.shift, self.log_scale, inverse=True)
        scale = 0.5 * (self.variance + self.eps).log()
        x, other = affine_coupling(start, self.mean, scale)
        return x, log_det + other

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x, None)
        mean, variance = self.mean, self.variance
        if self.training:
            rows = x.reshape(-1, self.dim)
            if rows.shape[0] < 2:
                raise ValueError(
                    f"BatchNorm: x must have at least 2 rows in training, got {list(x.shape)}"
                )
            variance, mean = torch.var_mean(rows, 0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                self.variance.lerp_(variance.to(self.variance.dtype), self.momentum)
        scale = 0.5 * (variance + self.eps).log()
        start, log_det = affine_coupling(x, mean, scale, inverse=True)
        z, other = affine_coupling(start, self.shift, self.log_scale)
        return z, log_det + other


class Permutation(TwoWay):
    """The columns in another order: reversed, or one drawn when the module is made.

    >>> fastvae.flows.Permutation(4).forward_and_log_det(torch.arange(4.0))[0]
    tensor([3., 2., 1., 0.])
    """

    order: Tensor
    back: Tensor

    def __init__(self, dim: int, *, random: bool = False) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"Permutation: dim must be positive, got {dim}")
        order = torch.randperm(dim) if random else torch.arange(dim).flip(0)
        self.dim, self.random = dim, random
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.back if inverse else self.order), no_determinant(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, random={self.random}"
