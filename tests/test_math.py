"""Numbers at the edge: accuracy where the textbook formula loses it, +inf and never NaN beyond."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastvae


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|actual - exact| in units in the last place of float32 at exact."""
    rounded = exact.float().abs()
    spacing = torch.nextafter(rounded, torch.tensor(math.inf)) - rounded
    return ((actual.double() - exact).abs() / spacing.double()).nan_to_num(0.0)


def expm1_minus(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 - x in float64, by series near 0."""
    series, term = torch.zeros_like(x), x * x / 2
    for k in range(3, 30):
        series, term = series + term, term * x / k
    return torch.where(x.abs() < 1, series, torch.expm1(x) - x)


def log_vars() -> torch.Tensor:
    """[-30, 80] densely, and every magnitude down to 1e-12 on both sides of 0."""
    tiny = torch.logspace(-12, 1.4, 400_000)
    return torch.cat([torch.linspace(-30, 80, 2_000_003), tiny, -tiny, torch.zeros(1)])


def test_kl_terms_are_within_4_ulp_and_never_negative(device):
    log_var = log_vars().to(device)
    mu = torch.zeros_like(log_var)
    kl = fastvae.gaussian_kl(mu[:, None], log_var[:, None]).cpu()
    exact = 0.5 * expm1_minus(log_var.double().cpu())
    assert (kl >= 0).all()
    assert ulps(kl, exact).max() <= 4

    g = torch.Generator().manual_seed(0)
    mu = torch.randn(log_var.shape, generator=g).to(device)
    kl = fastvae.gaussian_kl(mu[:, None], log_var[:, None]).cpu()
    assert ulps(kl, exact + 0.5 * mu.double().cpu().square()).max() <= 4
    _z, fused = fastvae.reparameterize_kl(
        mu[:, None], log_var[:, None], key=fastvae.random.key(0, device=device)
    )
    assert ulps(fused.cpu(), exact + 0.5 * mu.double().cpu().square()).max() <= 4


def test_kl_gradient_of_log_var_is_accurate_near_0(device):
    log_var = log_vars().to(device).requires_grad_()
    for function in (
        lambda v: fastvae.gaussian_kl(torch.zeros_like(v), v),
        lambda v: fastvae.reparameterize_kl(torch.zeros_like(v), v)[1],
    ):
        (grad,) = torch.autograd.grad(function(log_var[:, None]).sum(), log_var)
        exact = 0.5 * torch.expm1(log_var.detach().double())
        assert ulps(grad.cpu(), exact.cpu()).max() <= 4


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


def test_kl_between_near_equal_gaussians(device):
    """delta = log_var_q - log_var_p is exact in float32 here, and the KL keeps its digits."""
    log_var_p = torch.ones(100_000, 1, device=device)
    log_var_q = log_var_p + torch.logspace(-6, -1, 100_000, device=device)[:, None]
    mu = torch.zeros_like(log_var_p)
    kl = fastvae.gaussian_kl(mu, log_var_q, mu, log_var_p)
    exact = 0.5 * expm1_minus((log_var_q.double() - log_var_p.double()).cpu()).squeeze(1)
    assert (kl > 0).all()
    assert ulps(kl.cpu(), exact).max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kl_past_the_range_of_exp_is_inf_not_nan(dtype, device):
    """torch.distributions: gradient -inf from -90, KL inf from -104, NaN from 89 (float32)."""
    for log_var in (-1000.0, -300.0, -104.0, -90.0, 88.5, 88.7, 89.0, 104.0, 300.0, 1000.0, 6e4):
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


def test_log_prob_at_zero_variance_is_inf_not_nan(device):
    for log_var in (-100.0, -177.0, -200.0, -1e4, -math.inf):
        v = torch.full((1, 1), log_var, device=device)
        x = torch.ones(1, 1, device=device)
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


@pytest.mark.parametrize("logit", [0.0, 1e-8, 20.0, 88.0, 104.0, 1e4, math.inf])
def test_bernoulli_far_out(logit, device):
    """A certain and right bet costs e^-|l|; a certain and wrong one |l|."""
    for sign in (1, -1):
        logits = torch.full((1, 1), sign * logit, device=device)
        right = torch.full((1, 1), float(sign > 0), device=device)
        cost = -math.log1p(math.exp(-logit))
        value = fastvae.bernoulli_log_prob(right, logits).item()
        assert value == pytest.approx(cost, rel=2e-6, abs=1e-44)
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
    return 0.5 * expm1_minus(torch.from_numpy(x)).numpy()


RANGES = {
    "exp": (np.exp, -103, 88.7, 1.5),
    "half_expm1": (lambda x: np.expm1(x) / 2, -103, 88.7, 2),
    "half_expm1_minus": (half_expm1_minus, -103, 88.7, 3),
    "half_exp.exp_half": (lambda x: np.exp(x / 2), -173, 177, 2),
    "half_exp.half_expm1": (lambda x: np.expm1(x) / 2, -200, 88.7, 3),
    "half_exp.half_expm1_minus": (half_expm1_minus, -200, 88.7, 4),
    "log_normal": (np.log, 2.0**-33, 1, 2),
    "log1p_unit": (np.log1p, 0, 1, 2),
    "sin_turn": (lambda u: np.sin(2 * np.pi * (u - np.round(4 * u) / 4)), 0, 0.125, 2),
    "cos_turn": (lambda u: np.cos(2 * np.pi * u), 0, 0.125, 2),
}


@pytest.mark.skipif(not fastvae.build_info()["compiled"], reason="no compiled module to probe")
@pytest.mark.parametrize("name", RANGES)
def test_stated_ulp_bounds(name):
    """Each bound that csrc/math.h states, on a dense grid and on every magnitude near the edges."""
    function, low, high, bound = RANGES[name]
    near = np.logspace(-10, 0, 300_000)
    x = np.concatenate([np.linspace(low, high, 3_000_001), high - near, low + near, near, -near])
    x = x[(x >= low) & (x <= high)].astype(np.float32)
    actual = torch.from_numpy(fastvae._load.module.math(name, x))
    exact = torch.from_numpy(function(x.astype(np.float64)))
    normal = exact.abs() >= 2.0**-126  # below, an ulp is a constant, and rounding happens twice
    assert ulps(actual, exact)[normal].max() <= bound
    assert ulps(actual, exact).max() <= 2 * bound


@pytest.mark.skipif(not fastvae.build_info()["compiled"], reason="no compiled module to probe")
def test_turns_beyond_an_eighth():
    u = np.linspace(0, 1, 1_000_001).astype(np.float32)
    module = fastvae._load.module
    turn = 2 * np.pi * u.astype(np.float64)
    np.testing.assert_allclose(module.math("sin_turn", u), np.sin(turn), atol=1.2e-7)
    np.testing.assert_allclose(module.math("cos_turn", u), np.cos(turn), atol=1.2e-7)
