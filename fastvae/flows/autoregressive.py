"""Autoregressive transforms: each column moves as those before it say, through one masked network.

One direction is one pass of the network. In the other a column has to be known before the next can
be; but no part of the network is evaluated twice for that: its units are in the order of the
columns that they see, and :meth:`MADE.unroll` fills them in as columns become known; for affine
elements one launch does so: :meth:`MADE.unroll_affine`. The gradient is that of an implicit
function, and its equations are solved in the same way, from the last column: :class:`_Unrolled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
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


def is_transformed(x: Tensor) -> bool:
    """Whether autocast, forward mode or a transform of functions makes something else of a call."""
    return (
        torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


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
        return self.sums(x, context)[-1]

    def sums(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """What the units of each layer sum up to; the last one's are the outputs."""
        first, *others = self._layers()
        sums = [first(x)]
        if self.context_dim:
            sums[0] = sums[0] + self.context(context)
        for layer in others:
            sums.append(layer(self.activation(sums[-1])))
        return sums

    def _first_sums(self, z: Tensor, context: Tensor | None) -> Tensor:
        """What the first layer's units add the columns to, ``[..., N]``, of a context."""
        assert context is not None
        first = self._layers()[0]
        return (first.bias + self.context(context)).expand(*z.shape[:-1], -1)

    def wants_gradient(self, *inputs: Tensor | None) -> bool:
        """Whether any is wanted, of ``inputs`` or parameters."""
        given = (*inputs, *self.parameters())
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)

    def unroll_affine(
        self, z: Tensor, kind: str, inverse: bool, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`unroll` of :class:`Affine` in one launch; None where there is no kernel for it.

        Which has no gradient, and knows nothing of autocast.
        """
        layers, act = self._layers(), self.activation
        if (
            _load.module is None
            or not (z.is_cpu or (z.is_cuda and _load.module.cuda))
            or type(act) not in ACTIVATIONS
            or (isinstance(act, nn.ELU) and act.alpha != 1.0)
            or (isinstance(act, nn.LeakyReLU) and act.negative_slope != 0.01)
            or len(layers) > MAX_LAYERS
            or is_transformed(z)
            or self.wants_gradient(z, context)
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
        weights, before, after = self._ordered_weights()
        sums = [layer.bias.expand(rows.shape[0], -1) for layer in self._layers()]
        if self.context_dim:
            sums[0] = self._first_sums(z, context).reshape(sums[0].shape)
        sums[-1] = sums[-1][:, self.order]

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

    def unroll_back(
        self, d_x: Tensor, d_outputs: Tensor, slope: Tensor, weight: Tensor, slopes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        r"""Solves :math:`s\, y = \bar x + \partial\bar o`, where :math:`\bar o` is
        :math:`\bar o_0 - w\, y`, of each column times its outputs' weights, and
        :math:`\partial\bar o` its gradient with respect to x through the network.

        By halves, as :meth:`unroll`, but from the last column, on which no other's outputs depend.

        Args:
            d_x, slope: :math:`\bar x` and s, ``[..., D]``.
            d_outputs, weight: :math:`\bar o_0` and w, ``[..., N]``.
            slopes: of the activation, at the units of each hidden layer.

        Returns:
            y, ``[..., D]``, and :math:`\bar o`, ``[..., N]``.
        """
        weights, before, after = self._ordered_weights()
        slopes = [x.reshape(-1, x.shape[-1]) for x in slopes]
        counts = [b - a for a, b in pairwise(after[-1])]
        d_columns, by_column = (x.reshape(-1, self.dim).split(1, -1) for x in (d_x, slope))
        d_numbers, numbers = (
            x.reshape(-1, x.shape[-1])[:, self.order].split(counts, -1) for x in (d_outputs, weight)
        )

        def solve(first: int, last: int, sums: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """The gradients of what each layer gives for columns [first, last), given the sums of
            what those behind say to what it takes."""
            if last - first == 1:
                found: list[Tensor] = []
                for i in reversed(range(len(weights))):
                    units = slice(before[i][first], before[i][last])
                    x = sums[i]
                    if found:
                        block = weights[i][after[i][first] : after[i][last], units]
                        x = torch.addmm(x, found[-1], block)
                    found.append(x * slopes[i - 1][:, units] if i > 0 else x)
                y = (d_columns[first] + found.pop()) / by_column[first]
                outputs = torch.addcmul(d_numbers[first], y, numbers[first], value=-1)
                return [*reversed(found), outputs], y
            middle = (first + last) // 2
            cuts = [a[middle] - a[first] for a in before]
            right, y = solve(middle, last, [x[:, cut:] for x, cut in zip(sums, cuts, strict=True)])
            pushed = [
                torch.addmm(x[:, :cut], seen, w[b[middle] : b[last], a[first] : a[middle]])
                for x, cut, seen, w, a, b in zip(
                    sums, cuts, right, weights, before, after, strict=True
                )
            ]
            left, other = solve(first, middle, pushed)
            found = [torch.cat(pair, -1) for pair in zip(left, right, strict=True)]
            return found, torch.cat([other, y], -1)

        rows = d_columns[0].shape[0]
        sums = [d_x.new_zeros(rows, a[-1] - a[0]) for a in before]
        found, y = solve(0, self.dim, sums)
        return y.view(d_x.shape), found[-1][:, self.order.argsort()].view(d_outputs.shape)

    def _ordered_weights(self) -> tuple[list[Tensor], list[list[int]], list[list[int]]]:
        """The weights, outputs in the order of their columns, and the begins of what each layer
        takes and gives. As long as only what is known is pushed on, no weight that is masked is
        met."""
        weights: list[Tensor] = [layer.weight for layer in self._layers()]
        weights[-1] = weights[-1][self.order]
        return weights, self.begins[:-1], self.begins[1:]


class _With(nn.Module):
    """A function of a network, as :func:`torch.func.functional_call` wants it."""

    def __init__(self, made: MADE) -> None:
        super().__init__()
        self.made = made

    def forward(self, f: Callable[[MADE], Any]) -> Any:
        return f(self.made)


class _Unrolled(torch.autograd.Function):
    r"""The slow direction, x of z, whose inverse is the fast one, z = g(x), log_det = -h(x).

    Of the gradients :math:`\bar x` and :math:`\bar\ell` of its results that of z is the root of

    .. math:: J_g^\top \bar z = \bar x - \bar\ell\, \nabla h

    found from the last column on (:meth:`MADE.unroll_back`); that of the parameters is the one of
    :math:`-\bar z^\top g - \bar\ell\, h` where x is fixed. Nothing is kept but x. What is wanted
    with gradients of its own is taken through :meth:`MADE.unroll`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        flow: Autoregressive,
        inverse: bool,
        names: Sequence[str],
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, log_det = flow.unroll(flow.conditioner, z, context, inverse)
        ctx.flow, ctx.inverse, ctx.names = flow, inverse, names
        ctx.save_for_backward(x, z, context, *parameters)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_log_det: Tensor) -> Any:
        flow, inverse = ctx.flow, ctx.inverse
        x, *inputs = ctx.saved_tensors  # z, context, and the parameters
        wanted = ctx.needs_input_grad[3:]

        def through(inputs: Sequence[Tensor | None], f: Callable[..., Any]) -> Any:
            """f(network, z, context), of a network of those parameters."""
            z, context, *parameters = inputs
            given: Any = {f"made.{name}": p for name, p in zip(ctx.names, parameters, strict=True)}
            return functional_call(
                _With(flow.conditioner), given, (lambda made: f(made, z, context),)
            )

        def gradients(outputs: Any, given: Any, inputs: Sequence[Any], **mode: bool) -> list[Any]:
            leaves = [x for x, one in zip(inputs, wanted, strict=True) if one]
            found = iter(torch.autograd.grad(outputs, leaves, given, allow_unused=True, **mode))
            return [None, None, None, *(next(found) if one else None for one in wanted)]

        if torch.is_grad_enabled():
            # Of aliases: where one is made of another, its own path alone is this node's.
            inputs = [y if y is None else y.view_as(y) for y in inputs]
            outputs = through(inputs, lambda *given: flow.unroll(*given, inverse))
            return tuple(gradients(outputs, (d_x, d_log_det), inputs, create_graph=True))

        x = x.detach()
        with torch.enable_grad():
            inputs = [y if y is None else y.detach().requires_grad_() for y in inputs]
            sums = through(inputs, lambda made, _, context: made.sums(x, context))
            hidden = [y.detach().requires_grad_() for y in sums[:-1]]
            units = [flow.conditioner.activation(y).sum() for y in hidden]
            column, numbers = x.requires_grad_(), sums[-1].detach().requires_grad_()
            z, h = flow.element(column, numbers, not inverse)
        slopes = torch.autograd.grad(units, hidden) if hidden else ()

        def pull(y: Tensor, d_y: Tensor) -> tuple[Tensor, ...]:
            given = (column, numbers)
            if not y.requires_grad:  # of volumes that are kept
                return tuple(map(torch.zeros_like, given))
            return torch.autograd.grad(y, given, d_y, retain_graph=True, materialize_grads=True)

        z_by, h_by = pull(z, torch.ones_like(z)), pull(h, -d_log_det)
        d_z, d_numbers = through(
            inputs,
            lambda made, *_: made.unroll_back(d_x + h_by[0], h_by[1], *z_by, list(slopes)),
        )
        found = gradients(sums[-1], d_numbers, inputs)
        found[3] = d_z if wanted[0] else None
        return tuple(found)


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
        made = self.conditioner
        if made.wants_gradient(x, context) and self._knows_gradient(x):
            names, parameters = zip(*made.named_parameters(), strict=True)
            return _Unrolled.apply(self, inverse, names, x, context, *parameters)  # type: ignore
        return self.unroll(made, x, context, inverse)

    def unroll(
        self, made: MADE, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The slow direction, through that network."""
        if type(self.element) is Affine:
            moved = made.unroll_affine(x, self.element.kind, inverse, context)
            if moved is not None:
                return moved
        return made.unroll(
            x, lambda column, numbers: self.element(column, numbers, inverse), context
        )

    def _knows_gradient(self, x: Tensor) -> bool:
        """Whether :class:`_Unrolled` has the gradient: of what has no state, noise or parameters of
        its own, and knows nothing of transforms of functions, of compilers, nor of autocast."""
        return (
            type(self.element) in (Affine, Spline)
            and type(self.conditioner.activation) in ACTIVATIONS
            and not is_transformed(x)
            and not torch.compiler.is_compiling()
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
