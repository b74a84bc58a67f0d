"""THE table: one row gives an op all its generic tests (test_ops.py) and its benchmark (bench/).

To add an op, add a row. A row says how to draw valid inputs, which outputs come back, how exact
they must be and why, what a user would write by hand, and which sizes are worth timing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastvae

Shape = tuple[int, ...]
Draw = Callable[[Shape, torch.Generator], Tensor]


def normal(scale: float = 1.0) -> Draw:
    return lambda shape, g: scale * torch.randn(shape, generator=g, dtype=torch.float64)


def binary(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=g).double()


def uniform(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def counts(shape: Shape, g: torch.Generator) -> Tensor:
    """From 1: at 0 there is no two-sided derivative (test_math.py goes there)."""
    return 1.0 + torch.poisson(positive(shape, g) * 3.0, generator=g)


def bins(count: int) -> Draw:
    """Centres of the bins of [-1, 1]: what the values of a pixel are."""
    return lambda shape, g: torch.randint(count, shape, generator=g).double() * 2 / (count - 1) - 1


def log_scale(shape: Shape, g: torch.Generator) -> Tensor:
    """From a third of a bin's width to a third of the range."""
    return standard_normal(shape, g) - 3.5


def positive(shape: Shape, g: torch.Generator) -> Tensor:
    return standard_normal(shape, g).exp()


def near_one(shape: Shape, g: torch.Generator) -> Tensor:
    """Scales that a gradient of second order in 1 / sigma leaves within float16's range."""
    return (0.4 * standard_normal(shape, g)).exp()


def classes(shape: Shape, g: torch.Generator) -> Tensor:
    """Of at least three; as floats, so that dtypes and layouts are tested as those of others."""
    return torch.randint(3, shape, generator=g).double()


standard_normal = normal()

MAPS = ("log_var", "log_scale", "scale", "softplus")  # from what a network gives to a scale


@dataclass(frozen=True)
class Input:
    name: str
    draw: Draw = standard_normal
    data: bool = False  # what a training step needs no gradient for: timed without
    integral: bool = False  # int64 will do as well
    shape: Callable[[Shape], Shape] = lambda shape: shape  # of this input, in a case of that shape
    has_rows: bool = True  # or all rows share it


@dataclass(frozen=True)
class Case:
    """One op, under its name in ``fastvae``, ``fastvae.reference`` and ``torch.ops.fastvae``.

    The generic tests think in rows and columns, ``[..., D]``. An op whose inputs have shapes of
    their own says which of its *sizes* stand for such rows, and the shape of each input at sizes.
    """

    op: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]  # "element": shape of the inputs; "row": without the last dimension
    eager: Callable[..., Any]  # the formula as users write it by hand
    distributions: Callable[..., Any] | None  # and with torch.distributions, if it has one
    bench: tuple[Shape, ...]  # sizes, last dimension = row length
    # the fewest elements that a forward must read and write, per element of input; or of its sizes
    bytes_forward: int | Callable[[Shape], int]
    # and forward + backward, of the inputs that are not data
    bytes_full: int | Callable[[Shape], int]
    device_bench: tuple[Shape, ...] = ()  # on a GPU; default: the same
    sampled: bool = False  # takes key= and generator=
    # a sample of noise, and the noise in a sample, whose others are no one's to replay
    sample_from: Callable[..., Tensor] = lambda e, mu, log_var: mu + torch.exp(0.5 * log_var) * e
    noise_in: Callable[..., Tensor] = lambda z, mu, log_var: (z - mu) * torch.exp(-0.5 * log_var)
    variant: str = ""  # tells rows of one op apart in test names
    settings: tuple[Any, ...] = ()  # what the op takes after its tensors, all of it
    options: dict[str, Any] = field(default_factory=dict)  # of these, what is not the default
    sizes: Callable[[Shape], Shape] = lambda shape: shape  # that stand for rows [..., D]
    # Why some generic tests say nothing of this op; empty where they do.
    wired_as: str = ""  # another row shows that autograd, compile and torch.func meet the op
    no_broadcast: str = ""  # its inputs do not broadcast against each other
    sees_batch: str = ""  # a row's outputs depend on the other rows
    mixes: str = ""  # an element of its output depends on the row's other columns
    quadratic: str = ""  # it has D x D inputs, so that D must be moderate
    straight_through: str = ""  # its gradient is not the derivative of its value
    copies: str = ""  # it copies its inputs, which therefore must fit in memory
    eager_bytes: Callable[[Shape], int] = lambda sizes: 0  # of the largest tensor written by hand
    unrolls: Callable[[Shape], bool] = lambda sizes: False  # torch.compile would take minutes
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)  # other packages' own
    row_rtol: float = 1e-6  # of float32 row sums, at inputs as a trained model gives them
    others: tuple[str, ...] = ()  # peers whose function is another one, timed all the same
    approximate: str = ""  # why the formula written by hand is timed though it is off
    # max |value - float64 reference| / (|reference| + atol) per dtype
    rtol: dict[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float64: 1e-12,  # sums of a few hundred terms, each good to a few ulp
            torch.float32: 2e-6,  # likewise; the terms of a log-density may cancel by some 10x
            torch.bfloat16: 2**-8,  # elementwise outputs are rounded once; row sums are float32
            torch.float16: 2**-11,
        }
    )

    @property
    def name(self) -> str:
        return self.op + (f"-{self.variant}" if self.variant else "")

    @property
    def fastvae(self) -> Callable[..., Any]:
        return getattr(fastvae, self.op)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(fastvae.reference, self.op)

    def draw(self, shape: Shape, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Valid inputs for rows ``[..., D]``; arguments as :meth:`draw_sizes`."""
        return self.draw_sizes(self.sizes(shape), *args, **kwargs)

    def draw_sizes(
        self,
        sizes: Shape,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        requires_grad: bool = False,
        device: str = "cpu",
    ) -> list[Tensor]:
        """Valid inputs, drawn in float64 and rounded."""
        g = torch.Generator().manual_seed(seed)
        tensors = [i.draw(i.shape(sizes), g).to(device=device, dtype=dtype) for i in self.inputs]
        return [t.requires_grad_(requires_grad) for t in tensors]

    def call(self, inputs: list[Tensor], key: Tensor | None = None) -> tuple[Tensor, ...]:
        """The public function, its outputs as a tuple."""
        options = {**self.options, "key": key} if self.sampled else self.options
        out = self.fastvae(*inputs, **options)
        return out if isinstance(out, tuple) else (out,)

    def call_reference(self, inputs: list[Tensor], key: Tensor | None = None) -> tuple[Tensor, ...]:
        """The reference formula, its outputs as a tuple."""
        out = self.reference(*inputs, *([key] if self.sampled else []), **self.options)
        return out if isinstance(out, tuple) else (out,)

    def elements(self, sizes: Shape, full: bool) -> int:
        """The fewest to read and write, in forward or in forward and backward."""
        per_element = self.bytes_full if full else self.bytes_forward
        return (
            per_element * math.prod(sizes) if isinstance(per_element, int) else per_element(sizes)
        )

    def row_count(self, sizes: Shape) -> int:
        first = self.inputs[0]
        return math.prod(first.shape(sizes)[:-1])

    def rows(self, inputs: list[Tensor], rows: slice) -> list[Tensor]:
        """The inputs cut to some rows; what rows share is left whole."""
        return [x[rows] if i.has_rows else x for x, i in zip(inputs, self.inputs, strict=True)]


@dataclass(frozen=True)
class Composition(Case):
    """Ops as a training step puts them together: has a benchmark, but no generic tests.

    A shape lists what a reader would, ``100x50x784``; the inputs have shapes of their own.
    """

    ours: Callable[..., Any] = None  # type: ignore[assignment]
    exact: Callable[..., Any] = None  # type: ignore[assignment]

    @property
    def fastvae(self) -> Callable[..., Any]:
        return self.ours

    @property
    def reference(self) -> Callable[..., Any]:
        return self.exact


# --- what users write by hand ---------------------------------------------------------------------


def _eager_reparameterize(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def _eager_reparameterize_kl(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(-1)
    return _eager_reparameterize(mu, log_var), kl


def _eager_reparameterize_tril_kl(mu: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + (scale_tril @ torch.randn_like(mu).unsqueeze(-1)).squeeze(-1)
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    squares = mu.pow(2).sum(-1) + scale_tril.pow(2).sum((-2, -1))
    return z, 0.5 * (squares - mu.shape[-1]) - log_det


TEMPERATURE = 0.7


def _eager_gumbel_softmax(logits: Tensor) -> Tensor:
    return torch.nn.functional.gumbel_softmax(logits, TEMPERATURE)


def _eager_gumbel_one_hot(logits: Tensor) -> Tensor:
    return torch.nn.functional.gumbel_softmax(logits, TEMPERATURE, hard=True)


def _distributions_gumbel_softmax(logits: Tensor) -> Tensor:
    return _d.RelaxedOneHotCategorical(TEMPERATURE, logits=logits, validate_args=False).rsample()


# A softmax knows its noise but for what a row shares: take the mean off, and what it varied by.
def _gumbel_scale(logits: Tensor) -> float:
    return math.pi / math.sqrt(6) * math.sqrt(1 - 1 / logits.shape[-1])


def _gumbels_in(y: Tensor, logits: Tensor) -> Tensor:
    noise = TEMPERATURE * y.log() - logits
    return (noise - noise.mean(-1, keepdim=True)) / _gumbel_scale(logits)


def _softmax_of(noise: Tensor, logits: Tensor) -> Tensor:
    return torch.softmax((logits + _gumbel_scale(logits) * noise) / TEMPERATURE, -1)


def _eager_categorical_kl(logits_q: Tensor, logits_p: Tensor | None = None) -> Tensor:
    log_q = torch.log_softmax(logits_q, -1)
    if logits_p is None:
        return (log_q.exp() * (log_q + math.log(logits_q.shape[-1]))).sum(-1)
    return (log_q.exp() * (log_q - torch.log_softmax(logits_p, -1))).sum(-1)


def _distributions_categorical_kl(logits_q: Tensor, logits_p: Tensor | None = None) -> Tensor:
    logits_p = torch.zeros_like(logits_q) if logits_p is None else logits_p
    q = _d.Categorical(logits=logits_q, validate_args=False)
    return _d.kl_divergence(q, _d.Categorical(logits=logits_p, validate_args=False))


def _eager_categorical_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, x.long().unsqueeze(-1)).squeeze(-1).sum(-1)


def eager_planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dot = (w * u).sum(-1)
    scale = (torch.nn.functional.softplus(dot) - 1 - dot) / w.square().sum(-1)
    v = u + scale.unsqueeze(-1) * w
    log_det = z.new_zeros(z.shape[:-1])
    for k in range(u.shape[-2]):
        h = torch.tanh((z * w[..., k, :]).sum(-1) + b[..., k])
        z = z + v[..., k, :] * h.unsqueeze(-1)
        log_det = log_det + torch.log((1 + (1 - h * h) * (w * v).sum(-1)[..., k]).abs())
    return z, log_det


def _eager_householder_flow(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    for k in range(v.shape[-2]):
        w = v[..., k, :]
        z = z - 2 * (w * z).sum(-1, keepdim=True) * w / w.square().sum(-1, keepdim=True)
    return z, 0 * z[..., 0]


def _eager_householder_inverse(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _eager_householder_flow(z, v.flip(-2))


def _with_normflows(name: str, parameters: Callable[..., tuple[dict[str, Tensor], ...]]) -> Any:
    """A stack of normflows' modules, with the parameters of ours in place of their own."""
    stacks: dict[tuple[int, ...], list[Any]] = {}

    def run(z: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        import normflows

        lines = given[0].shape
        if lines not in stacks:
            stacks[lines] = [getattr(normflows.flows, name)(lines[1:]) for _ in range(lines[0])]
        log_det = z.new_zeros(z.shape[:-1])
        steps = parameters(*(x.split(1) for x in given))
        for flow, own in zip(stacks[lines], steps, strict=True):
            for key, value in own.items():
                flow._parameters.pop(key, None)
                setattr(flow, key, value)
            z, one = flow(z)
            log_det = log_det + one
        return z, log_det

    return run


def _planar_parameters(*lines: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], ...]:
    return tuple(dict(zip("uwb", line, strict=True)) for line in zip(*lines, strict=True))


def _radial_parameters(*lines: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], ...]:
    softplus = torch.nn.functional.softplus  # where theirs has the absolute value
    return tuple(
        {"z_0": center, "alpha": softplus(alpha), "beta": beta}
        for center, alpha, beta in zip(*lines, strict=True)
    )


