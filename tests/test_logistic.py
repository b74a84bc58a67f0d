"""Discretised logistics: what their rows in cases.py do not say."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from cases import MAPS, _pixelcnn_bins
from torch import Tensor

import fastvae
from fastvae import reference

INF = math.inf
one_op = fastvae.discretized_logistic_log_prob
mixture = fastvae.discretized_logistic_mixture_log_prob


def grid(num_bins: int = 256) -> Tensor:
    return torch.arange(num_bins, dtype=torch.float64) * 2 / (num_bins - 1) - 1


def draw(
    pixels: tuple[int, ...], channels: int, components: int, seed: int = 0, coeffs: bool = True
) -> list[Tensor]:
    """x, logits, mu, log_scale, coeffs in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*ends: int) -> Tensor:
        return torch.randn((*pixels, *ends), generator=g, dtype=torch.float64)

    x = torch.randint(256, (*pixels, channels), generator=g).double() / 127.5 - 1
    ends = (channels, components)
    inputs = [x, normal(components), normal(*ends), normal(*ends) - 3.5]
    return [*inputs, normal(channels * (channels - 1) // 2, components)][: 5 if coeffs else 4]


def leaves(inputs: list[Tensor], dtype: torch.dtype = torch.float64, device: str = "cpu"):
    return [x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]


# --- one distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [2, 3, 32, 256, 1000])
def test_probabilities_of_all_bins_sum_to_one(num_bins, device):
    x = grid(num_bins)[:, None].to(device)
    for mu, log_scale in itertools.product((-40.0, -0.31, 0.0, 0.998), range(-12, 6, 2)):
        m = torch.tensor([mu], dtype=torch.float64, device=device)
        s = torch.tensor([float(log_scale)], dtype=torch.float64, device=device)
        for function in (one_op, reference.discretized_logistic_log_prob):
            total = function(x, m, s, num_bins).exp().sum().item()
            rounding = 2.0**-52 * math.exp(-log_scale)  # of x, where mu is an edge
            assert total == pytest.approx(1.0, abs=1e-12 + rounding), (mu, log_scale)


def given_by(name: str, log_scale: float) -> float:
    """The number that a map makes this scale of."""
    if name == "log_var":
        return 2 * log_scale
    if name == "softplus":  # log(e^scale - 1)
        scale = math.exp(log_scale)
        return scale + math.log(-math.expm1(-scale))
    return math.exp(log_scale) if name == "scale" else log_scale


def exact_scale(name: str, s: float) -> tuple:
    """The scale, and the derivative of its logarithm, in the precision at work."""
    s = mpmath.mpf(s)
    if name == "log_var":
        return mpmath.exp(s / 2), mpmath.mpf(1) / 2
    if name == "log_scale":
        return mpmath.exp(s), mpmath.mpf(1)
    if name == "scale":
        return s, 1 / s
    scale = mpmath.log1p(mpmath.exp(s))
    return scale, -mpmath.expm1(-scale) / scale


def exact(x: float, mu: float, scale, num_bins: int) -> tuple:
    """The value, and its derivatives by mu and log_scale, in 60 digits or more."""
    x, mu = mpmath.mpf(x), mpmath.mpf(mu)
    half, r = mpmath.mpf(1) / (num_bins - 1), 1 / scale
    p, m = (x - mu + half) * r, (x - mu - half) * r

    def sigmoid(t):
        return 1 / (1 + mpmath.exp(-t))

    def log_sigmoid(t):
        return -mpmath.log1p(mpmath.exp(-t))

    if x < half - 1:
        return log_sigmoid(p), -sigmoid(-p) * r, -p * sigmoid(-p)
    if x > 1 - half:
        return log_sigmoid(-m), sigmoid(m) * r, m * sigmoid(m)
    w = p - m
    value = mpmath.log(-mpmath.expm1(-w)) + log_sigmoid(p) + log_sigmoid(-m)
    d_log_scale = m * sigmoid(m) - p * sigmoid(-p) - w / mpmath.expm1(w)
    return value, (sigmoid(m) - sigmoid(-p)) * r, d_log_scale


@pytest.mark.parametrize(
    ("name", "num_bins"), [*((name, 256) for name in MAPS), ("log_scale", 2), ("log_scale", 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_digit_at_any_scale_and_distance(name, dtype, num_bins, device):
    """Every scale meets every distance; the smallest are where a difference of sigmoids is 0.

    An exponential e^-t takes the relative error of t for an absolute one, so where a value or a
    gradient is as small as e^-t, t times the rounding of t is what can be had.
    """
    eps = torch.finfo(dtype).eps
    half = 1 / (num_bins - 1)
    centres = grid(num_bins)
    centres = centres[torch.tensor([0, 1, num_bins // 2, num_bins - 2, num_bins - 1])]
    distances = [
        0.0,
        1e-30,
        1e-5,
        1e-3,
        0.3 * half,
        half,
        1.01 * half,
        1.7 * half,
        0.1,
        1.0,
        30,
        1e4,
    ]
    scales = [-12.0, -9.0, -7.0, -5.5, -4.9, -4.8, -4.0, -3.0, -1.0, 0.0, 2.0, 5.0, 20.0, 80.0]
    rows = [
        (x, x + sign * d, given_by(name, s))
        for x, d, sign, s in itertools.product(centres.tolist(), distances, (1, -1), scales)
    ]
    inputs = torch.tensor(rows, dtype=torch.float64).to(device, dtype).T[..., None]
    x, mu, log_scale = (t.contiguous().requires_grad_() for t in inputs)
    value = one_op(x, mu, log_scale, num_bins, parameterization=name)
    grads = torch.autograd.grad(value.sum(), (x, mu, log_scale))
    assert torch.equal(grads[0], -grads[1])
    columns = [t.detach().flatten().tolist() for t in (x, mu, log_scale, value, *grads[1:])]
    with mpmath.workdps(700 if dtype == torch.float64 else 120):
        for a, b, s, v, d_mu, d_s in zip(*columns, strict=True):
            scale, slope = exact_scale(name, s)
            e_v, e_mu, e_s = exact(a, b, scale, num_bins)
            e_s *= slope
            what = f"x = {a}, mu = {b}, {name} = {s}"
            r = 1 / scale
            reach = (abs(mpmath.mpf(a) - mpmath.mpf(b)) + half) * r  # how many scales it is about
            for got, want, unit in ((v, e_v, 1), (d_mu, e_mu, r), (d_s, e_s, (1 + reach) * slope)):
                size = abs(want / unit)
                smallness = max(1.0, float(-mpmath.log(size))) if size > 0 else 1.0
                bound = 8 * eps * smallness * abs(want) + 4 * torch.finfo(dtype).tiny * (1 + unit)
                if got is d_s:  # its parts cancel where a change of scale changes nothing
                    bound += 4 * eps * min(1, reach) * slope
                assert abs(got - want) <= bound, (what, got, float(want))


def test_pixelcnn_formula_is_off_where_ours_is_not(device):
    """Its floor under log_scale, and the density at the middle in place of a bin's mass."""
    x = grid()[:, None].to(device)

    def total(function, mu: float, log_scale: float) -> float:
        parameters = [
            torch.full((1,), v, dtype=torch.float64, device=device) for v in (mu, log_scale)
        ]
        return function(x, *parameters).exp().sum().item()

    def pixelcnn(*xs):
        return _pixelcnn_bins(*xs).sum(-1)

    narrow = grid()[130].item()  # all of its mass is in one bin
    sure = [torch.tensor([v], dtype=torch.float64, device=device) for v in (narrow, narrow, -9.0)]
    assert one_op(*sure).item() == pytest.approx(-2 * math.exp(-math.exp(9) / 255), rel=1e-9)
    assert pixelcnn(*sure).item() < -0.02  # as if log_scale were -7
    far = [torch.tensor([v], dtype=torch.float64, device=device) for v in (0.5, -0.1, -5.5)]
    with mpmath.workdps(100):
        truth = float(exact(0.5, -0.1, mpmath.exp(far[2].item()), 256)[0])
    assert one_op(*far).item() == pytest.approx(truth, rel=1e-13)
    assert abs(pixelcnn(*far).item() - truth) > 0.1  # nats
    assert total(one_op, 0.3, -6.0) == pytest.approx(1.0, abs=1e-12)
    single = torch.tensor([0.5]), torch.tensor([-0.1]), torch.tensor([-5.5])
    assert one_op(*(t.to(device) for t in single)).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_no_finite_number_makes_a_nan(name, dtype, device):
    """Neither in value nor gradient, up to the largest numbers there are."""
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal
    places = [0.0, tiny, 1 / 255, -1 / 255, 1.0, -1.0, 5.0, 1e20, -1e30, largest, -largest]
    scales = [0.0, -12.0, -88.5, -100.0, -720.0, -1e4, -largest, 12.0, 80.0, 100.0, 720.0, largest]
    if name == "scale":
        scales = [0.0, -0.0, tiny * 2.0**-10, tiny, 1e-30, 1e-3, 1.0, 1e20, largest]
    rows = list(itertools.product(places, places, scales))
    for num_bins in (2, 256):
        inputs = torch.tensor(rows, dtype=torch.float64).to(device, dtype).T[..., None]
        inputs = [t.contiguous().requires_grad_() for t in inputs]
        value = one_op(*inputs, num_bins, parameterization=name)
        assert not value.isnan().any()
        assert (value <= 0).all()
        for grad in torch.autograd.grad(value.sum(), inputs):
            assert not grad.isnan().any()
        x, mu, log_scale = (t.detach().requires_grad_() for t in inputs)  # of all, two components
        ends = [t[:, :, None].expand(-1, -1, 2) for t in (mu, log_scale)]
        logits = torch.zeros_like(x).expand(-1, 2)
        log_prob = mixture(x, logits, *ends, num_bins=num_bins, parameterization=name)
        grads = torch.autograd.grad(log_prob.sum(), (x, mu, log_scale))
        assert not log_prob.isnan().any()
        assert not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_limits_at_infinity(dtype, device):
    def value(x: float, mu: float, log_scale: float, num_bins: int = 256) -> float:
        inputs = [torch.full((1, 1), v, dtype=dtype, device=device) for v in (x, mu, log_scale)]
        expected = reference.discretized_logistic_log_prob(*inputs, num_bins).item()
        actual = one_op(*inputs, num_bins).item()
        assert actual == pytest.approx(expected, rel=1e-6)
        return actual

    assert value(0.5, 0.5, -INF) == 0.0  # a point, in its bin
    assert value(0.5, 0.4, -INF) == -INF
    assert value(-1.0, -7.0, -INF) == 0.0  # the first bin reaches down to -inf
    assert value(0.0, 1.0, -INF, 3) == pytest.approx(-INF)
    assert value(1.0, 0.0, -INF, 2) == pytest.approx(-math.log(2))  # just on the edge
    assert value(0.5, 0.5, INF) == -INF  # spread so far that no bin has any
    assert value(1.0, 0.5, INF) == pytest.approx(-math.log(2))  # and the open ones have all
    assert value(-1.0, 0.5, INF) == pytest.approx(-math.log(2))
    assert value(0.5, INF, 0.0) == value(0.5, -INF, 0.0) == value(-1.0, INF, 0.0) == -INF
    assert value(1.0, INF, 0.0) == value(-1.0, -INF, 0.0) == 0.0
    assert value(INF, 0.0, 0.0) == value(-INF, 0.0, 0.0) == -INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_scale_of_zero_is_a_point_and_a_negative_one_is_no_number(dtype, device):
    """Alone and in a mixture; and an infinite one is what an infinite logarithm gives."""
    x = torch.tensor([0.5, 0.5, -1.0, 1.0], dtype=dtype, device=device)[:, None]
    mu = torch.tensor([0.5, 0.4, -7.0, 0.5], dtype=dtype, device=device)[:, None]

    def values(s: float, name: str) -> list[list[float]]:
        scale = torch.full_like(mu, s)
        both = [
            f(x, mu, scale, parameterization=name)
            for f in (one_op, reference.discretized_logistic_log_prob)
        ]
        logits = torch.zeros_like(mu).expand(-1, 3)
        ends = [t[..., None].expand(-1, 1, 3) for t in (mu, scale)]
        both.append(mixture(x, logits, *ends, parameterization=name))
        return [v.tolist() for v in both]

    for zero in (0.0, -0.0):
        assert all(v == [0.0, -INF, 0.0, -INF] for v in values(zero, "scale"))
    for bad in (-1e-3, -1.0, -INF, math.nan):
        assert all(math.isnan(one) for v in values(bad, "scale") for one in v)
    for name in MAPS:
        for one, wide in zip(values(INF, name), values(INF, "log_scale"), strict=True):
            assert one == pytest.approx(wide, rel=1e-6)
        if name != "scale":
            assert values(-INF, name) == values(-INF, "log_scale")


@pytest.mark.parametrize("name", MAPS)
def test_every_map_gives_the_same_mixture(name, device):
    """Value and gradients, those of the scale by the chain rule; channels first and last."""
    inputs = leaves(draw((40,), 3, 17), device=device)
    expected = mixture(*inputs)
    expected_grads = list(torch.autograd.grad(expected.sum(), inputs))
    given = [given_by(name, v) for v in inputs[3].flatten().tolist()]
    s = torch.tensor(given, dtype=torch.float64, device=device).reshape(inputs[3].shape)
    slopes = [float(exact_scale(name, v)[1]) for v in given]
    expected_grads[3] = expected_grads[3] * torch.tensor(slopes, dtype=s.dtype).to(s).view_as(s)
    for first in (False, True):
        others = leaves([*inputs[:3], s, inputs[4]], device=device)
        if first:
            others = [t.detach().movedim(0, -1).contiguous().movedim(-1, 0) for t in others]
            others = [t.requires_grad_() for t in others]
        actual = mixture(*others, parameterization=name)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(actual.sum(), others)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_bins_are_symmetric(device):
    x = grid().float().to(device)[:, None]
    g = torch.Generator().manual_seed(0)
    mu, log_scale = torch.randn(2, 256, 1, generator=g).to(device)
    assert torch.equal(one_op(x, mu, log_scale - 3), one_op(-x, -mu, log_scale - 3))


def test_beyond_the_range_is_the_open_bin(device):
    """A value a little outside, as augmentation makes them, belongs to the bin at the end."""
    mu, log_scale = torch.zeros(1, device=device), torch.full((1,), -2.0, device=device)
    for x, edge in ((1.01, 1.0), (-1.3, -1.0)):
        far = torch.tensor([x], device=device, requires_grad=True)
        value = one_op(far, mu, log_scale)
        softplus = math.log1p(math.exp((abs(x) - 1 / 255) * math.exp(2)))
        assert value.item() == pytest.approx(-softplus, rel=1e-6), edge


@pytest.mark.parametrize("op", [one_op, mixture])
@pytest.mark.parametrize("num_bins", [1, 0, -256])
def test_wrong_number_of_bins_raises(op, num_bins):
    x = torch.zeros(1, 1)
    inputs = (x, x, x) if op is one_op else (x, x, x[..., None], x[..., None])
    with pytest.raises(ValueError, match=rf"num_bins must be at least 2, got {num_bins}"):
        op(*inputs, num_bins=num_bins)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unknown_parameterization_raises(device):
    x = torch.zeros(1, 1, device=device)
    ends = (x[..., None], x[..., None])
    known = "log_var, log_scale, scale, softplus"
    for function, inputs in ((one_op, (x, x, x)), (mixture, (x, x, *ends))):
        name = f"fastvae::{function.__name__}"
        message = f"^{name}: parameterization must be one of {known}, got stddev"
        with pytest.raises(ValueError, match=message):
            function(*inputs, parameterization="stddev")
        with pytest.raises(ValueError, match=message):
            getattr(reference, function.__name__)(*inputs, parameterization="stddev")


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coeffs", [True, False])
@pytest.mark.parametrize("components", [1, 3, 10, 16, 17, 40])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 17])
def test_any_number_of_channels_and_components(channels, components, coeffs, device):
    inputs = leaves(draw((3, 7), channels, components, coeffs=coeffs), device=device)
    actual, expected = (
        f(*inputs) for f in (mixture, reference.discretized_logistic_mixture_log_prob)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(21.0, device=device).reshape(3, 7) - 4
    for a, e in zip(
        torch.autograd.grad(actual, inputs, weights.double()),
        torch.autograd.grad(expected, inputs, weights.double(), allow_unused=True),
        strict=True,
    ):
        e = torch.zeros_like(a) if e is None else e
        size = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11 * size)


@pytest.mark.parametrize("coeffs", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_gradcheck_of_channels(channels, coeffs, device):
    inputs = leaves(draw((2,), channels, 2, coeffs=coeffs and channels > 1), device=device)
    assert torch.autograd.gradcheck(mixture, inputs)
    assert torch.autograd.gradgradcheck(mixture, inputs, fast_mode=True)


def test_one_component_is_a_row_of_logistics(device):
    x, _, mu, log_scale = draw((50,), 33, 1, coeffs=False)
    inputs = [t.float().to(device) for t in (x, torch.randn(50, 1), mu, log_scale)]
    expected = one_op(inputs[0], inputs[2][..., 0], inputs[3][..., 0])
    torch.testing.assert_close(mixture(*inputs), expected, rtol=1e-6, atol=0)


def test_other_bins(device):
    x, *rest = (t.to(device) for t in draw((40,), 3, 5))
    x = ((x + 1) * 15.5).round() / 15.5 - 1
    expected = reference.discretized_logistic_mixture_log_prob(x, *rest, num_bins=32)
    torch.testing.assert_close(mixture(x, *rest, num_bins=32), expected)
    single = mixture(*(t.float() for t in (x, *rest)), num_bins=32)
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


def test_all_colours_of_few_bins_sum_to_one(device):
    """Whatever the coefficients: the channels are conditioned in order."""
    values = grid(9)
    x = torch.cartesian_prod(values, values, values).to(device)
    inputs = [t.to(device).expand(729, *t.shape[1:]) for t in draw((1,), 3, 4)[1:]]
    total = mixture(x, *inputs, num_bins=9).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_confident_mixtures_keep_their_digits(device):
    """As trained ones are: scales below a bin's width, where a clamp of log_scale would bind."""
    x, logits, mu, log_scale, coeffs = draw((2000,), 3, 10)
    mu = x[..., None] + 0.01 * mu  # mostly without a lean
    inputs = [x, 3 * logits, mu, log_scale - 3, 1e-2 * coeffs]
    single = leaves(inputs, torch.float32, device)
    doubles = leaves(single, torch.float64, device)
    actual = mixture(*single)
    expected = reference.discretized_logistic_mixture_log_prob(*doubles)
    # the rounding of x - mean, of 2^-24 here, counts in units of the scale
    slack = (2.0**-24 * (-doubles[3]).exp().amax((-1, -2))).detach()
    assert ((actual.double() - expected).abs() <= 2e-6 * (1 + expected.abs()) + slack).all()


def test_logits_may_be_shifted(device):
    inputs = [t.float().to(device) for t in draw((100,), 3, 10)]
    expected = mixture(*inputs)
    inputs[1] = (inputs[1] * 64).round() / 64  # exact when shifted
    expected = mixture(*inputs)
    inputs[1] = inputs[1] + 4096.0
    assert torch.equal(mixture(*inputs), expected)


# --- memory ---------------------------------------------------------------------------------------


def split(out: Tensor, channels: int, components: int) -> list[Tensor]:
    """A network's output, channels last, as PixelCNN++ lays it out."""
    logits, rest = out.split([components, out.shape[-1] - components], -1)
    parts = rest.unflatten(-1, (channels, -1)).chunk(3, -1)
    return [logits, *parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_slices_of_a_network_output(first, dtype, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2, 3, 9, 7), generator=g).double() / 127.5 - 1
    out = torch.randn(2, 100, 9, 7, generator=g, dtype=torch.float64) - 1
    x, out = x.to(device, dtype), out.to(device, dtype)
    out = out if first else out.permute(0, 2, 3, 1).contiguous()
    out.requires_grad_()
    last = out.permute(0, 2, 3, 1) if first else out
    inputs = [x.permute(0, 2, 3, 1), *split(last, 3, 10)]
    plain = [t.detach().contiguous().requires_grad_() for t in inputs]
    value, expected = mixture(*inputs), mixture(*plain)
    assert torch.equal(value, expected)
    weights = torch.rand(value.shape, generator=g).to(value)
    grads = torch.autograd.grad(value, inputs[1:], weights, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(expected, plain[1:], weights), strict=True):
        assert torch.equal(a, b)
    for grad, t in zip(grads, inputs[1:], strict=True):  # lies as its input does, and dense
        order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
        assert grad.permute(order).is_contiguous()
    (whole,) = torch.autograd.grad(value, out, weights)
    joined = torch.cat([grads[0], torch.cat(grads[1:], -1).flatten(-2)], -1)
    assert torch.equal(whole.permute(0, 2, 3, 1) if first else whole, joined)


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_nothing_but_gradients_is_allocated(first):
    """Not a copy of the slices, nor pixels x channels x components of anything."""
    from torch.profiler import ProfilerActivity, profile

    out = torch.randn(8, 100, 32, 32)
    last = out.permute(0, 2, 3, 1) if first else out.permute(0, 2, 3, 1).contiguous()
    x = torch.randint(256, (8, 32, 32, 3)) / 127.5 - 1
    inputs = [t.detach().requires_grad_() for t in split(last, 3, 10)]
    pixels = 8 * 32 * 32

    def peak(run) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = run()
        held = most = 0
        events = profiler.profiler.kineto_results.events()
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        del results
        return most

    assert peak(lambda: mixture(x, *(t.detach() for t in inputs))) <= 4 * pixels + 1024
    log_prob = mixture(x, *inputs)
    weights = torch.ones_like(log_prob)
    most = peak(lambda: torch.autograd.grad(log_prob, inputs, weights, retain_graph=True))
    assert 4 * pixels * 100 <= most <= 4 * pixels * 101 + 4096


PIXEL_SHAPES = [(4, 33), (33,), (1,), (), (5, 1, 1), (6, 1, 33), (1, 4, 1), (6, 4, 33)]


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("pixels", PIXEL_SHAPES[:4] + PIXEL_SHAPES[5:], ids=str)
def test_broadcast_over_pixels(pixels, which, device):
    """x, or any other, is shared by samples or by pixels; its gradient is the sum."""
    small = draw((6, 4, 33), 3, 5)
    small[which] = draw(pixels, 3, 5, seed=1)[which]
    ends = zip(small, (1, 1, 2, 2, 2), strict=True)
    full = [t.expand(6, 4, 33, *t.shape[t.dim() - own :]) for t, own in ends]
    small, full = leaves(small, device=device), leaves(full, device=device)
    value, expected = mixture(*small), mixture(*full)
    assert torch.equal(value, expected)
    weights = torch.arange(value.numel(), device=device).reshape(value.shape) % 7 - 2.5
    grads = torch.autograd.grad(value, small, weights.double())
    for a, b in zip(grads, torch.autograd.grad(expected, full, weights.double()), strict=True):
        torch.testing.assert_close(a, b.sum_to_size(a.shape), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_in_more_ways_than_can_be_walked(dtype, device):
    """Six dimensions of pixels, each input with its own order: copied, and right."""
    g = torch.Generator().manual_seed(0)
    inputs = [t.to(device, dtype) for t in draw((2, 3, 2, 3, 2, 2), 3, 4)]
    plain = [t.clone().requires_grad_() for t in inputs]
    turned = []
    for t in inputs:
        order = torch.randperm(t.dim(), generator=g).tolist()
        back = [order.index(d) for d in range(t.dim())]
        turned.append(t.permute(order).contiguous().permute(back).requires_grad_())
    value, expected = mixture(*turned), mixture(*plain)
    assert torch.equal(value, expected)
    for a, b in zip(
        torch.autograd.grad(value.sum(), turned),
        torch.autograd.grad(expected.sum(), plain),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_compiled_with_slices_for_many_batch_sizes(first, device):
    """Strides of gradients are what the compiler was told; under dynamic shapes one graph."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(x, out):
        last = out.permute(0, 2, 3, 1) if first else out
        return mixture(x, *split(last, 3, 4)).sum()

    for batch in (2, 3, 5):
        g = torch.Generator().manual_seed(batch)
        x = (torch.randint(256, (batch, 6, 5, 3), generator=g) / 127.5 - 1).to(device)
        shape = (batch, 40, 6, 5) if first else (batch, 6, 5, 40)
        out = torch.randn(shape, generator=g).to(device).requires_grad_()
        (actual,) = torch.autograd.grad(step(x, out), out)
        last = out.permute(0, 2, 3, 1) if first else out
        (expected,) = torch.autograd.grad(mixture(x, *split(last, 3, 4)).sum(), out)
        torch.testing.assert_close(actual, expected)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_components_no_channels_no_pixels(dtype, device):
    inputs = leaves(draw((3,), 3, 0), dtype, device)
    out = mixture(*inputs)
    assert torch.equal(out, torch.full((3,), -INF, dtype=dtype, device=device))
    grads = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(grads[0], torch.zeros_like(inputs[0]))
    inputs = leaves(draw((3,), 0, 4), dtype, device)  # of nothing, every mixture is sure
    out = mixture(*inputs)
    torch.testing.assert_close(out, torch.zeros_like(out))
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads[1], torch.zeros_like(grads[1]))
    assert mixture(*leaves(draw((0, 4), 3, 5), dtype, device)).shape == (0, 4)


def test_a_weight_of_zero_leaves_the_component_out(device):
    inputs = [t.to(device) for t in draw((20,), 3, 7)]
    inputs[1][:, ::3] = -INF
    keep = torch.arange(7, device=device) % 3 > 0
    inputs, fewer = leaves(inputs, device=device), [t[..., keep] for t in inputs[1:]]
    fewer = leaves([inputs[0], *fewer], device=device)
    out, expected = mixture(*inputs), mixture(*fewer)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), inputs),
        torch.autograd.grad(expected.sum(), fewer),
        strict=True,
    ):
        torch.testing.assert_close(a[..., keep] if a.shape != b.shape else a, b)
        assert not (a.shape != b.shape and a[..., ~keep].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_probability_is_minus_infinity_with_zero_gradient(dtype, device):
    """A pixel out of reach of every component; its neighbours do not notice."""
    inputs = draw((20,), 3, 5, coeffs=False)
    inputs[0][7] = 0.0
    inputs[3][7], inputs[2][7] = -1e4, 1.0  # a point elsewhere
    inputs = leaves(inputs, dtype, device)
    out = mixture(*inputs)
    assert out.isneginf().tolist() == [i == 7 for i in range(20)]
    rest = [i for i in range(20) if i != 7]
    others = leaves([t[rest] for t in inputs], dtype, device)
    expected = torch.autograd.grad(mixture(*others).sum(), others)
    for grad, e in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        assert torch.equal(grad[7], torch.zeros_like(grad[7]))
        assert torch.equal(grad[rest], e)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("which", range(5))
def test_a_bad_number_spoils_the_gradient_of_its_own_pixel_only(bad, which, device):
    inputs = leaves(draw((40,), 3, 10), torch.float32, device)
    clean = torch.autograd.grad(mixture(*inputs).sum(), inputs)
    spoilt = leaves(inputs, torch.float32, device)
    with torch.no_grad():
        spoilt[which][11].view(-1)[1] = bad
    grads = torch.autograd.grad(mixture(*spoilt).sum(), spoilt)
    others = torch.arange(40, device=device) != 11
    for a, b in zip(grads, clean, strict=True):
        assert torch.equal(a[others], b[others])


def test_vmap_and_jvp_without_coefficients(device):
    inputs = [t.to(device) for t in draw((4, 5), 2, 3, coeffs=False)]
    expected = mixture(*inputs)
    torch.testing.assert_close(torch.func.vmap(mixture)(*inputs), expected)
    tangents = tuple(torch.ones_like(t) for t in inputs)
    _, tangent = torch.func.jvp(mixture, tuple(inputs), tangents)
    grads = torch.autograd.grad(mixture(*(x := leaves(inputs, device=device))).sum(), x)
    torch.testing.assert_close(tangent.sum(), sum(g.sum() for g in grads))


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    ({"mu": (3,)}, r"mu must have shape \[\.\.\., C, K\] .*, got \[3\] and \[4, 3\], \[4, 5\]"),
    ({"mu": (4, 5, 3)}, r"mu must have shape .*, got \[4, 5, 3\] and"),
    ({"log_scale": (4, 3, 1)}, r"log_scale must have shape .*, got \[4, 3, 1\] and"),
    ({"coeffs": (4, 2, 5)}, r"coeffs must have shape \[\.\.\., C \(C - 1\) / 2, K\] .*, got"),
    (
        {"mu": (7, 3, 5)},
        r"mu must broadcast with x over the pixels, got \[7, 3, 5\] and \[4, 3\]",
    ),
    ({"logits": (2, 5)}, r"logits must broadcast with x over the pixels, got \[2, 5\] and"),
]


@pytest.mark.parametrize(("shapes", "message"), ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shapes_raise(shapes, message, device):
    right = {"x": (4, 3), "logits": (4, 5), "mu": (4, 3, 5), "log_scale": (4, 3, 5)}
    inputs = {name: torch.zeros(s, device=device) for name, s in {**right, **shapes}.items()}
    with pytest.raises(
        ValueError, match=f"fastvae::discretized_logistic_mixture_log_prob: {message}"
    ):
        mixture(**inputs)


def test_wrong_normalisers_raise():
    inputs = [t.float() for t in draw((4,), 3, 5)]
    kept, grad, wanted = torch.zeros(4, 3), torch.ones(4), [True] * 5
    backward = torch.ops.fastvae.discretized_logistic_mixture_log_prob_backward
    with pytest.raises(
        ValueError, match=r"kept must be what forward kept, got \[4, 3\] and \[4, 3\]"
    ):
        backward(grad, *inputs, kept, 256, "log_scale", wanted)
