"""Scales by four maps (csrc/scale.h), and what a KL may be made of: free bits, beta, capacity."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from cases import MAPS

import fastvae


def exact_sigma(name: str, s: float) -> mpmath.mpf:
    s = mpmath.mpf(s)
    if name == "scale":
        return s
    if name == "softplus":
        return mpmath.log1p(mpmath.exp(s))
    return mpmath.exp(s / 2 if name == "log_var" else s)


def hard_points(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Numbers s around sigma = 1, at every distance, and far away on both sides."""
    one = {"scale": 1.0, "softplus": math.log(math.e - 1.0)}.get(name, 0.0)
    near = torch.logspace(-7, 0, 300, dtype=torch.float64)
    far = torch.logspace(-4, 1.3, 100, dtype=torch.float64)
    points = torch.cat([one + near, one - 0.9 * near, far])
    if name != "scale":
        points = torch.cat([points, -far, torch.linspace(-40, -15, 60, dtype=torch.float64)])
    return points.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_kl_and_its_gradient_hold_their_digits(name, dtype, device):
    """Within 8 ulp of the exact KL of the s given, never negative, also where sigma is almost 1."""
    mpmath.mp.dps = 50
    s = hard_points(name, dtype)
    sigma = [exact_sigma(name, x) for x in s.tolist()]
    exact = np.array([(v * v - 1) / 2 - mpmath.log(v) for v in sigma])
    slope = {
        "log_var": lambda v: mpmath.mpf(1) / 2,
        "log_scale": lambda v: mpmath.mpf(1),
        "scale": lambda v: 1 / v,
        "softplus": lambda v: (1 - mpmath.exp(-v)) / v,  # sigmoid(s) = 1 - e^-sigma
    }[name]
    exact_grad = np.array([(v * v - 1) * slope(v) for v in sigma])

    at = s.to(device)[:, None].requires_grad_()
    mu = torch.zeros_like(at)
    key = fastvae.random.key(0, device=device)
    eps = torch.finfo(dtype).eps
    for kl in (
        fastvae.gaussian_kl(mu, at, parameterization=name),
        fastvae.reparameterize_kl(mu, at, parameterization=name, key=key)[1],
        fastvae.gaussian_kl(mu, at, parameterization=name, free_bits=1e-300),
    ):
        assert (kl >= 0).all()
        (grad,) = torch.autograd.grad(kl.sum(), at)
        for actual, ideal in ((kl, exact), (grad[:, 0], exact_grad)):
            error = np.array([mpmath.mpf(x) for x in actual.tolist()]) - ideal
            allowed = 8 * eps * np.abs(ideal) + 2 * torch.finfo(dtype).tiny
            assert (np.abs(error) <= allowed).all(), (name, s[np.argmax(np.abs(error) / allowed)])