def _eager_radial_flow(
    z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    a = torch.nn.functional.softplus(alpha)
    b = torch.nn.functional.softplus(beta) - a
    log_det = z.new_zeros(z.shape[:-1])
    for k in range(center.shape[-2]):
        d = z - center[..., k, :]
        r = d.norm(dim=-1)
        h = 1 / (a[..., k] + r)
        bh = b[..., k] * h
        z = z + bh.unsqueeze(-1) * d
        log_det = log_det + (z.shape[-1] - 1) * torch.log1p(bh)
        log_det = log_det + torch.log1p(bh - b[..., k] * r * h * h)
    return z, log_det


def _eager_spline(tails: str, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """As nflows has it, without its boolean masks: compilers cannot follow those."""
    bound, smallest = 3.0, 1e-3

    def knots(numbers: Tensor) -> tuple[Tensor, Tensor]:
        bins = numbers.shape[-1]
        sizes = smallest + (1 - smallest * bins) * torch.softmax(numbers, -1)
        ends = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)) * 2 * bound - bound
        return ends, ends[..., 1:] - ends[..., :-1]

    def spline(
        x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        turns = 2 * bound * torch.floor((x + bound) / (2 * bound))
        inside = (x >= -bound) & (x <= bound) if tails == "linear" else torch.ones_like(x).bool()
        v = torch.where(inside, x, 0.0) if tails == "linear" else x - turns
        x_knots, width = knots(widths)
        y_knots, height = knots(heights)
        slopes = smallest + torch.nn.functional.softplus(derivatives)
        if tails == "linear":
            slopes = torch.nn.functional.pad(slopes, (1, 1), value=1.0)
        else:
            slopes = torch.cat([slopes, slopes[..., :1]], -1)
        k = (v.unsqueeze(-1) >= (y_knots if inverse else x_knots)[..., 1:-1]).sum(-1, keepdim=True)
        left, bottom = x_knots.gather(-1, k).squeeze(-1), y_knots.gather(-1, k).squeeze(-1)
        w, h = width.gather(-1, k).squeeze(-1), height.gather(-1, k).squeeze(-1)
        d0, d1 = slopes.gather(-1, k).squeeze(-1), slopes.gather(-1, k + 1).squeeze(-1)
        s = h / w
        if inverse:
            rise, q = v - bottom, d0 + d1 - 2 * s
            a, b, c = h * (s - d0) + rise * q, h * d0 - rise * q, -s * rise
            theta = 2 * c / (-b - torch.sqrt((b * b - 4 * a * c).clamp(min=0.0)))
        else:
            theta = (v - left) / w
        mixed = theta * (1 - theta)
        den = s + (d0 + d1 - 2 * s) * mixed
        log = torch.log(s * s * (d1 * theta**2 + 2 * s * mixed + d0 * (1 - theta) ** 2))
        log = log - 2 * torch.log(den)
        y = theta * w + left if inverse else bottom + h * (s * theta**2 + d0 * mixed) / den
        if tails == "circular":
            y = y + turns
        log = torch.where(inside, -log if inverse else log, 0.0)
        return torch.where(inside, y, x), log.sum(-1)

    return spline


def _with_nflows(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
        from nflows.transforms.splines.rational_quadratic import (
            unconstrained_rational_quadratic_spline as spline,
        )

        y, log = spline(x, *numbers, inverse=inverse, tails="linear", tail_bound=3.0)
        return y, log.sum(-1)

    return run


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called: to import the compiler takes seconds."""
    compiled = functools.cache(lambda: torch.compile(function))
    return lambda *inputs: compiled()(*inputs)


def _with_zuko(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
        from zuko.transforms import MonotonicRQSTransform

        transform = MonotonicRQSTransform(*numbers, bound=3.0, slope=1e-3)
        if inverse:
            y = transform.inv(x)
            return y, -transform.log_abs_det_jacobian(y, x).sum(-1)
        y, log = transform.call_and_ladj(x)
        return y, log.sum(-1)

    return run


def _eager_affine_coupling(kind: str, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def coupling(
        x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if kind in ("exp", "tanh_exp"):
            log_sigma = torch.tanh(scale) if kind == "tanh_exp" else scale
            sigma = log_sigma.exp()
            y = (x - shift) / sigma if inverse else sigma * x + shift
        else:
            sigma = torch.sigmoid(scale + 2.0 if kind == "sigmoid" else scale)
            log_sigma = sigma.log()
            if kind == "sigmoid":
                y = x / sigma - shift if inverse else sigma * (x + shift)
            else:
                moved = (1.0 - sigma) * shift
                y = (x - moved) / sigma if inverse else sigma * x + moved
        if mask is not None:
            y = mask * x + (1.0 - mask) * y
            log_sigma = (1.0 - mask) * log_sigma
        log_det = log_sigma.sum(-1)
        return y, -log_det if inverse else log_det

    return coupling


def _eager_planar_inverse(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, inverse: bool = True
) -> tuple[Tensor, Tensor]:
    dot = (w * u).sum(-1)
    e = torch.nn.functional.softplus(dot) - 1
    v = u + ((e - dot) / w.square().sum(-1)).unsqueeze(-1) * w
    log_det = z.new_zeros(z.shape[:-1])
    for k in reversed(range(u.shape[-2])):
        c, e_k = (z * w[..., k, :]).sum(-1) + b[..., k], e[..., k]
        a = (c / (1 + e_k.clamp(min=0))).detach()
        for step in range(6):  # Newton's; the last for the gradient
            with torch.set_grad_enabled(step == 5 and torch.is_grad_enabled()):
                h = torch.tanh(a)
                a = a - (a + e_k * h - c) / (1 + e_k * (1 - h * h))
        h = torch.tanh(a)
        z = z - v[..., k, :] * h.unsqueeze(-1)
        log_det = log_det - torch.log1p(e_k * (1 - h * h))
    return z, log_det


def _eager_radial_inverse(
    z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor, inverse: bool = True
) -> tuple[Tensor, Tensor]:
    a = torch.nn.functional.softplus(alpha)
    b = torch.nn.functional.softplus(beta) - a
    log_det = z.new_zeros(z.shape[:-1])
    for k in reversed(range(center.shape[-2])):
        d = z - center[..., k, :]
        p = d.norm(dim=-1) - a[..., k] - b[..., k]
        r = (p + (p.square() + 4 * a[..., k] * d.norm(dim=-1)).sqrt()) / 2
        h = 1 / (a[..., k] + r)
        bh = b[..., k] * h
        z = center[..., k, :] + d / (1 + bh).unsqueeze(-1)
        log_det = log_det - (z.shape[-1] - 1) * torch.log1p(bh)
        log_det = log_det - torch.log1p(bh - b[..., k] * r * h * h)
    return z, log_det


def _eager_gaussian_kl(
    mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor | None = None, log_var_p: Tensor | None = None
) -> Tensor:
    if mu_p is None or log_var_p is None:
        return -0.5 * (1 + log_var_q - mu_q.pow(2) - log_var_q.exp()).sum(-1)
    ratio = (log_var_q - log_var_p).exp()
    square = (mu_q - mu_p).pow(2) / log_var_p.exp()
    return 0.5 * (log_var_p - log_var_q + ratio + square - 1).sum(-1)


def _eager_gaussian_log_prob(x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    square = (x - mu).pow(2) / log_var.exp()
    return -0.5 * (math.log(2 * math.pi) + log_var + square).sum(-1)


def _eager_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    return -bce(logits, x.expand_as(logits), reduction="none").sum(-1)


def _eager_continuous_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    # as users write it: the constant in lambda, a Taylor series around 1/2
    probs = torch.sigmoid(logits)
    off = (probs < 0.499) | (probs > 0.501)
    cut = torch.where(off, probs, 0.499)
    log_c = torch.log((torch.log1p(-cut) - torch.log(cut)).abs()) - torch.log((1 - 2 * cut).abs())
    square = (probs - 0.5).square()
    taylor = math.log(2.0) + (4.0 / 3.0 + 104.0 / 45.0 * square) * square
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    score = -bce(logits, x.expand_as(logits), reduction="none")
    return (score + torch.where(off, log_c, taylor)).sum(-1)


def _eager_laplace_log_prob(x: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    return -(math.log(2.0) + log_scale + (x - mu).abs() / log_scale.exp()).sum(-1)


def _eager_poisson_log_prob(x: Tensor, log_rate: Tensor) -> Tensor:
    return (x * log_rate - log_rate.exp() - torch.lgamma(x + 1)).sum(-1)


def _nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    # as in scVI
    eps = 1e-8
    log_m = torch.log(theta + mu + eps)
    return (
        theta * (torch.log(theta + eps) - log_m)
        + x * (torch.log(mu + eps) - log_m)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def _eager_negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    return _nb(x, mu, theta).sum(-1)


def _eager_zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, logits: Tensor
) -> Tensor:
    softplus = torch.nn.functional.softplus
    counts = _nb(x, mu, theta)
    zero = softplus(counts - logits) - softplus(-logits)
    return torch.where(x < 1e-8, zero, counts - softplus(logits)).sum(-1)


def _eager_log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, -1) - math.log(max(1, log_w.shape[-1]))


def _eager_importance_weighted_bound(x: Tensor, logits: Tensor, log_ratio: Tensor) -> Tensor:
    log_w = _eager_bernoulli_log_prob(x, logits) + log_ratio
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


def _eager_gaussian_mixture_log_prob(
    z: Tensor, mu: Tensor, log_var: Tensor, log_weights: Tensor
) -> Tensor:
    square = (z.unsqueeze(-2) - mu).pow(2) / log_var.exp()
    density = -0.5 * (math.log(2 * math.pi) + log_var + square).sum(-1)
    return torch.logsumexp(log_weights + density, -1)


def _eager_aggregate_posterior(z: Tensor, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    batch, size = z.shape[0], DATASET
    m = max(1, batch - 1)
    i = torch.arange(batch, device=z.device)
    w = torch.full((batch, batch), 1 / m, dtype=z.dtype, device=z.device)
    w[i, i] = 1 / size
    w[i, (i + 1) % batch] = (size - m) / (size * m) if batch > 1 else 1.0
    square = (z[:, None] - mu[None]).pow(2) / log_var.exp()
    density = -0.5 * (math.log(2 * math.pi) + log_var + square)
    log_qz = torch.logsumexp(w.log() + density.sum(-1), 1)
    return log_qz, torch.logsumexp(w.log()[:, :, None] + density, 1).sum(-1)


def _pixelcnn_bins(x: Tensor, mean: Tensor, log_scale: Tensor, num_bins: int = 256) -> Tensor:
    # as in PixelCNN++ and its descendants
    half = 1.0 / (num_bins - 1)
    log_scale = log_scale.clamp(min=-7.0)
    centered = x - mean
    inv_std = torch.exp(-log_scale)
    plus_in, min_in = inv_std * (centered + half), inv_std * (centered - half)
    delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    softplus = torch.nn.functional.softplus
    mid_in = inv_std * centered
    log_pdf_mid = mid_in - log_scale - 2.0 * softplus(mid_in) + math.log(2.0 * half)
    inner = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), log_pdf_mid)
    upper = torch.where(x > 0.999, -softplus(min_in), inner)
    return torch.where(x < -0.999, plus_in - softplus(plus_in), upper)


def _eager_discretized_logistic_log_prob(
    x: Tensor, mu: Tensor, log_scale: Tensor, num_bins: int = 256
) -> Tensor:
    return _pixelcnn_bins(x, mu, log_scale, num_bins).sum(-1)


def _eager_discretized_logistic_mixture_log_prob(
    x: Tensor, logits: Tensor, mu: Tensor, log_scale: Tensor, coeffs: Tensor
) -> Tensor:
    coeffs = torch.tanh(coeffs)
    x = x.unsqueeze(-1).expand_as(mu)
    green = mu[..., 1, :] + coeffs[..., 0, :] * x[..., 0, :]
    blue = mu[..., 2, :] + coeffs[..., 1, :] * x[..., 0, :] + coeffs[..., 2, :] * x[..., 1, :]
    means = torch.stack([mu[..., 0, :], green, blue], -2)
    log_probs = _pixelcnn_bins(x, means, log_scale).sum(-2)
    return torch.logsumexp(log_probs + torch.log_softmax(logits, -1), -1)


# --- and with torch.distributions -----------------------------------------------------------------

_d = torch.distributions


def _normal(mu: Tensor, log_var: Tensor) -> torch.distributions.Normal:
    return _d.Normal(mu, torch.exp(0.5 * log_var), validate_args=False)


def _distributions_reparameterize_kl(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    q = _normal(mu, log_var)
    p = _d.Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    return q.rsample(), _d.kl_divergence(q, p).sum(-1)


def _distributions_reparameterize_tril_kl(mu: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    q = _d.MultivariateNormal(mu, scale_tril=scale_tril, validate_args=False)
    eye = torch.eye(mu.shape[-1], dtype=mu.dtype, device=mu.device)
    p = _d.MultivariateNormal(torch.zeros_like(mu[0]), scale_tril=eye, validate_args=False)
    return q.rsample(), _d.kl_divergence(q, p)


def _distributions_gaussian_kl(
    mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor | None = None, log_var_p: Tensor | None = None
) -> Tensor:
    mu_p = torch.zeros_like(mu_q) if mu_p is None else mu_p
    log_var_p = torch.zeros_like(mu_q) if log_var_p is None else log_var_p
    return _d.kl_divergence(_normal(mu_q, log_var_q), _normal(mu_p, log_var_p)).sum(-1)


# --- the table ------------------------------------------------------------------------------------

LATENT: tuple[Shape, ...] = ((128, 32), (1024, 64), (65536, 256))


def _triangles(shape: Shape, g: torch.Generator) -> Tensor:
    """Well conditioned, as after training."""
    c = standard_normal(shape, g).tril() * (0.5 / math.sqrt(max(1, shape[-1])))
    diagonal = c.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(near_one(diagonal.shape, g))
    return c


DATASET = 1_000_000  # data that the batches of aggregate_posterior are a part of
OWN_SHAPES = "its inputs have shapes of their own"
CLASSES = "the classes of a row compete"
PAIRS = "it meets every row with every component, from packed copies"


def _log_weights(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.log_softmax(standard_normal(shape, g), -1)


# A pair's weight is e^l: of a log-density l it takes the absolute error for a relative one, and l
# is a sum of squares of scores that are good to two ulp, up to thousands of nats in these shapes.
_OF_PAIRS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}

# A step passes on the error of the one before, times as much as it stretches.
_OF_STEPS: dict[torch.dtype, float] = {**_OF_PAIRS, torch.float32: 1e-5}


# A bin is as good as an exponential, two ulp, and so are knots: of a narrow bin beside wide ones
# that is a hundred ulp, on which gradients depend. (Eager PyTorch is ten times further off.)
_OF_SPLINES: dict[torch.dtype, float] = {**_OF_PAIRS, torch.float32: 2e-4}


def _direction(shape: Shape, g: torch.Generator) -> Tensor:
    return standard_normal(shape, g) / math.sqrt(max(1, shape[-1]))


CLAMPED = "PixelCNN++ clamps log_scale, and takes the density at the middle of narrow bins"

# A component's weight likewise, of log-probabilities of tens of nats.
_OF_PIXELS = {**_OF_PAIRS, torch.float32: 1e-5}


def _pixel_inputs(coeffs: bool = True) -> tuple[Input, ...]:
    """At sizes [..., C, K]."""
    return (
        Input("x", bins(256), data=True, shape=lambda s: s[:-1]),
        Input("logits", shape=lambda s: (*s[:-2], s[-1])),
        Input("mu"),
        Input("log_scale", log_scale),
        Input("coeffs", shape=lambda s: (*s[:-2], s[-2] * (s[-2] - 1) // 2, s[-1])),
    )[: 5 if coeffs else 4]


def _pixel_elements(sizes: Shape, channels: int) -> int:
    """Of all inputs: a logit, and of each channel mu, log_scale and (C - 1) / 2 coefficients."""
    return math.prod(sizes[:-2]) * (sizes[-1] * (1 + 3 * channels) + channels)


# Scores of up to ten or so are good to an ulp, 1e-6, and an exponential makes a relative error of
# it; where one class has nearly all the weight, its gradient is the small difference of two sums.
_OF_SCORES: dict[torch.dtype, float] = {**_OF_PAIRS, torch.float32: 2e-5}

BASIC: tuple[Case, ...] = (
    Case(
        op="reparameterize",
        inputs=(Input("mu"), Input("log_var")),
        outputs=("element",),
        eager=_eager_reparameterize,
        distributions=lambda mu, log_var: _normal(mu, log_var).rsample(),
        bench=LATENT,
        bytes_forward=3,  # read mu, log_var; write z
        bytes_full=6,  # and read grad_z (which is grad_mu), log_var; write grad_log_var
        sampled=True,
        settings=("log_var",),
    ),
    Case(
        op="reparameterize_kl",
        inputs=(Input("mu"), Input("log_var")),
        outputs=("element", "row"),
        eager=_eager_reparameterize_kl,
        distributions=_distributions_reparameterize_kl,
        bench=LATENT,
        device_bench=((512, 64), (65536, 256)),
        bytes_forward=3,
        bytes_full=8,  # and read grad_z, mu, log_var; write grad_mu, grad_log_var
        sampled=True,
        settings=("log_var", 0.0),
    ),
    Case(
        op="reparameterize_tril_kl",
        inputs=(
            Input("mu"),
            Input("scale_tril", _triangles, shape=lambda s: (*s, s[-1])),
        ),
        outputs=("element", "row"),
        eager=_eager_reparameterize_tril_kl,
        distributions=_distributions_reparameterize_tril_kl,
        bench=((128, 32), (1024, 64)),
        bytes_forward=lambda s: math.prod(s) * (2 + s[-1]),  # read mu, scale_tril; write z
        bytes_full=lambda s: math.prod(s) * (5 + 3 * s[-1]),  # and again; grad_z; write gradients
        sampled=True,
        sample_from=lambda e, mu, c: mu + (c @ e.unsqueeze(-1)).squeeze(-1),
        noise_in=lambda z, mu, c: torch.linalg.solve_triangular(
            c, (z - mu).unsqueeze(-1), upper=False
        ).squeeze(-1),
        settings=("scale",),
        no_broadcast=OWN_SHAPES,
        mixes="z_i is a sum over the columns up to i",
        quadratic="each row has a triangle of its own",
        eager_bytes=lambda s: 4 * math.prod(s) * s[-1],
    ),
    Case(
        op="gaussian_kl",
        inputs=(Input("mu_q"), Input("log_var_q")),
        outputs=("row",),
        eager=_eager_gaussian_kl,
        distributions=_distributions_gaussian_kl,
        bench=((128, 32), (1024, 512), (65536, 256)),
        device_bench=((65536, 1024),),
        bytes_forward=2,
        bytes_full=6,
        settings=("log_var", 0.0),
    ),
    Case(
        op="gaussian_kl",
        variant="prior",
        inputs=(Input("mu_q"), Input("log_var_q"), Input("mu_p"), Input("log_var_p")),
        outputs=("row",),
        eager=_eager_gaussian_kl,
        distributions=_distributions_gaussian_kl,
        bench=((1024, 512),),
        bytes_forward=4,
        bytes_full=12,
        settings=("log_var", 0.0),
    ),
    Case(
        op="gaussian_log_prob",
        inputs=(Input("x", data=True), Input("mu"), Input("log_var")),
        outputs=("row",),
        eager=_eager_gaussian_log_prob,
        distributions=lambda x, mu, log_var: _normal(mu, log_var).log_prob(x).sum(-1),
        bench=((128, 784), (4096, 256), (65536, 256)),
        device_bench=((65536, 1024),),
        bytes_forward=3,
        bytes_full=8,
        settings=("log_var",),
    ),
    Case(
        op="bernoulli_log_prob",
        inputs=(Input("x", binary, data=True), Input("logits", normal(3.0))),
        outputs=("row",),
        eager=_eager_bernoulli_log_prob,
        distributions=lambda x, logits: (
            _d.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)
        ),
        bench=((128, 784), (4096, 784)),
        device_bench=((65536, 1024),),
        bytes_forward=2,
        bytes_full=5,
    ),
    Case(
        op="continuous_bernoulli_log_prob",
        inputs=(Input("x", uniform, data=True), Input("logits", normal(3.0))),
        outputs=("row",),
        eager=_eager_continuous_bernoulli_log_prob,
        distributions=lambda x, logits: (
            _d.ContinuousBernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)
        ),
        bench=((128, 784), (4096, 784)),
        bytes_forward=2,
        bytes_full=5,
    ),
    Case(
        op="laplace_log_prob",
        inputs=(Input("x", data=True), Input("mu"), Input("log_scale")),
        outputs=("row",),
        eager=_eager_laplace_log_prob,
        distributions=lambda x, mu, log_scale: (
            _d.Laplace(mu, log_scale.exp(), validate_args=False).log_prob(x).sum(-1)
        ),
        bench=((128, 784), (4096, 256)),
        bytes_forward=3,
        bytes_full=8,
        settings=("log_scale",),
    ),
    Case(
        op="discretized_logistic_log_prob",
        inputs=(Input("x", bins(256), data=True), Input("mu"), Input("log_scale", log_scale)),
        outputs=("row",),
        eager=_eager_discretized_logistic_log_prob,
        distributions=None,
        bench=((128, 3072), (4096, 784)),
        bytes_forward=3,
        bytes_full=8,
        settings=(256, "log_scale"),
        approximate=CLAMPED,
    ),
    Case(
        op="discretized_logistic_log_prob",
        variant="5-bit",
        inputs=(Input("x", bins(32), data=True), Input("mu"), Input("log_scale", log_scale)),
        outputs=("row",),
        eager=lambda *xs: _eager_discretized_logistic_log_prob(*xs, num_bins=32),
        distributions=None,
        bench=(),
        bytes_forward=3,
        bytes_full=8,
        settings=(32, "log_scale"),
        options={"num_bins": 32},
        approximate=CLAMPED,
    ),
    Case(
        op="discretized_logistic_mixture_log_prob",
        inputs=_pixel_inputs(),
        outputs=("row",),
        eager=_eager_discretized_logistic_mixture_log_prob,
        distributions=None,
        bench=((32, 32, 32, 3, 10),),  # batch, height, width, channels, components
        bytes_forward=lambda s: _pixel_elements(s, 3),
        bytes_full=lambda s: 3 * _pixel_elements(s, 3),  # read twice, and written
        settings=(256, "log_scale"),
        sizes=lambda shape: (*shape[:-1], 3, shape[-1]),
        no_broadcast=OWN_SHAPES,
        approximate=CLAMPED,
        copies=OWN_SHAPES,  # and one row of them does not expand to a [rows, columns]
        rtol=_OF_PIXELS,
    ),
    Case(
        op="poisson_log_prob",
        inputs=(Input("x", counts, data=True), Input("log_rate")),
        outputs=("row",),
        eager=_eager_poisson_log_prob,
        distributions=lambda x, log_rate: (
            _d.Poisson(log_rate.exp(), validate_args=False).log_prob(x).sum(-1)
        ),
        bench=((128, 2000),),
        bytes_forward=2,
        bytes_full=5,
    ),
    Case(
        op="negative_binomial_log_prob",
        inputs=(Input("x", counts, data=True), Input("mu", positive), Input("theta", positive)),
        outputs=("row",),
        eager=_eager_negative_binomial_log_prob,
        distributions=lambda x, mu, theta: (
            _d.NegativeBinomial(theta, logits=mu.log() - theta.log(), validate_args=False)
            .log_prob(x)
            .sum(-1)
        ),
        bench=((128, 2000),),
        bytes_forward=3,
        bytes_full=8,
    ),
    Case(
        op="zero_inflated_negative_binomial_log_prob",
        inputs=(
            Input("x", counts, data=True),
            Input("mu", positive),
            Input("theta", positive),
            Input("logits"),
        ),
        outputs=("row",),
        eager=_eager_zero_inflated_negative_binomial_log_prob,
        distributions=None,
        bench=((128, 2000),),
        bytes_forward=4,
        bytes_full=11,
    ),
    Case(
        op="gumbel_softmax",
        inputs=(Input("logits"),),
        outputs=("element",),
        eager=_eager_gumbel_softmax,
        distributions=_distributions_gumbel_softmax,
        bench=((1024, 10), (128, 20, 20), (4096, 1000)),
        bytes_forward=2,  # read logits, write y
        bytes_full=5,  # and read grad and y, write grad_logits
        sampled=True,
        settings=(TEMPERATURE, False),
        options={"temperature": TEMPERATURE},
        sample_from=_softmax_of,
        noise_in=_gumbels_in,
        mixes=CLASSES,
        rtol=_OF_SCORES,
    ),
    Case(
        op="gumbel_softmax",
        variant="hard",
        inputs=(Input("logits"),),
        outputs=("element",),
        eager=_eager_gumbel_one_hot,
        distributions=None,
        bench=(),
        bytes_forward=2,
        bytes_full=5,
        sampled=True,
        settings=(TEMPERATURE, True),
        options={"temperature": TEMPERATURE, "hard": True},
        mixes=CLASSES,
        rtol=_OF_SCORES,
        straight_through="forward the largest score, backward the softmax of the scores",
    ),
    Case(
        op="categorical_kl",
        inputs=(Input("logits_q"),),
        outputs=("row",),
        eager=_eager_categorical_kl,
        distributions=_distributions_categorical_kl,
        bench=((1024, 10), (128, 20, 20), (4096, 1000)),
        bytes_forward=1,
        bytes_full=3,
        rtol=_OF_SCORES,
    ),
    Case(
        op="categorical_kl",
        variant="prior",
        inputs=(Input("logits_q"), Input("logits_p")),
        outputs=("row",),
        eager=_eager_categorical_kl,
        distributions=_distributions_categorical_kl,
        bench=((1024, 10), (4096, 1000)),
        bytes_forward=2,
        bytes_full=6,
        rtol=_OF_SCORES,
    ),
    Case(
        op="categorical_log_prob",
        inputs=(
            Input("x", classes, data=True, integral=True, shape=lambda s: s[:-1]),
            Input("logits", normal(3.0)),
        ),
        outputs=("row",),
        eager=_eager_categorical_log_prob,
        distributions=lambda x, logits: (
            _d.Categorical(logits=logits, validate_args=False).log_prob(x).sum(-1)
        ),
        bench=((128, 784, 4), (128, 20, 256), (16, 32, 5000)),  # rows x variables x classes
        bytes_forward=1,
        bytes_full=3,
        sizes=lambda shape: (*shape, 7),
        no_broadcast=OWN_SHAPES,
        copies="it keeps a value for every variable on the way",
    ),
    Case(
        op="log_mean_exp",
        inputs=(Input("log_w", normal(3.0)),),
        outputs=("row",),
        eager=_eager_log_mean_exp,
        distributions=None,
        bench=((100, 50), (4096, 64)),
        bytes_forward=1,
        bytes_full=3,
    ),
    Case(
        op="gaussian_mixture_log_prob",
        inputs=(
            Input("z", shape=lambda s: (*s[:-2], s[-1])),
            Input("mu", shape=lambda s: s[-2:], has_rows=False),
            Input("log_var", shape=lambda s: s[-2:], has_rows=False),
            Input("log_weights", _log_weights, shape=lambda s: s[-2:-1], has_rows=False),
        ),
        outputs=("row",),
        eager=_eager_gaussian_mixture_log_prob,
        distributions=None,  # it would normalise the weights, and differentiate through that
        bench=((256, 500, 40),),  # rows x components x columns
        bytes_forward=lambda s: (s[0] + 2 * s[1]) * s[2] + s[1],
        bytes_full=lambda s: 3 * ((s[0] + 2 * s[1]) * s[2] + s[1]),  # read twice, and written
        sizes=lambda shape: (*shape[:-1], 19, shape[-1]),
        no_broadcast=OWN_SHAPES,
        copies=PAIRS,
        eager_bytes=lambda s: 4 * math.prod(s),
        settings=("log_var",),
        rtol=_OF_PAIRS,
    ),
    Case(
        op="aggregate_posterior",
        variant="mss",
        inputs=(Input("z"), Input("mu"), Input("log_var")),
        outputs=("row", "row"),
        eager=_eager_aggregate_posterior,
        distributions=None,
        bench=((512, 32), (1024, 32), (4096, 64)),
        device_bench=((8192, 64),),
        bytes_forward=3,
        bytes_full=9,
        settings=(DATASET, "mss", False, "log_var"),
        options={"dataset_size": DATASET, "estimator": "mss"},
        sizes=lambda shape: (math.prod(shape[:-1]), shape[-1]),
        no_broadcast=OWN_SHAPES,
        sees_batch="its rows are the components of all the others",
        copies=PAIRS,
        eager_bytes=lambda s: 4 * s[0] * s[0] * s[1],
        rtol=_OF_PAIRS,
    ),
)


# What the scales of bins are given by: from about a third of a bin's width, as log_scale() is, but
# where the gradient, of second order in 1 / scale, would leave float16's range.
OF_BINS: dict[str, Draw] = {
    "log_var": lambda shape, g: 2.0 * log_scale(shape, g),
    "scale": lambda shape, g: 0.2 * near_one(shape, g),
    "softplus": log_scale,
}


def _given_by(
    op: str, scale: str, of: str = "", free_bits: float = 0.0, alone: bool = False
) -> Case:
    """A row again, its scales given by another map, perhaps with free bits; timed if so."""
    case = next(c for c in BASIC if c.op == op and c.variant == of)
    scales = ("log_var", "log_scale", "log_var_q", "log_var_p")
    draw = near_one if scale == "scale" else standard_normal
    if op.startswith("discretized_logistic"):
        draw = OF_BINS[scale]
    options: dict[str, Any] = {"parameterization": scale}
    settings = tuple(scale if s in MAPS else s for s in case.settings)
    if free_bits:
        options["free_bits"] = free_bits
        settings = (scale, free_bits)
    return replace(
        case,
        variant=" ".join(filter(None, (of, scale, "free bits" if free_bits else ""))),
        inputs=tuple(replace(i, draw=draw) if i.name in scales else i for i in case.inputs),
        settings=settings,
        options={**case.options, **options},
        bench=(),
        wired_as="" if alone else case.name,
    )


def _flow(
    op: str, eager: Callable[..., Any], own_lines: bool = False, inverse: bool = False
) -> Case:
    """At sizes ``[..., D, K]``, the steps of all rows, or each row's own."""

    def line(s: Shape) -> Shape:
        return (*(s[:-2] if own_lines else ()), s[-1], s[-2])

    def vector(name: str) -> Input:
        return Input(name, _direction, shape=line, has_rows=own_lines)

    def number(name: str) -> Input:
        return Input(name, shape=lambda s: line(s)[:-1], has_rows=own_lines)

    parameters = {
        "planar_flow": (vector("u"), vector("w"), number("b")),
        "radial_flow": (vector("center"), number("alpha"), number("beta")),
        "householder_flow": (vector("v"),),
    }[op]
    peers = {
        "planar_flow": {"normflows": _with_normflows("Planar", _planar_parameters)},
        "radial_flow": {"normflows": _with_normflows("Radial", _radial_parameters)},
    }
    sizes: tuple[Shape, ...] = ((512, 64, 16), (512, 40, 80), (4096, 2, 32))
    if inverse:
        sizes = sizes[:1]
    if own_lines:
        sizes = ()
    if op == "householder_flow":  # a stack that all rows share is better made one matrix
        sizes = ((512, 64, 8),) if own_lines and not inverse else ()

    def of_rows(s: Shape) -> Shape:
        if op == "householder_flow" and s[-1] == 1:  # z to -z: the gradient of v is rounding alone
            s = (*s[:-1], 2)
        return (*s, 3)

    def elements(s: Shape) -> int:  # of z, and of the parameters
        return math.prod(s[:-1]) + sum(math.prod(p.shape(s)) for p in parameters)

    return Case(
        op=op,
        variant=" ".join(filter(None, ("inverse" * inverse, "amortised" * own_lines))),
        inputs=(Input("z", shape=lambda s: s[:-1]), *parameters),
        outputs=("element", "row"),
        eager=eager,
        distributions=None,
        bench=sizes,
        device_bench=((65536, 64, 16),) if op != "householder_flow" else (),
        unrolls=lambda s: s[-1] > 32,
        settings=(inverse,),
        wired_as=f"{op}-inverse" if inverse and own_lines else "",
        options={"inverse": True} if inverse else {},
        peers={} if inverse else peers.get(op, {}),
        bytes_forward=lambda s: elements(s) + math.prod(s[:-1]),
        bytes_full=lambda s: 3 * elements(s) + 2 * math.prod(s[:-1]),
        sizes=of_rows,
        no_broadcast=OWN_SHAPES,
        mixes="a step depends on all columns",
        copies="rows and lines are made contiguous",
        rtol=_OF_STEPS,
    )


def _coupling(kind: str, inverse: bool = False, masked: bool = False, bench: bool = False) -> Case:
    options: dict[str, Any] = {"kind": kind}
    if inverse:
        options["inverse"] = True
    return Case(
        op="affine_coupling",
        variant=" ".join([kind] + ["inverse"] * inverse + ["masked"] * masked),
        inputs=(Input("x"), Input("shift"), Input("scale"))
        + (Input("mask", binary, data=True),) * masked,
        outputs=("element", "row"),
        eager=_eager_affine_coupling(kind, inverse),
        distributions=None,
        bench=((8192, 64), (128, 32)) if bench else (),
        bytes_forward=4 + masked,
        bytes_full=11 + 2 * masked,  # and read grad_y and all again; write the gradients
        settings=(kind, inverse),
        options=options,
        wired_as="" if kind == "tanh_exp" else "affine_coupling-tanh_exp",
    )


def _spline(inverse: bool = False, circular: bool = False) -> Case:
    """At sizes ``[..., D, K]``."""
    tails = "circular" if circular else "linear"
    options: dict[str, Any] = {"inverse": True} if inverse else {}
    if circular:
        options["tails"] = tails

    def elements(s: Shape) -> int:
        return math.prod(s[:-1]) * 3 * s[-1]

    return Case(
        op="rational_quadratic_spline",
        variant=" ".join(["circular"] * circular + ["inverse"] * inverse),
        inputs=(
            Input("x", normal(2.0), shape=lambda s: s[:-1]),
            Input("widths"),
            Input("heights"),
            Input("derivatives", shape=lambda s: (*s[:-1], s[-1] - (not circular))),
        ),
        outputs=("element", "row"),
        eager=_eager_spline(tails, inverse),
        distributions=None,
        bench=() if circular else ((512, 64, 8),),
        device_bench=((65536, 64, 8),),
        peers={}
        if circular
        else {
            "nflows": _with_nflows(inverse),
            "zuko": _with_zuko(inverse),
            "zuko-compile": _compiled(_with_zuko(inverse)),
        },
        # zuko squashes what it is given, and knows no smallest bin; the gradients of nflows'
        # inverse are off by more than the check allows.
        others=("zuko", "zuko-compile") + ("nflows",) * inverse,
        bytes_forward=lambda s: elements(s) + math.prod(s[:-1]),
        bytes_full=lambda s: 3 * elements(s) + 2 * math.prod(s[:-1]),
        settings=(3.0, tails, inverse, 1e-3, 1e-3, 1e-3),
        options=options,
        sizes=lambda shape: (*shape, 6),
        no_broadcast=OWN_SHAPES,
        wired_as="rational_quadratic_spline" if inverse or circular else "",
        mixes="several numbers make a column, and nothing else is mixed",
        row_rtol=2e-6,  # without FMA, as on x86-64-v2, exponentials and sizes are rounded twice
        rtol=_OF_SPLINES,
    )


def _rank(sizes: Shape) -> int:
    return min(16, sizes[-2], max(1, sizes[-2] // 4))


def _orthonormal(shape: Shape, g: torch.Generator) -> Tensor:
    return fastvae.householder_columns(standard_normal(shape, g)).contiguous()


def _eager_sylvester_flow(
    z: Tensor, q: Tensor, r: Tensor, s: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    d1, d2 = (torch.tanh(t.diagonal(dim1=-2, dim2=-1)) for t in (r, s))
    r, s = r.triu(1) + torch.diag_embed(d1), s.triu(1) + torch.diag_embed(d2)
    log_det = z.new_zeros(z.shape[:-1])
    own = q.dim() > 3

    def times(x: Tensor, matrix: Tensor) -> Tensor:
        return (x.unsqueeze(-2) @ matrix).squeeze(-2) if own else x @ matrix

    for k in range(q.shape[-3]):
        q_k = q[..., k, :, :]
        h = torch.tanh(times(times(z, q_k), s[..., k, :, :].mT) + b[..., k, :])
        z = z + times(times(h, r[..., k, :, :].mT), q_k.mT)
        log_det = log_det + torch.log(1 + (1 - h * h) * (d1 * d2)[..., k, :]).sum(-1)
    return z, log_det


def _eager_sylvester_inverse(
    z: Tensor, q: Tensor, r: Tensor, s: Tensor, b: Tensor, inverse: bool = True
) -> tuple[Tensor, Tensor]:
    d1, d2 = (torch.tanh(t.diagonal(dim1=-2, dim2=-1)) for t in (r, s))
    r, s = r.triu(1) + torch.diag_embed(d1), s.triu(1) + torch.diag_embed(d2)
    log_det = z.new_zeros(z.shape[:-1])
    eye = torch.eye(r.shape[-1], dtype=z.dtype, device=z.device)
    for k in reversed(range(q.shape[-3])):
        q_k, r_k, s_k, e = q[..., k, :, :], r[..., k, :, :], s[..., k, :, :], (d1 * d2)[..., k, :]
        c = (z.unsqueeze(-2) @ q_k @ s_k.mT).squeeze(-2) + b[..., k, :]
        t, a = s_k @ r_k, c.detach()
        for step in range(8):  # Newton's; the last for the gradient
            with torch.set_grad_enabled(step == 7 and torch.is_grad_enabled()):
                h = torch.tanh(a)
                slopes = eye + t * (1 - h * h).unsqueeze(-2)
                off = a + (t @ h.unsqueeze(-1)).squeeze(-1) - c
                move = torch.linalg.solve_triangular(slopes, off.unsqueeze(-1), upper=True)
                a = a - move.squeeze(-1)
        h = torch.tanh(a)
        z = z - (q_k @ r_k @ h.unsqueeze(-1)).squeeze(-1)
        log_det = log_det - torch.log1p(e * (1 - h * h)).sum(-1)
    return z, log_det


def _sylvester(own_lines: bool = False, inverse: bool = False) -> Case:
    """At sizes ``[..., D, K]``."""

    def line(s: Shape) -> Shape:
        return (*(s[:-2] if own_lines else ()), s[-1])

    def triangle(shape: Shape, g: torch.Generator) -> Tensor:
        """Steps of about half the size of z, as a stack that is trained has them at most."""
        return 0.5 * standard_normal(shape, g) / math.sqrt(max(1, shape[-1]))

    def elements(s: Shape) -> int:
        m = _rank(s)
        return math.prod(s[:-1]) + math.prod(line(s)) * (s[-2] * m + 2 * m * m + m)

    def own(name: str, draw: Draw, shape: Callable[[Shape], Shape]) -> Input:
        return Input(name, draw, shape=lambda s: (*line(s), *shape(s)), has_rows=own_lines)

    return Case(
        op="sylvester_flow",
        variant=" ".join(filter(None, ("inverse" * inverse, "amortised" * own_lines))),
        inputs=(
            Input("z", shape=lambda s: s[:-1]),
            own("q", _orthonormal, lambda s: (s[-2], _rank(s))),
            own("r", triangle, lambda s: (_rank(s), _rank(s))),
            own("s", triangle, lambda s: (_rank(s), _rank(s))),
            own("b", standard_normal, lambda s: (_rank(s),)),
        ),
        outputs=("element", "row"),
        eager=_eager_sylvester_inverse if inverse else _eager_sylvester_flow,
        distributions=None,
        bench=() if own_lines else ((512, 64, 8),),
        bytes_forward=lambda s: elements(s) + math.prod(s[:-1]),
        bytes_full=lambda s: 3 * elements(s) + 2 * math.prod(s[:-1]),
        sizes=lambda shape: (*shape, 3),
        no_broadcast=OWN_SHAPES,
        mixes="a step depends on all columns",
        quadratic="a step has D x M and M x M matrices",
        copies="rows and lines are made contiguous",
        settings=(inverse,),
        options={"inverse": True} if inverse else {},
        wired_as="" if not own_lines else "sylvester_flow-inverse" if inverse else "sylvester_flow",
        rtol=_OF_STEPS,
    )


FLOWS = (
    *(_spline(inverse, circular) for circular in (False, True) for inverse in (False, True)),
    *(
        _coupling(kind, inverse, masked, bench=kind == "tanh_exp" and not masked)
        for kind in ("exp", "tanh_exp", "sigmoid", "gated")
        for inverse in (False, True)
        for masked in ((False, True) if kind == "tanh_exp" else (False,))
    ),
    _sylvester(),
    _sylvester(own_lines=True),
    _sylvester(inverse=True),
    _sylvester(own_lines=True, inverse=True),
    _flow("planar_flow", eager_planar_flow),
    _flow("planar_flow", eager_planar_flow, own_lines=True),
    _flow("radial_flow", _eager_radial_flow),
    _flow("radial_flow", _eager_radial_flow, own_lines=True),
    _flow("householder_flow", _eager_householder_flow),
    _flow("householder_flow", _eager_householder_flow, own_lines=True),
    _flow("householder_flow", _eager_householder_inverse, inverse=True),
    _flow("householder_flow", _eager_householder_inverse, own_lines=True, inverse=True),
    _flow("planar_flow", _eager_planar_inverse, inverse=True),
    _flow("planar_flow", _eager_planar_inverse, own_lines=True, inverse=True),
    _flow("radial_flow", _eager_radial_inverse, inverse=True),
    _flow("radial_flow", _eager_radial_inverse, own_lines=True, inverse=True),
)

SCALES: tuple[Case, ...] = (
    _given_by("reparameterize", "log_scale"),
    _given_by("reparameterize", "scale", alone=True),
    _given_by("reparameterize", "softplus"),
    _given_by("reparameterize_kl", "log_scale"),
    _given_by("reparameterize_kl", "scale"),
    _given_by("reparameterize_kl", "softplus"),
    _given_by("reparameterize_kl", "log_var", free_bits=0.4),
    _given_by("reparameterize_kl", "softplus", free_bits=0.4, alone=True),
    _given_by("gaussian_kl", "log_scale"),
    _given_by("gaussian_kl", "scale"),
    _given_by("gaussian_kl", "softplus"),
    _given_by("gaussian_kl", "log_var", free_bits=0.4),
    _given_by("gaussian_kl", "log_scale", of="prior"),
    _given_by("gaussian_kl", "scale", of="prior"),
    _given_by("gaussian_kl", "softplus", of="prior"),
    _given_by("gaussian_kl", "scale", of="prior", free_bits=0.4, alone=True),
    _given_by("gaussian_log_prob", "log_scale"),
    _given_by("gaussian_log_prob", "scale", alone=True),
    _given_by("gaussian_log_prob", "softplus"),
    _given_by("laplace_log_prob", "log_var"),
    _given_by("laplace_log_prob", "scale", alone=True),
    _given_by("laplace_log_prob", "softplus"),
    _given_by("discretized_logistic_log_prob", "log_var"),
    _given_by("discretized_logistic_log_prob", "scale", alone=True),
    _given_by("discretized_logistic_log_prob", "softplus"),
    _given_by("discretized_logistic_mixture_log_prob", "log_var"),
    _given_by("discretized_logistic_mixture_log_prob", "scale", alone=True),
    _given_by("discretized_logistic_mixture_log_prob", "softplus"),
    _given_by("gaussian_mixture_log_prob", "log_scale"),
    _given_by("gaussian_mixture_log_prob", "scale", alone=True),
    _given_by("gaussian_mixture_log_prob", "softplus"),
    _given_by("aggregate_posterior", "log_scale", of="mss"),
    _given_by("aggregate_posterior", "scale", of="mss", alone=True),
    _given_by("aggregate_posterior", "softplus", of="mss"),
)

CASES = (*BASIC, *FLOWS, *SCALES)


def _samples(shape: Shape) -> int:
    return shape[1] if len(shape) == 3 else 4


def _eager_linear_flow(z: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    lower = matrix.tril(-1) + torch.eye(matrix.shape[0], dtype=z.dtype)
    whole = lower @ (matrix.triu(1) + torch.diag(matrix.diagonal().exp()))
    return z @ whole.T, torch.linalg.slogdet(whole)[1].expand(z.shape[:-1])


@functools.cache
def _autoregressive(shape: Shape, dtype: torch.dtype) -> fastvae.flows.Autoregressive:
    """B x D x hidden: three hidden layers, which is what nflows calls two blocks."""
    torch.manual_seed(0)
    hidden = 3 * (shape[-1],)
    flow = fastvae.flows.AffineAutoregressive(shape[1], "sigmoid", hidden=hidden)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]))
    return flow.to(dtype).requires_grad_(False).eval()


def _hidden(z: Tensor) -> Shape:
    return (*z.shape, 256 if z.shape[0] > 4 else 8)


def _by_unrolling(z: Tensor) -> tuple[Tensor, Tensor]:
    return _autoregressive(_hidden(z), z.dtype).forward_and_log_det(z)


def _by_passes(z: Tensor) -> tuple[Tensor, Tensor]:
    """As everybody samples it: the whole network once for each column."""
    flow = _autoregressive(_hidden(z), z.dtype)
    x = torch.zeros_like(z)
    for _ in range(z.shape[-1]):
        shift, scale = flow.conditioner(x).chunk(2, -1)
        sigma = torch.sigmoid(scale + 2.0)
        x = sigma * (z + shift)
    return x, torch.log(sigma).sum(-1)


def _with_nflows_maf(z: Tensor) -> tuple[Tensor, Tensor]:
    """With weights of its own, as it keeps its units in another order."""
    return _nflows_maf(_hidden(z), z.dtype).inverse(z)


@functools.cache
def _nflows_maf(shape: Shape, dtype: torch.dtype) -> Any:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    torch.manual_seed(0)
    maf = MaskedAffineAutoregressiveTransform(
        shape[1], shape[-1], num_blocks=2, use_residual_blocks=False
    )
    return maf.to(dtype).requires_grad_(False).eval()


COMPOSITIONS: tuple[Composition, ...] = (
    # The IWAE's likelihood and bound, B x K x D: x is [B, D], logits of K samples [K, B, D].
    Composition(
        op="importance_weighted_bound",
        inputs=(
            Input("x", binary, data=True, shape=lambda s: (s[0], s[-1])),
            Input("logits", normal(3.0), shape=lambda s: (_samples(s), s[0], s[-1])),
            Input("log_ratio", normal(3.0), shape=lambda s: (_samples(s), s[0])),
        ),
        outputs=("row",),
        eager=_eager_importance_weighted_bound,
        distributions=None,
        bench=((100, 50, 784),),
        bytes_forward=1,  # read logits
        bytes_full=3,  # and read logits, write their gradient
        ours=lambda x, logits, log_ratio: fastvae.importance_weighted_bound(
            fastvae.bernoulli_log_prob(x, logits) + log_ratio
        ),
        exact=lambda x, logits, log_ratio: fastvae.reference.log_mean_exp(
            (fastvae.reference.bernoulli_log_prob(x, logits) + log_ratio).movedim(0, -1)
        ),
    ),
    # Linear flows, B x D: the matrix of all rows.
    Composition(
        op="linear_flow",
        inputs=(Input("z"), Input("matrix", normal(0.1), shape=lambda s: (s[-1], s[-1]))),
        outputs=("element", "row"),
        eager=_eager_linear_flow,
        distributions=None,
        bench=((512, 64), (65536, 12)),
        bytes_forward=2,
        bytes_full=5,
        ours=fastvae.linear_flow,
        exact=_eager_linear_flow,
    ),
    # The slow direction of MAF, B x D: three hidden layers of 256.
    Composition(
        op="maf_sample",
        inputs=(Input("z"),),
        outputs=("element", "row"),
        eager=_by_passes,
        distributions=None,
        bench=((512, 64), (16, 64)),
        bytes_forward=2,
        bytes_full=4,
        unrolls=lambda s: s[-1] > 8,
        peers={"nflows": _with_nflows_maf},
        others=("nflows",),
        ours=_by_unrolling,
        exact=_by_passes,
    ),
)
