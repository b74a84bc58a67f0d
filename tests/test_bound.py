"""Every estimator of the importance-weighted bound: its value, and its gradient in expectation.

The truth comes from a model small enough to integrate exactly. In expectation: the mean over many
replicates lies within four standard errors. Sample by sample: the gradient equals that of the
textbook formula, written out with the detachments of the paper.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from pathlib import Path

import chance
import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import importance_weighted_bound

X, REPLICATES = 1.3, 100_000
LOG_2PI = math.log(2 * math.pi)
assert_mean = functools.partial(chance.assert_mean, dim=-1, small=0.02)


# --- a linear Gaussian model: z ~ N(0, 1), x | z ~ N(a z + b, s^2), and a q that is wrong ---------

THETA = (1.4, 0.3, -0.4)  # a, b, log s
PHI = (0.1, -0.7)  # mu, log_var


def leaves(values, n: int) -> list[Tensor]:
    """Each parameter once per replicate, so that gradients come per replicate too."""
    return [torch.full((n,), v, dtype=torch.float64, requires_grad=True) for v in values]


def log_normal(x, mean, log_var):
    return -0.5 * (LOG_2PI + log_var + (x - mean) ** 2 * torch.exp(-log_var))


def log_joint(theta, z):
    a, b, log_s = theta
    x = torch.tensor(X, dtype=torch.float64)
    return log_normal(z, 0.0, torch.zeros((), dtype=torch.float64)) + log_normal(
        x, a * z + b, 2 * log_s
    )


def log_q(phi, z):
    return log_normal(z, phi[0], phi[1])


def detached(tensors):
    return [t.detach() for t in tensors]


def sample(phi, eps):
    return phi[0] + torch.exp(0.5 * phi[1]) * eps


def plain_bound(log_w, dim=0):
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def estimate(estimator: str, shape: tuple[int, ...], eps: Tensor, theta, phi) -> Tensor:
    """The bound per replicate, as the documentation says to call it."""
    z = sample(phi, eps)
    assert z.shape == shape + phi[0].shape
    if estimator == "dreg":
        return importance_weighted_bound(
            lambda z: log_joint(theta, z) - log_q(detached(phi), z), "dreg", z=z
        )
    if estimator == "piwae":
        return importance_weighted_bound(
            lambda z, log_q: log_joint(theta, z) - log_q, "piwae", z=(z, log_q(phi, z))
        )
    if estimator == "stl":
        return importance_weighted_bound(log_joint(theta, z) - log_q(detached(phi), z), "stl")
    if estimator in ("rws", "vimco"):
        z = z.detach()
        q = log_q(phi, z)
        return importance_weighted_bound(log_joint(theta, z) - q, estimator, log_q=q)
    beta = {"beta": 0.3} if estimator == "ciwae" else {}
    return importance_weighted_bound(log_joint(theta, z) - log_q(phi, z), estimator, **beta)


def noise(*shape: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def replicates(estimator: str, shape: tuple[int, ...], n: int = REPLICATES, phi=PHI):
    """Values [n], and gradients of the three model and two inference parameters [5, n]."""
    theta, phi = leaves(THETA, n), leaves(phi, n)
    bound = estimate(estimator, shape, noise(*shape, n), theta, phi)
    grads = torch.autograd.grad(bound.sum(), [*theta, *phi])
    return bound.detach(), torch.stack(grads)


def nodes(samples: int, order: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite: eps [samples, order^samples], and weights."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    w = w / w.sum()
    points = np.array(list(itertools.product(x, repeat=samples))).T
    weights = np.prod(np.array(list(itertools.product(w, repeat=samples))), 1)
    return torch.from_numpy(points), torch.from_numpy(weights)


ORDER = {1: 40, 2: 60, 3: 36}


def exact(samples: int, finer: int = 0) -> tuple[float, Tensor]:
    """The expected bound of K samples, and its gradient, by quadrature."""
    eps, weights = nodes(samples, ORDER[samples] + finer)
    theta, phi = (
        [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
        for values in (THETA, PHI)
    )
    z = sample(phi, eps)
    value = (weights * plain_bound(log_joint(theta, z) - log_q(phi, z))).sum()
    return value.item(), torch.stack(torch.autograd.grad(value, [*theta, *phi]))


@pytest.fixture(scope="module")
def truth() -> dict[int, tuple[float, Tensor]]:
    return {1: exact(1), 2: exact(2), 3: exact(3)}


def test_quadrature_is_exact(truth):
    """As far as the Monte Carlo below can see, whose standard errors are some 1e-3."""
    for samples in (1, 2, 3):
        value, grad = exact(samples, finer=8)
        assert value == pytest.approx(truth[samples][0], abs=1e-5)
        torch.testing.assert_close(grad, truth[samples][1], atol=1e-4, rtol=0)


def test_elbo_is_unbiased(truth):
    value, grads = replicates("elbo", (3,))
    assert_mean(value, truth[1][0])
    assert_mean(grads, truth[1][1])


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_iwae_and_dreg_are_unbiased(truth, estimator, samples):
    value, grads = replicates(estimator, (samples,))
    assert_mean(value, truth[samples][0])
    assert_mean(grads, truth[samples][1])


def test_stl_is_unbiased_for_one_sample_and_for_the_model(truth):
    value, grads = replicates("stl", (1,))
    assert_mean(value, truth[1][0])
    assert_mean(grads, truth[1][1])
    value, grads = replicates("stl", (3,))
    assert_mean(value, truth[3][0])
    assert_mean(grads[:3], truth[3][1][:3])


def test_miwae_averages_over_m_bounds_of_k_samples(truth):
    """M = 2 and K = 3 the other way round would be the gradient of L_2."""
    value, grads = replicates("miwae", (2, 3))
    assert_mean(value, truth[3][0])
    assert_mean(grads, truth[3][1])
    with pytest.raises(AssertionError):
        assert_mean(value, truth[2][0])


def test_ciwae_mixes(truth):
    value, grads = replicates("ciwae", (3,))
    assert_mean(value, 0.3 * truth[1][0] + 0.7 * truth[3][0])
    assert_mean(grads, 0.3 * truth[1][1] + 0.7 * truth[3][1])


def test_piwae_gives_iwae_to_the_model_and_miwae_to_inference(truth):
    value, grads = replicates("piwae", (2, 3))
    assert_mean(grads[3:], truth[3][1][3:])
    other_value, other = replicates("iwae", (6,))
    torch.testing.assert_close(value, other_value)
    torch.testing.assert_close(grads[:3], other[:3])
    with pytest.raises(AssertionError):
        assert_mean(grads[3:], truth[2][1][3:])


def test_rws_is_the_gradient_of_the_inclusive_divergence(truth):
    value, grads = replicates("rws", (3,))
    assert_mean(value, truth[3][0])
    assert_mean(grads[:3], truth[3][1][:3])
    eps, weights = nodes(3, 30)  # E[sum_k w_k grad log q(z_k)], z fixed
    theta = [torch.tensor(v, dtype=torch.float64) for v in THETA]
    phi = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in PHI]
    z = sample(phi, eps).detach()
    normalised = torch.softmax(log_joint(theta, z) - log_q(detached(phi), z), 0)
    expected = (weights * (normalised * log_q(phi, z)).sum(0)).sum()
    assert_mean(grads[3:], torch.stack(torch.autograd.grad(expected, phi)))


def posterior() -> tuple[float, float]:
    a, b, log_s = THETA
    precision = 1 + a * a * math.exp(-2 * log_s)
    return a * math.exp(-2 * log_s) * (X - b) / precision, -math.log(precision)


def test_many_samples_of_rws_move_q_to_the_posterior():
    mean, log_var = posterior()
    expected = (
        (mean - PHI[0]) / math.exp(PHI[1]),
        0.5 * ((math.exp(log_var) + (mean - PHI[0]) ** 2) / math.exp(PHI[1]) - 1),
    )
    _, grads = replicates("rws", (5000,), n=200)
    torch.testing.assert_close(
        grads[3:].mean(1), torch.tensor(expected, dtype=torch.float64), atol=0.01, rtol=0.01
    )


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_no_variance_where_q_is_the_posterior(estimator):
    """Roeder et al. and Tucker et al.; the plain gradient has some."""
    value, grads = replicates(estimator, (8,), n=1000, phi=posterior())
    assert value.std() < 1e-12
    assert grads[3:].abs().max() < 1e-12
    _, plain = replicates("iwae", (8,), n=1000, phi=posterior())
    assert plain[3:].std(1).min() > 0.05


def test_dreg_keeps_its_signal_as_samples_grow():
    """Rainforth et al.: iwae's signal-to-noise ratio falls, dreg's does not (Tucker et al.)."""
    ratio = {}
    for estimator, samples in itertools.product(("iwae", "dreg"), (4, 256)):
        _, grads = replicates(estimator, (samples,), n=4000)
        ratio[estimator, samples] = grads[3].mean().abs() / grads[3].std()
    assert ratio["iwae", 256] < 0.5 * ratio["iwae", 4]
    assert ratio["dreg", 256] > ratio["dreg", 4]


# --- sample by sample, against the formula written out --------------------------------------------


def gradient_by_hand(estimator: str, shape: tuple[int, ...], eps: Tensor, theta, phi):
    """(d/d theta, d/d phi) from separate passes, each with what is constant detached."""

    def grads(objective, parameters):
        return list(torch.autograd.grad(objective.sum(), parameters, retain_graph=True))

    z = sample(phi, eps)
    log_w = log_joint(theta, z) - log_q(phi, z)
    of_model = log_joint(theta, z.detach()) - log_q(detached(phi), z.detach())
    of_path = log_joint(detached(theta), z) - log_q(detached(phi), z)
    w = torch.softmax(log_w.detach(), 0)
    if estimator == "dreg":
        return grads(w * of_model, theta) + grads(w**2 * of_path, phi)
    if estimator == "stl":
        return grads(w * of_model, theta) + grads(w * of_path, phi)
    if estimator == "piwae":
        flat = torch.softmax(log_w.detach().flatten(0, 1), 0).view_as(log_w)
        groups = torch.softmax(log_w.detach(), 1) / shape[0]
        return grads(flat * of_model, theta) + grads(groups * log_w, phi)
    score = log_q(phi, z.detach())
    if estimator == "rws":
        return grads(w * of_model, theta) + grads(w * score, phi)
    if estimator == "vimco":
        log_w = log_w.detach()
        signal = torch.empty_like(log_w)
        for k in range(shape[0]):
            rest = torch.cat((log_w[:k], log_w[k + 1 :]))
            stand_in = torch.cat((rest, rest.mean(0, keepdim=True)))
            signal[k] = plain_bound(log_w) - plain_bound(stand_in)
        return grads(w * of_model, theta) + grads(signal * score - w * score, phi)
    if estimator == "miwae":
        bound = plain_bound(log_w, 1).mean(0)
    elif estimator == "ciwae":
        bound = 0.3 * log_w.mean(0) + 0.7 * plain_bound(log_w)
    else:
        bound = log_w.mean(0) if estimator == "elbo" else plain_bound(log_w)
    return grads(bound, [*theta, *phi])


ESTIMATORS = {
    "elbo": (5,),
    "iwae": (5,),
    "stl": (5,),
    "dreg": (5,),
    "miwae": (2, 5),
    "ciwae": (5,),
    "piwae": (2, 5),
    "rws": (5,),
    "vimco": (5,),
}
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@each_estimator
def test_gradient_of_every_sample_is_the_formulas(estimator):
    shape = ESTIMATORS[estimator]
    theta, phi = leaves(THETA, 50), leaves(PHI, 50)
    eps = noise(*shape, 50)
    bound = estimate(estimator, shape, eps, theta, phi)
    scale = torch.linspace(-2, 3, 50, dtype=torch.float64)  # what comes from above counts once
    actual = torch.autograd.grad((bound * scale).sum(), [*theta, *phi])
    expected = gradient_by_hand(estimator, shape, eps, theta, phi)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, scale * e, rtol=1e-11, atol=1e-11)


@each_estimator
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(estimator, backend):
    shape = ESTIMATORS[estimator]

    def step(eps, *parameters):
        return estimate(estimator, shape, eps, parameters[:3], parameters[3:]) * 1.5

    theta, phi = leaves(THETA, 6), leaves(PHI, 6)
    eps = noise(*shape, 6)
    expected = step(eps, *theta, *phi)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend=backend)(eps, *theta, *phi)
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(y.sum(), [*theta, *phi]) for y in (actual, expected))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e)


@each_estimator
def test_many_dimensions(estimator):
    """Batch dimensions of any number, and of z more beyond them."""
    samples = ESTIMATORS[estimator]
    mu = noise(3, 4, 2, seed=5).requires_grad_()
    z = mu + noise(*samples, 3, 4, 2)

    def log_w_of(z, *_):
        return -(z**2).sum(-1)

    if estimator in ("dreg", "piwae"):
        bound = importance_weighted_bound(log_w_of, estimator, z=z)
    else:
        more = {"log_q": log_w_of(z)} if estimator in ("rws", "vimco") else {}
        bound = importance_weighted_bound(log_w_of(z), estimator, **more)
    assert bound.shape == (3, 4)
    (grad,) = torch.autograd.grad(bound.sum(), mu)
    assert grad.isfinite().all()


@each_estimator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_give_float32(estimator, dtype):
    samples = ESTIMATORS[estimator]
    wide = noise(*samples, 9).to(dtype).float()
    results = []
    for x in (wide.to(dtype), wide):
        x.requires_grad_()
        if estimator in ("dreg", "piwae"):
            bound = importance_weighted_bound(lambda z: 1.0 * z, estimator, z=x)
        else:
            more = {"log_q": x} if estimator in ("rws", "vimco") else {}
            bound = importance_weighted_bound(x, estimator, **more)
        assert bound.dtype == torch.float32
        (grad,) = torch.autograd.grad(bound.sum(), x)
        assert grad.dtype == x.dtype
        results.append((bound, grad.float()))
    (half, half_grad), (single, grad) = results
    torch.testing.assert_close(half, single, rtol=1e-6, atol=1e-6)
    if estimator != "piwae" or dtype == torch.bfloat16:  # float16 has no room for 2^-60
        torch.testing.assert_close(half_grad, grad, rtol=0.02, atol=0.002)


# --- VIMCO: discrete latents, all of which can be listed ------------------------------------------

BITS, SAMPLES = 2, 3
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)), dtype=torch.float64)


def bernoulli_score(states, logits):
    return (states * logits - torch.nn.functional.softplus(logits)).sum(-1)


def discrete_model():
    theta = torch.tensor([0.4, -1.0, -2.5, -0.2], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    return theta, phi


def test_vimco_is_unbiased():
    theta, phi = discrete_model()
    log_prob, score = torch.log_softmax(theta, 0) - 1.0, bernoulli_score(STATES, phi)
    choices = torch.tensor(list(itertools.product(range(2**BITS), repeat=SAMPLES))).T
    bound = plain_bound((log_prob - score)[choices])
    expected = (score[choices].sum(0).exp() * bound).sum()
    truth = torch.autograd.grad(expected, [theta, phi])

    n = 100_000
    thetas = theta.detach().expand(n, -1).clone().requires_grad_()
    phis = phi.detach().expand(n, -1).clone().requires_grad_()
    g = torch.Generator().manual_seed(3)
    probs = torch.sigmoid(phis.detach()).expand(SAMPLES, -1, -1)
    z = torch.bernoulli(probs, generator=g)
    q = bernoulli_score(z, phis)
    index = (z @ torch.tensor([2.0, 1.0], dtype=torch.float64)).long()
    log_p = torch.gather(torch.log_softmax(thetas, 1) - 1.0, 1, index.T).T
    vimco = importance_weighted_bound(log_p - q, "vimco", log_q=q)
    grads = torch.autograd.grad(vimco.sum(), [thetas, phis], retain_graph=True)
    assert_mean(vimco.detach(), expected.item(), what="value")
    assert_mean(grads[0].T, truth[0], what="model")
    assert_mean(grads[1].T, truth[1], what="inference")
    # and the score function alone, without the baseline, is as unbiased but noisier
    plain = plain_bound(log_p - q)
    naive = plain + plain.detach() * (q - q.detach()).sum(0)
    (noisy,) = torch.autograd.grad(naive.sum(), phis)
    assert_mean(noisy.T, truth[1], what="score function")
    assert (grads[1].std(0) < 0.5 * noisy.std(0)).all()


def signal_of(log_w: Tensor) -> Tensor:
    q = torch.zeros_like(log_w, requires_grad=True)
    bound = importance_weighted_bound(log_w, "vimco", log_q=q)
    return torch.autograd.grad(bound.sum(), q)[0]


def exact_signal(log_w: Tensor) -> Tensor:
    """By definition, in sixty digits."""
    import mpmath

    mpmath.mp.dps = 60
    values = [mpmath.mpf(x) if x > -math.inf else None for x in log_w.tolist()]
    e = [mpmath.mpf(0) if v is None else mpmath.exp(v) for v in values]
    total, logs = sum(e), sum(v for v in values if v is not None)
    zeros = values.count(None)
    result = []
    for v, x in zip(values, e, strict=True):
        dead = zeros > (v is None)
        g = 0 if dead else mpmath.exp((logs - (v or 0)) / (len(e) - 1))
        rest = total - x + g
        result.append(float(mpmath.log(total / rest)) if rest > 0 else math.inf)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(
    "log_w",
    [
        (0.0, 0.0),
        (1.0, -2.0, 0.5),
        (0.0, -40.0, -41.0),  # one dominant weight
        (-1e4, -1.02e4, -1.0001e4, -1.5e4),
        (1e4, 0.9e4, 0.99e4),
        (0.0, -math.inf, -1.0),
        (5.0, 5.0, 5.0, 5.0, 5.0),
        tuple(np.linspace(-3, 3, 4001)),
    ],
    ids=["equal", "few", "dominant", "low", "high", "a zero", "all equal", "many"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vimco_signal_keeps_its_digits(log_w, dtype):
    log_w = torch.tensor(log_w, dtype=dtype)
    actual, expected = signal_of(log_w).double(), exact_signal(log_w.double())
    eps = torch.finfo(dtype).eps
    # what is rounded: log-weights relative to the largest, whose mean is exponentiated
    floor = expected.abs().mean() * 8 * eps
    torch.testing.assert_close(actual, expected, rtol=400 * eps, atol=floor.item())


def test_vimco_where_nothing_is_left():
    inf = math.inf
    assert signal_of(torch.tensor([-inf, -inf, -inf])).tolist() == [0, 0, 0]
    first, *others = signal_of(torch.tensor([1.0, -inf, -inf])).tolist()
    assert first == inf  # without it, nothing: log 0
    assert others == [0, 0]


def test_vimco_sends_nothing_where_it_is_left_out_of_the_loss():
    """The signal of the first datapoint is infinite: 0 * inf would be NaN."""
    log_w = torch.tensor([[1.0, 0.5], [-math.inf, 0.0]])
    q = torch.zeros(2, 2, requires_grad=True)
    bound = importance_weighted_bound(log_w, "vimco", log_q=q)
    (grad,) = torch.autograd.grad((bound * torch.tensor([0.0, 1.0])).sum(), q)
    assert (grad[:, 0] == 0).all()
    assert (grad[:, 1] != 0).all()


# --- values at the edge ---------------------------------------------------------------------------


def bound_and_grad(log_w, estimator="iwae", **more):
    log_w = torch.as_tensor(log_w).clone().requires_grad_()
    bound = importance_weighted_bound(log_w, estimator, **more)
    return bound.detach(), torch.autograd.grad(bound.sum(), log_w)[0]


def test_all_weights_zero():
    inf = math.inf
    bound, grad = bound_and_grad([[-inf, 0.0], [-inf, 0.0], [-inf, -inf]])
    assert bound[0] == -inf
    assert bound[1].item() == pytest.approx(math.log(2 / 3))
    assert grad.tolist() == [[0, 0.5], [0, 0.5], [0, 0]]
    x = torch.full((2, 3, 4), -inf)
    for estimator in ("miwae", "piwae", "dreg"):
        x.requires_grad_()
        shaped = x if estimator != "dreg" else x[0]
        if estimator == "miwae":
            bound = importance_weighted_bound(shaped, estimator)
        else:
            bound = importance_weighted_bound(lambda z: z + 0.0, estimator, z=shaped)
        assert (bound == -inf).all()
        assert (torch.autograd.grad(bound.sum(), x)[0] == 0).all()


def test_infinity_and_nan_stay_in_their_datapoint():
    inf, nan = math.inf, math.nan
    bound, grad = bound_and_grad([[inf, nan, 1.0, -inf], [0.0, 0.0, 1.0, 2.0]])
    assert bound[0] == inf
    assert bound[1].isnan()
    assert bound[2:].tolist() == pytest.approx([1.0, 2 - math.log(2)])
    assert grad[:, 1].isnan().all()
    assert grad[:, 2:].tolist() == [[0.5, 0], [0.5, 1]]


def test_one_sample_is_exact():
    log_w = noise(1, 100).float() * 1e4
    bound, grad = bound_and_grad(log_w)
    assert torch.equal(bound, log_w[0])
    assert torch.equal(grad, torch.ones(1, 100))


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_equal_weights_are_exact(offset):
    bound, grad = bound_and_grad(torch.full((7, 3), offset))
    assert torch.equal(bound, torch.full((3,), offset))
    torch.testing.assert_close(grad, torch.full((7, 3), 1 / 7), rtol=2e-7, atol=0)


def test_large_log_weights_keep_normalised_weights():
    """Relative to the bound, which float32 rounds to 1e-3 here, they would add up to 1.0003."""
    log_w = (noise(50, 200) * 3 - 1e4).float()
    bound, grad = bound_and_grad(log_w)
    torch.testing.assert_close(bound.double(), plain_bound(log_w.double()), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(grad.sum(0), torch.ones(200), rtol=5e-7, atol=0)
    torch.testing.assert_close(
        grad.double(), torch.softmax(log_w.double(), 0), rtol=2e-6, atol=1e-30
    )


def test_one_dominant_weight():
    log_w = torch.zeros(1000, 2)
    log_w[123] = 200.0
    bound, grad = bound_and_grad(log_w)
    torch.testing.assert_close(bound, torch.full((2,), 200 - math.log(1000)))
    assert (grad[123] == 1).all()
    assert (grad.sum(0) == 1).all()


def test_a_million_samples():
    log_w = noise(1_000_000, 2).float()
    bound, grad = bound_and_grad(log_w)
    # the largest, 5, plus the log of the mean relative to it, -4.5: a rounding of each
    torch.testing.assert_close(bound.double(), plain_bound(log_w.double()), rtol=0, atol=5e-7)
    assert grad.double().sum(0).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_piwae_reaches_samples_whose_group_weighs_nothing():
    """v / w is 0 / 0 in float32 for the second group: its gradient must not vanish."""
    z = torch.tensor([[0.0, 1.0, 2.0], [-150.0, -151.0, -152.0]], requires_grad=True)
    theta = torch.ones((), requires_grad=True)
    bound = importance_weighted_bound(lambda z: theta * z, "piwae", z=z)
    grad, model = torch.autograd.grad(bound, [z, theta])
    expected = torch.softmax(z.detach(), 1) / 2
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
    flat = torch.softmax(z.detach().flatten(), 0)
    torch.testing.assert_close(model, (flat * z.detach().flatten()).sum())


def test_gradient_lies_as_the_weights_do():
    log_w = torch.randn(50, 100, requires_grad=True)
    (grad,) = torch.autograd.grad(importance_weighted_bound(log_w).sum(), log_w)
    assert grad.is_contiguous()
    odd = torch.randn(5, 3, 4, 6).permute(3, 1, 0, 2)[:, :, ::2].requires_grad_()
    bound = importance_weighted_bound(odd)
    torch.testing.assert_close(bound, plain_bound(odd))
    (grad,) = torch.autograd.grad(bound.sum(), odd)
    torch.testing.assert_close(grad, torch.softmax(odd.detach(), 0))


def test_func_transforms():
    log_w = noise(4, 3)
    grad = torch.func.grad(lambda x: importance_weighted_bound(x).sum())(log_w)
    torch.testing.assert_close(grad, torch.softmax(log_w, 0))
    each = torch.func.vmap(importance_weighted_bound, in_dims=1)(log_w)
    torch.testing.assert_close(each, plain_bound(log_w))
    for estimator in ("dreg", "rws", "vimco"):

        def loss(x, estimator=estimator):
            if estimator == "dreg":
                return importance_weighted_bound(lambda z: z * 2.0, "dreg", z=x).sum()
            return importance_weighted_bound(x * 1.0, estimator, log_q=x).sum()

        x = log_w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.func.grad(loss)(log_w), expected)


def test_forward_mode_of_an_estimator_that_is_no_gradient_raises():
    x = noise(4, 3)
    for estimator in ("rws", "vimco"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(
                lambda x, e=estimator: importance_weighted_bound(-x, e, log_q=x), (x,), (x,)
            )
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: importance_weighted_bound(torch.neg, "dreg", z=x), (x,), (x,))


def test_no_copy_of_x_for_each_sample(monkeypatch):
    """[K, B, D] logits, their gradient and the derivative kept for it; x stays [B, D]."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).resolve().parent.parent)])
    from bench.measure import peak_bytes

    samples, batch, pixels = 20, 16, 500
    x = torch.bernoulli(torch.rand(batch, pixels))
    logits = torch.randn(samples, batch, pixels, requires_grad=True)
    ratio = torch.randn(samples, batch, requires_grad=True)

    def step(x):
        log_w = fastvae.bernoulli_log_prob(x, logits) + ratio
        bound = importance_weighted_bound(log_w)
        return bound, *torch.autograd.grad(bound.sum(), [logits, ratio])

    full = 4 * logits.numel()
    step(x)
    shared = peak_bytes(lambda: step(x), [x, logits, ratio])
    repeated = peak_bytes(lambda: step(x.repeat(samples, 1, 1)), [x, logits, ratio])
    assert shared < 1.1 * full  # the derivative
    assert repeated > 1.9 * full


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"estimator": "IWAE"}, ValueError, "estimator must be one of elbo, .*, got 'IWAE'"),
        ({"estimator": "dreg"}, ValueError, "z must be given for dreg, got None"),
        ({"estimator": "piwae"}, ValueError, "z must be given for piwae, got None"),
        ({"estimator": "rws"}, ValueError, "log_q must be given for rws, got None"),
        ({"estimator": "vimco"}, ValueError, "log_q must be given for vimco, got None"),
        ({"z": torch.zeros(3, 4)}, ValueError, "z must go with dreg and piwae only, .* iwae"),
        ({"log_q": torch.zeros(3, 4)}, ValueError, "log_q must go with rws and vimco only"),
        ({"beta": 0.5}, ValueError, "beta must go with ciwae only, got it with iwae"),
        ({"estimator": "ciwae", "beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        (
            {"estimator": "dreg", "z": torch.zeros(3, 4)},
            TypeError,
            "log_w must be a function of z for dreg, got Tensor",
        ),
        ({"log_w": lambda z: z}, TypeError, "log_w must be a tensor for iwae, got function"),
        (
            {"log_w": lambda z: None, "estimator": "dreg", "z": torch.zeros(3)},
            TypeError,
            "log_w must return a tensor, got NoneType",
        ),
        ({"log_w": torch.zeros(3).long()}, TypeError, "log_w must be floating-point, got"),
        ({"log_w": torch.tensor(1.0)}, ValueError, r"must be \[K, ...\] for iwae, got \[\]"),
        (
            {"log_w": torch.zeros(3), "estimator": "miwae"},
            ValueError,
            r"must be \[M, K, ...\] for miwae, got \[3\]",
        ),
        ({"log_w": torch.zeros(0, 4)}, ValueError, r"have at least one sample, got \[0, 4\]"),
        (
            {"log_w": torch.zeros(3, 0, 4), "estimator": "miwae"},
            ValueError,
            r"have at least one sample, got \[3, 0, 4\]",
        ),
        (
            {"log_w": torch.zeros(1, 4), "estimator": "vimco", "log_q": torch.zeros(1, 4)},
            ValueError,
            r"have at least two samples for vimco, got \[1, 4\]",
        ),
        (
            {"estimator": "rws", "log_q": torch.zeros(4)},
            ValueError,
            r"log_q must have the shape of log_w, got \[4\] and \[3, 4\]",
        ),
        (
            {"log_w": lambda z: z.sum(0), "estimator": "dreg", "z": torch.zeros(3, 4, 2)},
            ValueError,
            r"z must begin with the shape of log_w, got \[3, 4, 2\] and \[4, 2\]",
        ),
    ],
)
def test_errors(arguments, error, message):
    arguments = {"log_w": torch.zeros(3, 4), **arguments}
    with pytest.raises(error, match="^fastvae::importance_weighted_bound: .*" + message):
        importance_weighted_bound(**arguments)
