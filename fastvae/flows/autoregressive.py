"""Autoregressive transforms: each column moves as those before it say, through one masked network.

One direction is one pass of the network. In the other a column has to be known before the next can
be; but no part of the network is evaluated twice for that: its units are in the order of the
columns that they see, and :meth:`MADE.unroll` fills them in as columns become known. Where no
gradient is wanted, one launch does so for affine elements: :meth:`MADE.unroll_affine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from .. import _load
from .element import Affine, Element, Spline
from .networks import start_at
from .transform import TwoWay

__all__ = ["MADE", "AffineAutoregressive", "Autoregressive", "SplineAutoregressive"]

# (column of the input, its parameters) -> (the column found, log_det)
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# The names by which the kernel knows those activations that it does.
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
MAX_LAYERS = 32  # of the kernel


class MaskedLinear(nn.Linear):
    """An affine map in which some weights are taken for zeros."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.masked(), self.bias)

    def masked(self) -> Tensor:
        return self.weight * self.mask


class MADE(nn.Module):
    """A perceptron whose outputs for column d see the columns before d alone.

    A hidden unit of degree m sees the first m columns; degrees rise evenly along a layer. Those of
    degree 0 see no column, but the context, if there is one: through them the first column's
    outputs depend on it too (as in nflows they do not).

    Args:
        dim: D.
        columns: the column that each output is of, ``[N]``.
        hidden: widths of the hidden layers.
        activation: between layers; acts on each unit by itself.
        context_dim: C, of a ``context`` that all columns see; default: none.

    Paper: Germain, Gregor, Murray & Larochelle, "MADE", ICML 2015.

    >>> made = fastvae.flows.MADE(3, columns=[0, 1, 2], hidden=(16,))
    >>> torch.autograd.functional.jacobian(made, torch.randn(3)).triu().any()
    tensor(False)
    """

    order: Tensor

    def __init__(
        self,
        dim: int,
        columns: Sequence[int] | Tensor,
        hidden: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        if dim < 1 or any(width < 1 for width in hidden):
            raise ValueError(
                f"MADE: dim and hidden must be positive, got {dim} and {tuple(hidden)}"
            )
        columns = torch.as_tensor(columns)
        if columns.dim() != 1 or columns.numel() == 0 or columns.min() < 0 or columns.max() >= dim:
            raise ValueError(f"MADE: columns must be of 0 to {dim - 1}, got {columns.tolist()}")
        self.dim, self.context_dim = dim, context_dim
        self.least = least = 0 if context_dim or dim == 1 else 1
        # Of the inputs, of each hidden layer, and of the outputs, which may see a degree less.
        degrees = [torch.arange(1, dim + 1)]
        degrees += [least + torch.arange(width) * (dim - least) // width for width in hidden]
        degrees.append(columns)
        self.layers = nn.ModuleList(
            MaskedLinear(after.unsqueeze(1) >= before) for before, after in pairwise(degrees)
        )
        self.activation = activation()
        if context_dim:
            first = cast(MaskedLinear, self.layers[0])
            self.context = nn.Linear(context_dim, first.out_features, bias=False)
        # Where the units begin that become known with column d: at begins[layer][d].
        self.register_buffer("order", columns.argsort(stable=True), persistent=False)
        ranks = [*degrees[:-1], columns[self.order] + 1]
        edges = torch.arange(1, dim + 2)
        self.begins = [torch.searchsorted(rank, edges).tolist() for rank in ranks]

    def _layers(self) -> list[MaskedLinear]:
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[..., N]`` of ``x``, ``[..., D]``, and ``context``, ``[..., C]``."""
        first, *others = self._layers()
        x = first(x)
        if self.context_dim:
            x = x + self.context(context)
        for layer in others:
            x = layer(self.activation(x))
        return x

    def _first_sums(self, z: Tensor, context: Tensor | None) -> Tensor:
        """What the first layer's units add the columns to, ``[..., N]``, of a context."""
        assert context is not None
        first = self._layers()[0]
        return (first.bias + self.context(context)).expand(*z.shape[:-1], -1)

    def unroll_affine(
        self, z: Tensor, kind: str, inverse: bool, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`unroll` of :class:`Affine` in one launch; None where there is no kernel for it.

        Which has no gradient, and knows nothing of transforms of functions, nor of autocast.
        """
        layers, act = self._layers(), self.activation
        if (
            _load.module is None
            or not (z.is_cpu or (z.is_cuda and _load.module.cuda))
            or type(act) not in ACTIVATIONS
            or (isinstance(act, nn.ELU) and act.alpha != 1.0)
            or (isinstance(act, nn.LeakyReLU) and act.negative_slope != 0.01)
            or len(layers) > MAX_LAYERS
            or torch.is_autocast_enabled(z.device.type)
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or (
                torch.is_grad_enabled()
                and any(x is not None and x.requires_grad for x in (z, context, *self.parameters()))
            )
        ):
            return None
        return torch.ops.fastvae.unroll_affine.default(  # type: ignore[no-any-return]
            z,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            self._first_sums(z, context) if self.context_dim else None,
            self.least,
            kind,
            inverse,
            ACTIVATIONS[type(act)],
        )

    def unroll(self, z: Tensor, step: Step, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solves ``x_d = step(z_d, outputs for d of x)`` column after column: ``(x, log_det)``.

        By halves: the first half of the columns, what their units add to the inputs of the units of
        the second half, a product of matrices for each layer, and the second half.

        Args:
            z: ``[..., D]``.
            step: makes ``(x_d, log_det)``, ``[..., 1]`` and ``[...]``, of ``z_d``, ``[..., 1]``,
                and the outputs for column d, in the order of ``columns``.
            context: ``[..., C]``.
        """
        rows = z.reshape(-1, self.dim)
        # As long as only what is known is pushed on, no weight that is masked is met.
        weights: list[Tensor] = [layer.weight for layer in self._layers()]
        sums = [layer.bias.expand(rows.shape[0], -1) for layer in self._layers()]
        if self.context_dim:
            sums[0] = self._first_sums(z, context).reshape(sums[0].shape)
        weights[-1], sums[-1] = weights[-1][self.order], sums[-1][:, self.order]
        before, after = self.begins[:-1], self.begins[1:]  # of each layer's inputs and outputs

        if self.least == 0:  # what units say that see no column
            seen = rows[:, :0]
            for i, (a, b) in enumerate(zip(before, after, strict=True)):
                sums[i] = torch.addmm(sums[i], seen, weights[i][:, : a[0]].mT)
                sums[i], seen = sums[i][:, b[0] :], self.activation(sums[i][:, : b[0]])

        def solve(first: int, last: int, sums: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """The units of columns [first, last), given the sums of what those before say."""
            if last - first == 1:
                x, log_det = step(rows[:, first:last], sums[-1])
                units = [x]
                for x, w, a, b in zip(sums[:-1], weights, before, after, strict=False):
                    block = w[b[first] : b[last], a[first] : a[last]]
                    units.append(self.activation(torch.addmm(x, units[-1], block.mT)))
                return units, log_det
            middle = (first + last) // 2
            cuts = [b[middle] - b[first] for b in after]
            left, log_det = solve(
                first, middle, [x[:, :cut] for x, cut in zip(sums, cuts, strict=True)]
            )
            pushed = [
                torch.addmm(x[:, cut:], seen, w[b[middle] : b[last], a[first] : a[middle]].mT)
                for x, cut, seen, w, a, b in zip(
                    sums, cuts, left, weights, before, after, strict=True
                )
            ]
            right, other = solve(middle, last, pushed)
            units = [torch.cat(pair, -1) for pair in zip(left, right, strict=True)]
            return units, log_det + other

        units, log_det = solve(0, self.dim, sums)
        return units[0].view(z.shape), log_det.view(z.shape[:-1])


class Autoregressive(TwoWay):
    """Each column moves as the columns before it say.

    With ``given="data"``, as in MAF, those are of the data x: densities take one pass, samples are
    unrolled. With ``given="noise"``, as in IAF, they are of the noise z: samples and their own
    densities take one pass, the density of something else is unrolled. Both are exact, and have
    gradients.

    Args:
        dim: D.
        element: moves a column: :class:`Affine`, :class:`Spline`, or your own :class:`Element`.
        given: ``"data"`` or ``"noise"``.
        hidden, activation: of the network, a :class:`MADE`.
        context_dim: C, of the ``context`` that the network sees too; default: none.

    Papers: Kingma et al., "Improved variational inference with inverse autoregressive flow",
    NeurIPS 2016; Papamakarios, Pavlakou & Murray, "Masked autoregressive flow for density
    estimation", NeurIPS 2017.
    """

    def __init__(
        self,
        dim: int,
        element: Element,
        *,
        given: str = "data",
        hidden: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        if given not in ("data", "noise"):
            raise ValueError(f"{type(self).__name__}: given must be data or noise, got {given}")
        self.dim, self.element, self.given, self.context_dim = dim, element, given, context_dim
        self.conditioner = MADE(dim, element.columns(dim), hidden, activation, context_dim)
        start_at(cast(MaskedLinear, self.conditioner.layers[-1]), element.start(dim))

    def move(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if inverse == (self.given == "data"):  # what the network sees is known
            return self.element(x, self.conditioner(x, context), inverse)
        if type(self.element) is Affine:
            moved = self.conditioner.unroll_affine(x, self.element.kind, inverse, context)
            if moved is not None:
                return moved
        return self.conditioner.unroll(
            x, lambda column, numbers: self.element(column, numbers, inverse), context
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, given={self.given}, {self.element}"


class AffineAutoregressive(Autoregressive):
    """An autoregressive transform by :func:`fastvae.affine_coupling`.

    Args:
        dim: D.
        kind: ``"exp"`` (MAF), ``"tanh_exp"``, ``"sigmoid"``, ``"gated"`` (IAF), or ``"additive"``.
        others: as :class:`Autoregressive`.

    >>> maf = fastvae.flows.AffineAutoregressive(4)
    >>> iaf = fastvae.flows.AffineAutoregressive(4, kind="gated", given="noise")
    >>> x, log_det = iaf.forward_and_log_det(torch.randn(3, 4))
    """

    def __init__(self, dim: int, kind: str = "exp", **others: Any) -> None:
        super().__init__(dim, Affine(kind), **others)


class SplineAutoregressive(Autoregressive):
    """An autoregressive transform by :func:`fastvae.rational_quadratic_spline`.

    Args:
        dim: D.
        bins: K of each spline.
        bound: B: splines act within [-B, B], and beyond are the identity.
        others: as :class:`Autoregressive`.

    >>> transform = fastvae.flows.SplineAutoregressive(4, bins=8)
    >>> x, log_det = transform.forward_and_log_det(torch.randn(3, 4))
    """

    def __init__(self, dim: int, bins: int = 8, bound: float = 3.0, **others: Any) -> None:
        super().__init__(dim, Spline(bins, bound), **others)