@pytest.mark.parametrize("name", MAPS)
def test_relative_kl_holds_its_digits_between_near_equal_scales(name, device):
    mpmath.mp.dps = 50
    for p in (0.3, 1.0, 2.5):
        q = (p + torch.logspace(-6, 1, 200, dtype=torch.float64)).float()
        exact = [exact_sigma(name, x) / exact_sigma(name, float(np.float32(p))) for x in q.tolist()]
        exact = np.array([(r * r - 1) / 2 - mpmath.log(r) for r in exact])
        q = q.to(device)[:, None]
        zero, prior = torch.zeros_like(q), torch.full_like(q, p)
        kl = fastvae.gaussian_kl(zero, q, zero, prior, parameterization=name)
        error = np.array([mpmath.mpf(x) for x in kl.tolist()]) - exact
        # q - p is exact here; sigma_p is good to 2 ulp, and the KL is of second order in it
        assert (kl >= 0).all()
        assert (np.abs(error) <= 12 * 2.0**-23 * exact).all(), (name, p)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_gives_the_same_gaussian(name, device):
    """The four ways to say one sigma: the same sample, KL and log-density."""
    g = torch.Generator().manual_seed(0)
    mu, x = (torch.randn(50, 7, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    sigma = torch.rand(50, 7, generator=g, dtype=torch.float64).add(0.2).to(device)
    s = {
        "log_var": 2 * sigma.log(),
        "log_scale": sigma.log(),
        "scale": sigma,
        "softplus": sigma.expm1().log(),
    }[name]
    key = fastvae.random.key(3, device=device)
    eps = fastvae.random.normal(key, mu.shape, mu.dtype)
    normal = torch.distributions.Normal(mu, sigma)
    close = {"rtol": 1e-12, "atol": 1e-12}
    z, kl = fastvae.reparameterize_kl(mu, s, parameterization=name, key=key)
    torch.testing.assert_close(z, mu + sigma * eps, **close)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl, expected.sum(-1), **close)
    log_prob = fastvae.gaussian_log_prob(x, mu, s, parameterization=name)
    torch.testing.assert_close(log_prob, normal.log_prob(x).sum(-1), **close)
    entropy = fastvae.gaussian_entropy(s, parameterization=name)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1), **close)
    by_log_var = (mu, 2 * sigma.log())
    prior, same = (mu[:1], s[:1]), (mu[:1], 2 * sigma[:1].log())
    options = {"parameterization": name, "prior": prior, "key": key}
    for form in ("analytic", "entropy", "monte_carlo"):
        bounds = fastvae.elbo(lambda z: -z.square().sum(-1), mu, s, form, **options)
        expected = fastvae.elbo(
            lambda z: -z.square().sum(-1), *by_log_var, form, prior=same, key=key
        )
        torch.testing.assert_close(bounds, expected, **close)
    log_p = fastvae.importance_sampled_log_likelihood(
        lambda z: -z.square().sum(-1), mu, s, 8, **options
    )
    expected = fastvae.importance_sampled_log_likelihood(
        lambda z: -z.square().sum(-1), *by_log_var, 8, prior=same, key=key
    )
    torch.testing.assert_close(log_p, expected, **close)
    log_prob = fastvae.discretized_logistic_log_prob(x, mu, s, parameterization=name)
    expected = fastvae.discretized_logistic_log_prob(x, mu, sigma.log())
    torch.testing.assert_close(log_prob, expected, **close)
    log_prob = fastvae.laplace_log_prob(x, mu, s, parameterization=name)
    expected = torch.distributions.Laplace(mu, sigma).log_prob(x).sum(-1)
    torch.testing.assert_close(log_prob, expected, **close)


@pytest.mark.parametrize("name", MAPS)
def test_gradient_of_the_sample_at_any_size_of_the_mean(name, device):
    """d z / d s = sigma' eps to 1e-5 although z itself has lost eps: |mu| = 1e4, sigma = e^-10."""
    s = {"log_var": -20.0, "log_scale": -10.0, "scale": math.exp(-10), "softplus": -10.0}[name]
    mu = torch.tensor([[1e4, 3.0, 0.0, -1e-3]], device=device)
    at = torch.full_like(mu, s).requires_grad_()
    key = fastvae.random.key(5, device=device)
    exact = at.detach().double().requires_grad_()
    z = fastvae.reparameterize(mu, at, parameterization=name, key=key)
    ideal = fastvae.reference.reparameterize(mu.double(), exact, key, name)
    (grad,) = torch.autograd.grad(z.sum(), at)
    (ideal_grad,) = torch.autograd.grad(ideal.sum(), exact)
    eps = fastvae.random.normal(key, mu.shape).to(device)
    torch.testing.assert_close(grad / (ideal_grad / eps), eps.double(), rtol=1e-5, atol=1e-5)


def test_a_scale_of_zero_is_a_point_and_a_negative_one_is_no_number(device):
    mu = torch.tensor([[1.0], [2.0]], device=device)
    scale = torch.tensor([[0.0], [-0.5]], device=device).requires_grad_()
    key = fastvae.random.key(0, device=device)
    z = fastvae.reparameterize(mu, scale, parameterization="scale", key=key)
    assert z[0] == mu[0]
    eps = fastvae.random.normal(key, (2, 1)).to(device)
    (grad,) = torch.autograd.grad(z.sum(), scale)
    torch.testing.assert_close(grad, eps)  # no 0 * inf
    kl = fastvae.gaussian_kl(mu, scale, parameterization="scale")
    log_prob = fastvae.gaussian_log_prob(mu + 1.0, mu, scale, parameterization="scale")
    assert kl[0] == math.inf
    assert kl[1].isnan()
    assert log_prob[0] == -math.inf
    assert log_prob[1].isnan()


# --- free bits, groups, beta, capacity ------------------------------------------------------------


