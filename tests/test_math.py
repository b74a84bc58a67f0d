"""Numbers at the edge: accuracy where the textbook formula loses it, +inf and never NaN beyond."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

import fastvae

# What float64 is held against: 64 bits of mantissa, where the processor has them.
DTYPES = [
    torch.float32,
    pytest.param(
        torch.float64,
        marks=pytest.mark.skipif(
            np.finfo(np.longdouble).nmant < 63, reason="no type here is wider than float64"
        ),
    ),
]
TWO_PI = np.longdouble("6.283185307179586476925")


def wide(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """x in a type with eleven bits more, or more."""
    x = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x
    return x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)


def ulps(actual: torch.Tensor | np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|actual - exact| in units in the last place of actual's type at exact."""
    actual = np.asarray(actual)
    with np.errstate(invalid="ignore", over="ignore"):
        spacing = np.spacing(np.abs(exact).astype(actual.dtype))
        return np.nan_to_num(np.abs(actual - exact) / spacing)


def expm1_minus(x: np.ndarray) -> np.ndarray:
    """e^x - 1 - x, by series near 0."""
    near = np.abs(x) < 1
    series, term = np.zeros_like(x[near]), x[near] ** 2 / 2
    for k in range(3, 30):
        series, term = series + term, term * x[near] / k
    exact = np.expm1(x) - x
    exact[near] = series
    return exact


