"""Couplings: some columns pass, and through a network make the numbers that move the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..functional import affine_coupling, rational_quadratic_spline
from .transform import Transform

__all__ = ["AffineCoupling", "Coupling", "SplineCoupling", "mlp"]

Conditioner = Callable[[int, int], nn.Module]  # (inputs, outputs) -> a network


class Perceptron(nn.Module):
    """Affine maps with an activation between them, the last of which starts at zero."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((inputs, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear((inputs, *hidden)[-1], outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))  # type: ignore[no-any-return]


def mlp(hidden: Sequence[int] = (64, 64), activation: type[nn.Module] = nn.ReLU) -> Conditioner:
    """Makes perceptrons whose last layer starts at zero, so that a flow starts simple.

    >>> fastvae.flows.mlp((8,))(2, 3)(torch.ones(1, 2))
    tensor([[0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    return lambda inputs, outputs: Perceptron(inputs, hidden, outputs, activation)


class Coupling(Transform):
    """What couplings share: ``passing`` of D columns pass, the others move.

    Args:
        dim: D.
        parameters: of each column that moves.
        flip: the last columns pass, not the first: alternate.
        passing: how many pass; default: half of D, rounded up.
        context_dim: C, of the ``context`` that the network sees too; default: none.
        conditioner: makes the network of its numbers of inputs and outputs; default: ``mlp()``.
    """

    def __init__(
        self,
        dim: int,
        parameters: int,
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
        self.dim, self.parameters_each, self.flip = dim, parameters, flip
        self.passing = (dim + 1) // 2 if passing is None else passing
        if not 0 < self.passing < dim:
            raise ValueError(f"{name}: passing must be within 1 and {dim - 1}, got {passing}")
        self.moving = dim - self.passing
        self.context_dim = context_dim
        make = mlp() if conditioner is None else conditioner
        self.conditioner = make(self.passing + context_dim, self.moving * parameters)

    def transform(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Moves ``x``, ``[..., moving]``, by ``numbers``, ``[..., moving, parameters]``."""
        raise NotImplementedError

    def _couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x must be [..., {self.dim}], got {list(x.shape)}"
            )
        if self.flip:
            moving, passing = x.split([self.moving, self.passing], -1)
        else:
            passing, moving = x.split([self.passing, self.moving], -1)
        given = passing
        if self.context_dim:
            if context is None or context.shape[-1] != self.context_dim:
                shape = None if context is None else list(context.shape)
                raise ValueError(
                    f"{type(self).__name__}: context must be [..., {self.context_dim}], got {shape}"
                )
            given = torch.cat([passing, context.expand(*passing.shape[:-1], -1)], -1)
        numbers = self.conditioner(given)
        numbers = numbers.unflatten(-1, (self.moving, self.parameters_each))
        moved, log_det = self.transform(moving, numbers, inverse)
        return torch.cat([moved, passing] if self.flip else [passing, moved], -1), log_det

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._couple(z, context, inverse=False)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._couple(x, context, inverse=True)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, passing={self.passing}, flip={self.flip}"
        return text + (f", context_dim={self.context_dim}" if self.context_dim else "")


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

    def __init__(
        self,
        dim: int,
        kind: str = "tanh_exp",
        *,
        flip: bool = False,
        passing: int | None = None,
        context_dim: int = 0,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__(
            dim,
            1 if kind == "additive" else 2,
            flip=flip,
            passing=passing,
            context_dim=context_dim,
            conditioner=conditioner,
        )
        kinds = ("exp", "tanh_exp", "sigmoid", "gated", "additive")
        if kind not in kinds:
            raise ValueError(f"AffineCoupling: kind must be one of {', '.join(kinds)}, got {kind}")
        self.kind = kind

    def transform(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.kind == "additive":
            return affine_coupling(x, numbers.squeeze(-1), inverse=inverse)
        shift, scale = numbers.unbind(-1)
        return affine_coupling(x, shift, scale, kind=self.kind, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


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

    def __init__(
        self,
        dim: int,
        bins: int = 8,
        bound: float = 3.0,
        *,
        flip: bool = False,
        passing: int | None = None,
        context_dim: int = 0,
        conditioner: Conditioner | None = None,
    ) -> None:
        if bins < 1:
            raise ValueError(f"SplineCoupling: bins must be positive, got {bins}")
        super().__init__(
            dim,
            3 * bins - 1,
            flip=flip,
            passing=passing,
            context_dim=context_dim,
            conditioner=conditioner,
        )
        self.bins, self.bound = bins, bound
        if isinstance(self.conditioner, Perceptron):
            self._start_as_identity(self.conditioner)

    @torch.no_grad()
    def _start_as_identity(self, network: Perceptron) -> None:
        """Bins that are equal, and slopes of 1 = 0.001 + softplus(s)."""
        bias = network.last.bias.view(self.moving, self.parameters_each)
        bias[:, 2 * self.bins :] = math.log(math.expm1(1.0 - 1e-3))

    def transform(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        widths, heights, derivatives = numbers.split([self.bins, self.bins, self.bins - 1], -1)
        return rational_quadratic_spline(
            x, widths, heights, derivatives, bound=self.bound, inverse=inverse
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound}"