def by_hand(mu, log_var, free_bits, groups, beta, capacity):
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)
    kl = kl.unflatten(-1, (groups or kl.shape[-1], -1)).sum(-1)
    total = kl.clamp(min=free_bits).sum(-1)
    return beta * (total if capacity is None else (total - capacity).abs())


@pytest.mark.parametrize("free_bits", [0.0, 0.5])
@pytest.mark.parametrize("groups", [None, 1, 3, 12])
@pytest.mark.parametrize(("beta", "capacity"), [(1.0, None), (4.0, None), (0.5, 9.0), (0.0, 1.0)])
def test_objective_is_that_by_hand(free_bits, groups, beta, capacity, device):
    g = torch.Generator().manual_seed(1)
    mu, log_var = (
        torch.randn(20, 12, generator=g, dtype=torch.float64).to(device).requires_grad_()
        for _ in range(2)
    )
    key = fastvae.random.key(2, device=device)
    options = {"free_bits": free_bits, "groups": groups, "beta": beta, "capacity": capacity}
    ideal = by_hand(mu, log_var, **options)
    ideal_grads = torch.autograd.grad(ideal.sum(), (mu, log_var))
    z, kl = fastvae.reparameterize_kl(mu, log_var, key=key, **options)
    torch.testing.assert_close(z, fastvae.reparameterize(mu, log_var, key=key))
    zs, of_samples = fastvae.reparameterize_kl(mu, log_var, 4, key=key, **options)
    assert zs.shape == (4, 20, 12)
    zero = torch.zeros_like(mu)
    for objective in (
        kl,
        of_samples,
        fastvae.gaussian_kl(mu, log_var, **options),
        fastvae.gaussian_kl(mu, log_var, zero[:1], zero[:, :1], **options),
    ):
        torch.testing.assert_close(objective, ideal)
        grads = torch.autograd.grad(objective.sum(), (mu, log_var), retain_graph=True)
        torch.testing.assert_close(grads, ideal_grads)


def test_free_bits_of_a_batch_mean_as_documented(device):
    """Kingma et al.'s own, from the KL of each group."""
    mu, log_var = torch.randn(2, 64, 12, device=device).unbind()
    groups = fastvae.gaussian_kl(mu.unflatten(-1, (3, -1)), log_var.unflatten(-1, (3, -1)))
    assert groups.shape == (64, 3)
    kl = (0.5 * (mu.square() + log_var.exp() - 1 - log_var)).mean(0).view(3, 4).sum(-1)
    torch.testing.assert_close(
        groups.mean(0).clamp(min=2.5).sum(), kl.clamp(min=2.5).sum(), rtol=1e-5, atol=1e-5
    )


def test_bad_options_raise():
    mu = torch.zeros(2, 6)
    for name in ("gaussian_kl", "reparameterize_kl"):
        function, start = getattr(fastvae, name), f"fastvae::{name}: "
        message = start + "parameterization must be one of log_var, log_scale, scale, softplus, got"
        with pytest.raises(ValueError, match=message):
            function(mu, mu, parameterization="stddev")
        for option in ("free_bits", "beta", "capacity"):
            for bad in (-1.0, math.nan):
                with pytest.raises(ValueError, match=start + f"{option} must be non-negative, got"):
                    function(mu, mu, **{option: bad})
        with pytest.raises(ValueError, match=start + "free_bits must be non-negative, got -1"):
            function(mu, mu, free_bits=-1.0, groups=2)
        for bad in (0, -2, 4, 7):
            message = start + f"groups must divide the last dimension, got {bad} and 6"
            with pytest.raises(ValueError, match=message):
                function(mu, mu, groups=bad)
        for other in (torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor(0.0)):
            with pytest.raises(ValueError, match=start + "the last dimensions must broadcast, got"):
                function(mu, other, groups=2)
        with pytest.raises(ValueError, match="groups must divide the last dimension, got 1 and 0"):
            function(mu[:, :0], mu[:, :0], groups=1)
    message = "laplace_log_prob: parameterization must be one of .*, got stddev"
    for package in (fastvae, fastvae.reference):
        with pytest.raises(ValueError, match=message):
            package.laplace_log_prob(mu, mu, mu, parameterization="stddev")
    for function in (fastvae.reparameterize, fastvae.reference.reparameterize_kl):
        with pytest.raises(ValueError, match="parameterization must be one of"):
            function(mu, mu, key=fastvae.random.key(0), parameterization="")
