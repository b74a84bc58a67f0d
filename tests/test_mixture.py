"""Mixtures and the aggregate posterior: what tests/cases.py cannot say of every op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference

INF = math.inf


def draw(*shapes: tuple[int, ...], seed: int = 0, dtype=torch.float64, device: str = "cpu"):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [x.requires_grad_() for x in drawn]


# --- the weights of the estimators ----------------------------------------------------------------


def weights(batch: int, *args, **kwargs) -> Tensor:
    """The matrix w, read off the kernel: a sample far from all posteriors but one shows its weight.

    One dimension, posteriors 1000 apart with unit variance: row i of the j-th call sits on mu_j.
    """
    mu = 1000.0 * torch.arange(batch, dtype=torch.float64).reshape(batch, 1)
    zeros, columns = torch.zeros_like(mu), []
    for j in range(batch):
        log_qz, log_prod_qz = fastvae.aggregate_posterior(
            mu[j].expand(batch, 1).contiguous(), mu, zeros, *args, **kwargs
        )
        assert torch.equal(log_qz, log_prod_qz)  # of one dimension they are the same
        columns.append((log_qz + 0.5 * math.log(2 * math.pi)).exp())
    return torch.stack(columns, 1)


def published(batch: int, size: int) -> Tensor:
    """As pythae and rtqichen/beta-tcvae write it."""
    m = batch - 1
    stratum = (size - m) / (size * m)
    w = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    w.view(-1)[:: m + 1] = 1 / size
    w.view(-1)[1 :: m + 1] = stratum
    w[m - 1, 0] = stratum
    return w


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("size", ["batch", 100, 60000])
def test_stratified_weights_sum_to_one_in_every_row(batch, size):
    size = batch if size == "batch" else size
    w = weights(batch, size, "mss")
    torch.testing.assert_close(w.sum(1), torch.ones(batch, dtype=torch.float64))
    m = batch - 1
    if batch > 1:
        torch.testing.assert_close(w.diagonal(), torch.full_like(w.diagonal(), 1 / size))
        following = w.roll(-1, 0).diagonal() if batch == 1 else w.roll(-1, 1).diagonal()
        expected = torch.full_like(following, (size - m) / (size * m))
        torch.testing.assert_close(following, expected)
    if batch > 2:
        rest = ~(torch.eye(batch, dtype=torch.bool) | torch.eye(batch, dtype=torch.bool).roll(1, 1))
        torch.testing.assert_close(w[rest], torch.full_like(w[rest], 1 / m))


@pytest.mark.parametrize("batch", [2, 3, 4, 16, 18, 33])
@pytest.mark.parametrize("size", [100, 60000])
def test_legacy_weights_are_the_published_ones(batch, size):
    torch.testing.assert_close(weights(batch, size, "mss", legacy_mss=True), published(batch, size))


def test_legacy_known_answer():
    """Row B - 2 of the published matrix sums to 1.3133 for B = 4, N = 100; corrected, to 1."""
    legacy = weights(4, 100, "mss", legacy_mss=True).sum(1)
    assert legacy[2].item() == pytest.approx(1.3133, abs=5e-5)
    assert weights(4, 100, "mss").sum(1)[2].item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("size", [None, 5, 1000])
def test_weighted_estimator(size):
    torch.testing.assert_close(
        weights(5, size), torch.full((5, 5), 1 / (5 * (size or 1)), dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "options", [(), (50,), (50, "mss"), (33, "mss"), (50, "mss", True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_estimator_matches_the_reference(options, dtype, device):
    inputs = draw((33, 7), (33, 7), (33, 7), dtype=dtype, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    legacy = {"legacy_mss": True} if len(options) == 3 else {}
    actual = fastvae.aggregate_posterior(*inputs, *options[:2], **legacy)
    expected = reference.aggregate_posterior(*exact, *options)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol)
    scale = torch.arange(33, device=device) % 5 + 1.0
    for pick in ((0,), (1,), (0, 1)):
        a = torch.autograd.grad(
            sum((actual[i] * scale).sum() for i in pick), inputs, retain_graph=True
        )
        e = torch.autograd.grad(
            sum((expected[i] * scale).sum() for i in pick), exact, retain_graph=True
        )
        for x, y in zip(a, e, strict=True):
            torch.testing.assert_close(
                x.double(), y, rtol=4 * rtol, atol=4 * rtol * y.abs().max().item()
            )


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 15, 16, 17, 100])
def test_agrees_with_torch_distributions(components, device):
    d = torch.distributions
    z, mu, log_var, logits = draw(
        (3, 5, 6), (components, 6), (components, 6), (components,), device=device
    )
    log_weights = logits.log_softmax(0)
    mixture = d.MixtureSameFamily(
        d.Categorical(logits=log_weights), d.Independent(d.Normal(mu, (0.5 * log_var).exp()), 1)
    )
    actual = fastvae.gaussian_mixture_log_prob(z, mu, log_var, log_weights)
    torch.testing.assert_close(actual, mixture.log_prob(z))
    inputs = (z, mu, log_var, logits)
    expected = torch.autograd.grad(mixture.log_prob(z).sum(), inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), inputs), expected)


def test_default_weights_are_equal(device):
    z, mu, log_var = draw((4, 3), (7, 3), (7, 3), device=device)
    equal = torch.full((7,), -math.log(7), dtype=torch.float64, device=device)
    torch.testing.assert_close(
        fastvae.gaussian_mixture_log_prob(z, mu, log_var),
        fastvae.gaussian_mixture_log_prob(z, mu, log_var, equal),
    )


def test_one_component_is_a_gaussian(device):
    z, mu, log_var = draw((50, 33), (1, 33), (1, 33), dtype=torch.float32, device=device)
    torch.testing.assert_close(
        fastvae.gaussian_mixture_log_prob(z, mu, log_var),
        fastvae.gaussian_log_prob(z, mu, log_var),
        rtol=1e-6, atol=0,
    )  # fmt: skip


def test_far_away_nothing_cancels(device):
    """1e4 sigma from the origin, 1 from each other: the expanded square has no digit left."""
    z, mu, log_var = draw((20, 8), (30, 8), (30, 8), dtype=torch.float32, device=device)
    z, mu = (z + 1e4).detach().requires_grad_(), (mu + 1e4).detach().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (z, mu, log_var)]
    actual = fastvae.gaussian_mixture_log_prob(z, mu, log_var)
    expected = reference.gaussian_mixture_log_prob(*exact)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    for a, e in zip(
        torch.autograd.grad(actual.sum(), (z, mu, log_var)),
        torch.autograd.grad(expected.sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), e, rtol=4e-6, atol=4e-6 * e.abs().max().item())


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_components(dtype, device):
    """The logarithm of an empty sum, and no gradient."""
    z, mu, log_var, w = draw((3, 4), (0, 4), (0, 4), (0,), dtype=dtype, device=device)
    for weights in (None, w):
        out = fastvae.gaussian_mixture_log_prob(z, mu, log_var, weights)
        assert torch.equal(out, torch.full((3,), -INF, dtype=dtype, device=device))
        grads = torch.autograd.grad(out.sum(), (z, mu, log_var))
        assert torch.equal(grads[0], torch.zeros_like(z))
        assert grads[1].shape == grads[2].shape == (0, 4)


def test_no_rows_and_no_dimensions(device):
    z, mu, log_var, w = draw((0, 4), (5, 4), (5, 4), (5,), device=device)
    out = fastvae.gaussian_mixture_log_prob(z, mu, log_var, w)
    assert out.shape == (0,)
    grads = torch.autograd.grad(out.sum(), (mu, log_var, w))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    z, mu, log_var, w = draw((2, 3, 0), (5, 0), (5, 0), (5,), device=device)
    out = fastvae.gaussian_mixture_log_prob(z, mu, log_var, w)
    torch.testing.assert_close(out, w.logsumexp(0).expand(2, 3))
    (grad,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(grad, 6 * w.softmax(0))
    log_qz, log_prod_qz = fastvae.aggregate_posterior(*draw((3, 0), (3, 0), (3, 0), device=device))
    torch.testing.assert_close(log_qz, torch.zeros_like(log_qz))
    assert torch.equal(log_prod_qz, torch.zeros_like(log_prod_qz))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_density_is_minus_infinity_with_zero_gradient(dtype, device):
    """Row 1 is out of reach of every component; weights of zero shut out the others in turn."""
    z, mu, log_var = draw((3, 4), (5, 4), (5, 4), dtype=dtype, device=device)
    z = z.detach()
    z[1] = torch.finfo(dtype).max
    z.requires_grad_()
    out = fastvae.gaussian_mixture_log_prob(z, mu, log_var)
    assert out.isneginf().tolist() == [False, True, False]
    inputs = (z, mu, log_var)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][1], torch.zeros_like(z[1]))
    rest = [z.detach()[[0, 2]], mu.detach(), log_var.detach()]
    rest = [x.requires_grad_() for x in rest]
    expected = torch.autograd.grad(fastvae.gaussian_mixture_log_prob(*rest).sum(), rest)
    torch.testing.assert_close(grads[1:], expected[1:])

    nothing = torch.full((5,), -INF, dtype=dtype, device=device, requires_grad=True)
    out = fastvae.gaussian_mixture_log_prob(z, mu, log_var, nothing)
    assert out.isneginf().all()
    grads = torch.autograd.grad(out.sum(), (*inputs, nothing))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_a_weight_of_zero_leaves_the_component_out(device):
    z, mu, log_var, w = draw((9, 4), (20, 4), (20, 4), (20,), device=device)
    keep = torch.arange(20, device=device) % 3 > 0
    shut = w.detach().masked_fill(~keep, -INF).requires_grad_()
    out = fastvae.gaussian_mixture_log_prob(z, mu, log_var, shut)
    kept = [mu[keep], log_var[keep], w[keep]]
    expected = fastvae.gaussian_mixture_log_prob(z, *kept)
    torch.testing.assert_close(out, expected)
    actual = torch.autograd.grad(out.sum(), (z, mu, log_var))
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), (z, mu, log_var)))
    assert not torch.autograd.grad(
        fastvae.gaussian_mixture_log_prob(z, mu, log_var, shut).sum(), shut
    )[0][~keep].any()


@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=str)
def test_gradient_of_other_rows_is_untouched(bad, device):
    z, mu, log_var = draw((40, 5), (7, 5), (7, 5), dtype=torch.float32, device=device)
    clean = torch.autograd.grad(fastvae.gaussian_mixture_log_prob(z, mu, log_var).sum(), z)[0]
    spoilt = z.detach().clone()
    spoilt[11, 2] = bad
    spoilt.requires_grad_()
    out = fastvae.gaussian_mixture_log_prob(spoilt, mu, log_var)
    grad = torch.autograd.grad(out.sum(), spoilt)[0]
    others = torch.arange(40, device=device) != 11
    assert torch.equal(grad[others], clean[others])


def test_forward_and_backward_of_4096_rows_stay_within_64_mb():
    """[B, B, D] would be 4.3 GB."""
    from torch.profiler import ProfilerActivity, profile

    batch, dims = 4096, 64
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, dims, generator=g).requires_grad_() for _ in range(3)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        log_qz, log_prod_qz = fastvae.aggregate_posterior(*inputs, 60000, "mss")
        grads = torch.autograd.grad((log_qz - log_prod_qz).sum(), inputs)
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert all(g.isfinite().all() for g in grads)
    assert 3 * batch * dims * 4 <= peak <= 3 * batch * dims * 4 + (64 << 20)


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    ((2, 3, 4), (2, 3, 4), (2, 3, 4), {}, r"z must have shape \[B, D\], got \[2, 3, 4\]"),
    ((3, 4), (3, 5), (3, 4), {}, r"mu must have the shape of z, got \[3, 5\] and \[3, 4\]"),
    ((3, 4), (3, 4), (2, 4), {}, r"log_var must have the shape of z, got \[2, 4\] and \[3, 4\]"),
    ((3, 4), (3, 4), (3, 4), {"estimator": "best"}, "estimator must be mws or mss, got best"),
    (
        (3, 4), (3, 4), (3, 4), {"estimator": "mss"},
        "dataset_size must be given for estimator mss, got None",
    ),
    (
        (3, 4), (3, 4), (3, 4), {"estimator": "mss", "dataset_size": 2},
        "dataset_size must be at least the size of the batch, got 2 and 3",
    ),
    (
        (3, 4), (3, 4), (3, 4), {"dataset_size": 0},
        "dataset_size must be at least the size of the batch, got 0 and 3",
    ),
    (
        (3, 4), (3, 4), (3, 4), {"legacy_mss": True},
        "legacy_mss must go with estimator mss, got estimator mws",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("z", "mu", "log_var", "options", "message"), ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_batches_raise(z, mu, log_var, options, message, device):
    inputs = [torch.zeros(s, device=device) for s in (z, mu, log_var)]
    with pytest.raises(ValueError, match=f"fastvae::aggregate_posterior: {message}"):
        fastvae.aggregate_posterior(*inputs, **options)


@pytest.mark.parametrize(
    ("mu", "log_var", "weights", "message"),
    [
        ((4,), (4,), None, r"mu must have shape \[K, D\] with the D of z, got \[4\] and \[3, 4\]"),
        ((5, 3), (5, 3), None, r"mu must have shape \[K, D\] .*, got \[5, 3\] and \[3, 4\]"),
        ((5, 4), (4,), None, r"log_var must have the shape of mu, got \[4\] and \[5, 4\]"),
        ((5, 4), (5, 4), (4,), r"log_weights must have shape \[K\] .*, got \[4\] and \[5, 4\]"),
        ((5, 4), (5, 4), (5, 1), r"log_weights must have shape .*, got \[5, 1\] and \[5, 4\]"),
    ],
)
def test_wrong_components_raise(mu, log_var, weights, message):
    w = None if weights is None else torch.zeros(weights)
    with pytest.raises(ValueError, match=f"fastvae::gaussian_mixture_log_prob: {message}"):
        fastvae.gaussian_mixture_log_prob(
            torch.zeros(3, 4), torch.zeros(mu), torch.zeros(log_var), w
        )


def test_wrong_normalisers_raise():
    z = torch.zeros(3, 4)
    kept, grad, wanted = torch.zeros(2, 6), torch.ones(3), [True] * 3
    backward = torch.ops.fastvae.aggregate_posterior_backward
    with pytest.raises(
        ValueError, match=r"kept must be what forward kept, got \[2, 6\] and \[3, 4\]"
    ):
        backward(grad, grad, z, z, z, kept, None, "mws", False, "log_var", wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["log_scale", "scale", "softplus"])
def test_scales_given_by_other_maps(name, dtype, device):
    g = torch.Generator().manual_seed(0)
    z, mu = (torch.randn(9, 4, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    s = torch.rand(9, 4, generator=g, dtype=torch.float64).add(0.5).to(device)
    z, mu, s = (x.to(dtype).requires_grad_() for x in (z, mu, s))
    wide = [x.detach().double().requires_grad_() for x in (z, mu, s)]
    log_var = 2.0 * fastvae.reference.scale.ScaleMap(name).log_sigma(wide[2])
    for function in (
        lambda z, mu, s, **option: fastvae.gaussian_mixture_log_prob(z, mu, s, **option),
        lambda z, mu, s, **option: sum(fastvae.aggregate_posterior(z, mu, s, 100, **option)),
    ):
        value = function(z, mu, s, parameterization=name)
        ideal = function(wide[0], wide[1], log_var)
        close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
        if dtype == torch.bfloat16:
            close = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(value.double(), ideal, **close)
        grads = torch.autograd.grad(value.sum(), (z, mu, s))
        ideals = torch.autograd.grad(ideal.sum(), wide, retain_graph=True)
        for grad, exact in zip(grads, ideals, strict=True):
            torch.testing.assert_close(grad, exact.to(dtype))
    with pytest.raises(ValueError, match=r"parameterization must be one of .*, got sigma"):
        fastvae.gaussian_mixture_log_prob(z, mu, s, parameterization="sigma")
    with pytest.raises(TypeError, match="must have the dtype of"):
        fastvae.aggregate_posterior(z, mu, s.float(), parameterization=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["log_var", "log_scale", "scale", "softplus"])
def test_a_scale_of_zero_is_a_point_that_no_row_meets(name, dtype, device):
    """Neither value nor gradient notices such a component, nor the padding after the last one."""
    g = torch.Generator().manual_seed(0)
    z, mu = (torch.randn(n, 5, generator=g).to(device, dtype).requires_grad_() for n in (33, 18))
    s = torch.rand(18, 5, generator=g).add(0.5).to(device, dtype)
    s[7] = 0.0 if name == "scale" else -math.inf
    s.requires_grad_()
    keep = torch.arange(18, device=device) != 7
    log_weights = torch.zeros(18, device=device, dtype=dtype).requires_grad_()
    inputs = [z, mu, s, log_weights]
    fewer = [x if x is z else x[keep].detach().requires_grad_() for x in inputs]
    out, expected = (
        fastvae.gaussian_mixture_log_prob(*xs, parameterization=name) for xs in (inputs, fewer)
    )
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), fewer), strict=True):
        torch.testing.assert_close(a if a.shape == b.shape else a[keep], b)
        assert a.shape == b.shape or not a[~keep].any()
    with torch.no_grad():
        far = z.clone().fill_(math.inf)
        out = fastvae.gaussian_mixture_log_prob(
            far, mu, s[:1].expand(18, -1), parameterization=name
        )
        assert out.isneginf().all()
        if name == "scale":
            assert fastvae.gaussian_mixture_log_prob(z, mu, -s, parameterization=name).isnan().all()