def log_vars(dtype: torch.dtype) -> torch.Tensor:
    """[-30, 80] densely, and every magnitude down to 1e-12 on both sides of 0."""
    tiny = torch.logspace(-12, 1.4, 400_000, dtype=dtype)
    line = torch.linspace(-30, 80, 2_000_003, dtype=dtype)
    return torch.cat([line, tiny, -tiny, torch.zeros(1, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_terms_are_within_4_ulp_and_never_negative(dtype, device):
    log_var = log_vars(dtype).to(device)
    mu = torch.zeros_like(log_var)
    kl = fastvae.gaussian_kl(mu[:, None], log_var[:, None]).cpu()
    exact = expm1_minus(wide(log_var)) / 2
    assert (kl >= 0).all()
    assert ulps(kl, exact).max() <= 4

    g = torch.Generator().manual_seed(0)
    mu = torch.randn(log_var.shape, generator=g, dtype=dtype).to(device)
    exact += wide(mu) ** 2 / 2
    kl = fastvae.gaussian_kl(mu[:, None], log_var[:, None]).cpu()
    assert ulps(kl, exact).max() <= 4
    _z, fused = fastvae.reparameterize_kl(
        mu[:, None], log_var[:, None], key=fastvae.random.key(0, device=device)
    )
    assert ulps(fused.cpu(), exact).max() <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_gradient_of_log_var_is_accurate_near_0(dtype, device):
    log_var = log_vars(dtype).to(device).requires_grad_()
    for function in (
        lambda v: fastvae.gaussian_kl(torch.zeros_like(v), v),
        lambda v: fastvae.reparameterize_kl(torch.zeros_like(v), v)[1],
    ):
        (grad,) = torch.autograd.grad(function(log_var[:, None]).sum(), log_var)
        assert ulps(grad.cpu(), np.expm1(wide(log_var)) / 2).max() <= 4


def test_row_sums_are_accurate_to_3e_7(device):
    g = torch.Generator().manual_seed(0)
    for columns in (1, 7, 64, 513, 10_000, 1_000_000):
        rows = max(2, 2_000_000 // columns)
        mu = torch.randn(rows, columns, generator=g).to(device)
        log_var = torch.randn(rows, columns, generator=g).to(device)
        for kl in (
            fastvae.gaussian_kl(mu, log_var),
            fastvae.reparameterize_kl(mu, log_var)[1],
        ):
            exact = fastvae.reference.gaussian_kl(mu.double(), log_var.double())
            assert ((kl.double() - exact) / exact).abs().max() <= 3e-7, columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_between_near_equal_gaussians(dtype, device):
    """delta = log_var_q - log_var_p is exact here, and the KL keeps its digits."""
    log_var_p = torch.ones(100_000, 1, dtype=dtype, device=device)
    delta = torch.logspace(-6, -1, 100_000, dtype=dtype, device=device)
    log_var_q = log_var_p + delta[:, None]
    mu = torch.zeros_like(log_var_p)
    kl = fastvae.gaussian_kl(mu, log_var_q, mu, log_var_p)
    exact = expm1_minus(wide(log_var_q) - wide(log_var_p))[:, 0] / 2
    assert (kl > 0).all()
    assert ulps(kl.cpu(), exact).max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kl_past_the_range_of_exp_is_inf_not_nan(dtype, device):
    """torch.distributions: gradient -inf from -90, KL inf from -104, NaN from 89 (float32)."""
    float32 = -104.0, -90.0, 88.5, 88.7, 89.0, 104.0
    float64 = -746.0, -709.0, 709.5, 709.9, 711.0, 746.0
    for log_var in (*float32, *float64, -6e4, -1500.0, -300.0, 300.0, 1500.0, 6e4):
        x = torch.full((1, 1), log_var, dtype=dtype, device=device, requires_grad=True)
        value = x.detach().double().item()
        exact = 0.5 * (np.expm1(np.longdouble(value)) - value)
        expected = float(exact.astype(np.float64 if dtype == torch.float64 else np.float32))
        for kl in (
            fastvae.gaussian_kl(torch.zeros_like(x), x),
            fastvae.reparameterize_kl(torch.zeros_like(x), x)[1],
        ):
            (grad,) = torch.autograd.grad(kl.sum(), x)
            assert kl.item() == pytest.approx(expected, rel=1e-5)
            assert not grad.isnan().any()
            if log_var < 0:
                assert grad.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_at_zero_variance_is_inf_not_nan(dtype, device):
    for log_var in (-100.0, -177.0, -200.0, -1419.0, -1421.0, -1e4, -math.inf):
        v = torch.full((1, 1), log_var, dtype=dtype, device=device)
        x = torch.ones(1, 1, dtype=dtype, device=device)
        assert fastvae.gaussian_log_prob(x, x - 1, v).item() < -1e37
        assert fastvae.gaussian_log_prob(x, x, v).item() > 40


def test_continuous_bernoulli_keeps_its_digits_around_one_half(device):
    """logit -> 0 is lambda -> 1/2, where log C(lambda) is log 2 + O(logit^2)."""
    sizes = torch.cat([torch.logspace(-30, 2, 4001), torch.tensor([0.99, 1.0, 1.01])])
    logits = torch.cat([sizes, -sizes]).to(device)[:, None].requires_grad_()
    exact = logits.detach().double().cpu().numpy().astype(np.longdouble)
    for x in (0.0, 0.3, 1.0):
        value = fastvae.continuous_bernoulli_log_prob(torch.full_like(logits, x), logits)
        (grad,) = torch.autograd.grad(value.sum(), logits)
        a, p = exact, np.longdouble(np.float32(x))
        far = np.abs(a) > 1e-3
        big = np.where(far, a, 1.0)
        log_c = np.where(far, np.log(np.expm1(big) / big), a / 2 + a**2 / 24 - a**4 / 2880)
        mean = np.where(far, 1 / -np.expm1(-big) - 1 / big, 0.5 + a / 12 - a**3 / 720)
        error = np.abs(value.detach().cpu().numpy()[:, None] - (p * a - log_c))
        assert (error <= 2e-7 * (np.abs(p * a) + np.abs(log_c))).all()
        error = np.abs(grad.cpu().numpy() - (p - mean))
        assert (error <= 5e-7 * (p + mean)).all()


COUNTS = (0, 0.3, 1, 2, 3, 7, 7.5, 8, 9, 100, 1000, 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mu", [1e-3, 0.5, 3.0, 90.0, 1e4])
def test_counts_keep_their_digits_from_no_dispersion_to_much(mu, dtype, device):
    """theta up to 1e6: lgamma(x + theta) - lgamma(theta) in float32 would be noise."""
    rtol = 2e-6 if dtype == torch.float32 else 1e-14
    x = torch.tensor(COUNTS, dtype=dtype, device=device)[:, None]
    with mpmath.workdps(40):
        counts = [mpmath.mpf(t) for t in x[:, 0].tolist()]
        for size in (1e-3, 0.1, 1.0, 3.7, 10.0, 100.0, 1e4, 1e6):
            m = torch.full_like(x, mu).requires_grad_()
            theta = torch.full_like(x, size).requires_grad_()
            value = fastvae.negative_binomial_log_prob(x, m, theta)
            grads = torch.autograd.grad(value.sum(), (m, theta))
            a, b = mpmath.mpf(m[0].item()), mpmath.mpf(theta[0].item())
            for i, t in enumerate(counts):
                term = mpmath.loggamma(t + b) - mpmath.loggamma(b) - mpmath.loggamma(t + 1)
                term += b * mpmath.log(b / (b + a)) + t * mpmath.log(a / (b + a))
                d_mu = t / a - (t + b) / (a + b)
                d_theta = mpmath.digamma(t + b) - mpmath.digamma(b) - (t + b) / (a + b)
                d_theta += mpmath.log(b / (b + a)) + 1
                what = f"x = {t}, mu = {mu}, theta = {size}"
                assert value[i].item() == pytest.approx(float(term), rel=rtol), what
                assert grads[0][i].item() == pytest.approx(float(d_mu), rel=rtol), what
                # its two halves, of the counts and of their mean, cancel where x is near mu
                parts = float(abs(d_mu * d_mu) / b + abs(t + a) / b**2)
                assert abs(grads[1][i].item() - d_theta) <= 1e2 * rtol * (abs(d_theta) + parts), (
                    what
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_keeps_its_digits_at_the_rate(dtype, device):
    rtol = 2e-6 if dtype == torch.float32 else 1e-14
    with mpmath.workdps(40):
        for count in COUNTS:
            x = torch.full((9, 1), count, dtype=dtype, device=device)
            around = torch.log(x + 0.1) + torch.linspace(-1, 1, 9, device=device)[:, None] * 0.3
            log_rate = around.to(dtype).requires_grad_()
            value = fastvae.poisson_log_prob(x, log_rate)
            (grad,) = torch.autograd.grad(value.sum(), log_rate)
            columns = value.tolist(), grad[:, 0].tolist(), log_rate[:, 0].tolist()
            for v, g, rate in zip(*columns, strict=True):
                t, r = mpmath.mpf(x[0].item()), mpmath.mpf(rate)
                exact = t * r - mpmath.exp(r) - mpmath.loggamma(t + 1)
                # the rate itself is good to an ulp of its logarithm
                slack = abs(t - mpmath.exp(r)) * abs(r) * torch.finfo(dtype).eps
                assert abs(v - exact) <= rtol * abs(exact) + slack
                assert abs(g - (t - mpmath.exp(r))) <= 2 * rtol * (t + mpmath.exp(r))


def test_zeros_of_counts(device):
    """x = 0, where most of a single-cell matrix lies, with gradients; against float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(200, 50)
    inputs = [torch.randn(200, 50, generator=g).exp().double() for _ in range(2)]
    inputs.append(3.0 * torch.randn(200, 50, generator=g).double())
    for op, names in (
        ("poisson_log_prob", (2,)),
        ("negative_binomial_log_prob", (0, 1)),
        ("zero_inflated_negative_binomial_log_prob", (0, 1, 2)),
    ):
        exact = [t.to(device).requires_grad_() for t in (x.double(), *(inputs[i] for i in names))]
        single = [t.detach().float().requires_grad_() for t in exact]
        expected = getattr(fastvae.reference, op)(*exact)
        actual = getattr(fastvae, op)(*single)
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=0)
        for a, e in zip(
            torch.autograd.grad(actual.sum(), single),
            torch.autograd.grad(expected.sum(), exact),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), e, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_out_of_range_are_nan_and_impossible_ones_minus_infinity(dtype, device):
    def value(op, *arguments):
        tensors = [torch.tensor([[a]], dtype=dtype, device=device) for a in arguments]
        return getattr(fastvae, op)(*tensors).item()

    for bad in ((-1.0, 0.0), (math.inf, 0.0), (math.nan, 0.0), (1.0, math.nan)):
        assert math.isnan(value("poisson_log_prob", *bad))
    assert value("poisson_log_prob", 0.0, -math.inf) == 0.0
    assert value("poisson_log_prob", 2.0, -math.inf) == -math.inf
    assert value("poisson_log_prob", 2.0, math.inf) == -math.inf
    op = "negative_binomial_log_prob"
    for bad in ((-1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, math.inf)):
        assert math.isnan(value(op, *bad))
    assert value(op, 0.0, 0.0, 1.0) == 0.0
    assert value(op, 3.0, 0.0, 1.0) == -math.inf
    zero_inflated = "zero_inflated_negative_binomial_log_prob"
    assert value(zero_inflated, 0.0, 1.0, 1.0, math.inf) == 0.0
    assert value(zero_inflated, 3.0, 1.0, 1.0, math.inf) == -math.inf
    assert value(zero_inflated, 3.0, 1.0, 1.0, -math.inf) == pytest.approx(value(op, 3.0, 1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [0.0, 1e-8, 20.0, 88.0, 104.0, 708.0, 746.0, 1e4, math.inf])
def test_bernoulli_far_out(logit, dtype, device):
    """A certain and right bet costs e^-|l|; a certain and wrong one |l|."""
    for sign in (1, -1):
        logits = torch.full((1, 1), sign * logit, dtype=dtype, device=device)
        right = torch.full((1, 1), float(sign > 0), dtype=dtype, device=device)
        cost = -math.log1p(math.exp(-logit))
        value = fastvae.bernoulli_log_prob(right, logits).item()
        assert value == pytest.approx(cost, rel=2e-6, abs=1e-44 if dtype == torch.float32 else 0)
        value = fastvae.bernoulli_log_prob(1 - right, logits).item()
        assert value == pytest.approx(-logit + cost, rel=2e-6)


def test_bernoulli_gradient_at_exactly_0(device):
    """Freshly initialised decoders give logits of exactly 0, where |l| has no derivative."""
    logits = torch.zeros(1, 4, device=device, requires_grad=True)
    x = torch.tensor([[0.0, 1.0, 0.25, 0.5]], device=device)
    for function in (fastvae.bernoulli_log_prob, fastvae.reference.bernoulli_log_prob):
        (grad,) = torch.autograd.grad(function(x, logits).sum(), logits)
        assert torch.equal(grad, x - 0.5)


def test_half_types_survive_every_value(device):
    """All 65536 bit patterns go in and come out as torch rounds them: mu + 0 * eps."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        mu = bits.view(dtype).to(device)
        z = fastvae.reparameterize(mu, torch.full_like(mu, -math.inf))
        finite = mu.isfinite()
        assert torch.equal(z[finite], mu[finite])
        assert torch.equal(z.isnan(), mu.isnan())
        assert torch.equal(z.isinf(), mu.isinf())


def test_half_types_round_to_nearest_even(device):
    """The kernel's rounding from float32 against torch's: grad_z times 1/2 e^{log_var / 2} eps."""
    key = fastvae.random.key(0, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        mu = torch.zeros(1 << 18, dtype=dtype, device=device)
        log_var = torch.linspace(-60, 24, 1 << 18, device=device).to(dtype)
        z = fastvae.reparameterize(mu, log_var, key=key)
        exact = fastvae.reparameterize(mu.float(), log_var.float(), key=key)
        assert torch.equal(z, exact.to(dtype))


def half_expm1_minus(x: np.ndarray) -> np.ndarray:
    return expm1_minus(x) / 2


def sin_turn(u: np.ndarray) -> np.ndarray:
    return np.sin(TWO_PI.astype(u.dtype) * u)


def cos_turn(u: np.ndarray) -> np.ndarray:
    return np.cos(TWO_PI.astype(u.dtype) * u)


def tanh_slope(x: np.ndarray) -> np.ndarray:
    return 1 / np.cosh(x) ** 2


# what it is, its range in float32 and float64, and the bound
RANGES = {
    "exp": (np.exp, (-103, 88.7), (-745, 709.7), 1.5),
    "exp_nonpositive": (np.exp, (-103, 0), (-745, 0), 1.5),
    "exp_weight": (np.exp, (-87, 88), (-708, 709), 1.5),
    "decay.value": (lambda x: np.exp(-x), (0, 87), (0, 708), 1.5),
    "decay.loss": (lambda x: -np.expm1(-x), (0, 200), (0, 1500), 2),
    "tanh.value": (np.tanh, (-60, 60), (-400, 400), 3.2),
    "tanh.slope": (tanh_slope, (-43, 43), (-353, 353), 5),
    "half_expm1": (lambda x: np.expm1(x) / 2, (-103, 88.7), (-745, 710), 2),
    "half_expm1_minus": (half_expm1_minus, (-103, 88.7), (-745, 710), 3.2),
    "half_exp.exp_half": (lambda x: np.exp(x / 2), (-173, 177), (-1415, 1419), 2),
    "half_exp.half_expm1": (lambda x: np.expm1(x) / 2, (-200, 88.7), (-1500, 710), 3),
    "half_exp.half_expm1_minus": (half_expm1_minus, (-200, 88.7), (-1500, 710), 4),
    "log": (np.log, (2.0**-149, 3.4e38), (2.0**-1074, 1.7e308), 2),
    "log_normal": (np.log, (2.0**-33, 1), (2.0**-33, 1), 2),
    "log1p_unit": (np.log1p, (0, 1), (0, 1), 2),
    "sin_turn": (sin_turn, (0, 0.125), (0, 0.125), 2),
    "cos_turn": (cos_turn, (0, 0.125), (0, 0.125), 2),
}

needs_probe = pytest.mark.skipif(
    not fastvae.build_info()["compiled"], reason="no compiled module to probe"
)


@needs_probe
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANGES)
def test_stated_ulp_bounds(name, dtype):
    """Each bound that csrc/math.h states, on a dense grid and on every magnitude near the edges."""
    function, *ranges, bound = RANGES[name]
    low, high = ranges[dtype == torch.float64]
    near = np.logspace(-16, 0, 300_000)
    line, common = np.linspace(low, high, 3_000_001), np.linspace(-2, 2, 1_000_001)
    x = np.concatenate([line, common, high - near, low + near, near, -near])
    x = x.astype(np.float64 if dtype == torch.float64 else np.float32)
    x = x[(x >= low) & (x <= high)]
    exact = function(wide(x))
    error = ulps(fastvae._load.module.math(name, x), exact)
    # below, an ulp is a constant, and rounding happens twice
    normal = np.abs(exact) >= np.finfo(x.dtype).tiny
    assert error[normal].max() <= bound
    assert error.max() <= 2 * bound


@needs_probe
@pytest.mark.parametrize("dtype", DTYPES)
def test_turns_beyond_an_eighth(dtype):
    u = torch.linspace(0, 1, 1_000_001, dtype=dtype).numpy()
    for name, function in (("sin_turn", sin_turn), ("cos_turn", cos_turn)):
        error = fastvae._load.module.math(name, u) - function(wide(u))
        assert np.abs(error).max() <= np.finfo(u.dtype).eps


@needs_probe
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_at_the_ends(dtype):
    """Past every range, at infinity, at 0 of both signs, and NaN."""
    x = np.array([-math.inf, -3e38, 3e38, math.inf, 0.0, -0.0, math.nan, -math.nan], dtype)
    nan = [math.nan, math.nan]
    expected = {
        "exp": [0, 0, math.inf, math.inf, 1, 1, *nan],
        "tanh.value": [-1, -1, 1, 1, 0, 0, *nan],
        "tanh.slope": [0, 0, 0, 0, 1, 1, *nan],
        "half_expm1": [-0.5, -0.5, math.inf, math.inf, 0, 0, *nan],
        "half_expm1_minus": [math.inf, -x[1] / 2, math.inf, math.inf, 0, 0, *nan],
        "half_exp.exp_half": [0, 0, math.inf, math.inf, 1, 1, *nan],
    }
    for name in ("half_expm1", "half_expm1_minus"):
        expected[f"half_exp.{name}"] = expected[name]
    for name, values in expected.items():
        actual = fastvae._load.module.math(name, x)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, np.array(values, dtype), err_msg=name)


@needs_probe
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decay_at_the_ends(dtype):
    x = np.array([0.0, -0.0, 3e38, math.inf, math.nan], dtype)
    for name, values in (("value", [1, 1, 0, 0, math.nan]), ("loss", [0, 0, 1, 1, math.nan])):
        actual = fastvae._load.module.math(f"decay.{name}", x)
        np.testing.assert_array_equal(actual, np.array(values, dtype), err_msg=name)
