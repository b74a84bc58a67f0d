"""The score function's gradient: with baselines and controls, of terms that meet, of every sample.

The truth is exact: a belief network whose latent configurations can be listed. What is random must
lie within four standard errors of it, parameter by parameter, and every such check is shown to
catch an estimator that is wrong.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from chance import assert_mean, generator, normal
from torch import Tensor, nn

import fastvae
from fastvae import (
    leave_one_out,
    rao_blackwell_bound,
    score_function_bound,
)
from fastvae.estimators import MovingAverage

INF, NAN = math.inf, math.nan


# --- a sigmoid belief network: x <- z1 <- z2, and q(z1 | x) q(z2 | z1): 128 configurations --------

X, Z1, Z2 = 5, 4, 3
SHAPES = {
    "prior": (Z2,),
    "w1": (Z1, Z2),
    "b1": (Z1,),
    "w0": (X, Z1),
    "b0": (X,),
    "r1": (Z1, X),
    "c1": (Z1,),
    "c2": (Z2,),
    "r2": (Z2, Z1),
}
Q = slice(-(Z1 * X + Z1 + Z2 + Z2 * Z1), None)  # the parameters of q, in the order of SHAPES
DEEP = slice(-(Z2 + Z2 * Z1), None)  # and of q(z2 | z1)
FACTORS, TERMS = Z1 + Z2, Z2 + Z1 + 1
CONFIGURATIONS = torch.tensor(
    list(itertools.product((0.0, 1.0), repeat=FACTORS)), dtype=torch.float64
)
DATA = torch.tensor(
    [[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.float64
)  # three images, of very different probability
REPLICATES = 16_000

Parameters = dict[str, Tensor]


def parameters(*replicates: int) -> Parameters:
    """Each once per replicate, so that gradients come per replicate too."""
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        scale = {"r1": 0.6, "c1": 0.6, "c2": 0.6, "r2": 3.0}.get(name, 1.5)
        value = scale * normal(*shape, seed=seed)
        found[name] = value.expand(*replicates, *shape).clone().requires_grad_()
    return found


def affine(w: Tensor, z: Tensor, b: Tensor) -> Tensor:
    return (w @ z.unsqueeze(-1)).squeeze(-1) + b


def each_bit(z: Tensor, logits: Tensor) -> Tensor:
    return fastvae.bernoulli_log_prob(z.unsqueeze(-1), logits.unsqueeze(-1))


def log_probs(p: Parameters, x: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Of the model, term by term [..., z2 z1 x]; of q, bit by bit [..., z1 z2]."""
    of_x = fastvae.bernoulli_log_prob(x, affine(p["w0"], z1, p["b0"]))
    log_p = torch.cat(
        (
            each_bit(z2, p["prior"].expand_as(z2)),
            each_bit(z1, affine(p["w1"], z2, p["b1"])),
            of_x.unsqueeze(-1),
        ),
        -1,
    )
    q1 = each_bit(z1, affine(p["r1"], x, p["c1"]).expand_as(z1))
    return log_p, torch.cat((q1, each_bit(z2, affine(p["r2"], z1, p["c2"]))), -1)


@torch.no_grad()
def draw(p: Parameters, x: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    probs = torch.sigmoid(affine(p["r1"], x, p["c1"])).expand(samples, *x.shape[:-1], Z1)
    z1 = torch.bernoulli(probs, generator=g)
    z2 = torch.bernoulli(torch.sigmoid(affine(p["r2"], z1, p["c2"])), generator=g)
    return z1, z2


def batch(samples: int, replicates: int, seed: int):
    """Parameters, images, and log-probabilities of samples [K, 3, replicates, ...]."""
    p = parameters(len(DATA), replicates)
    x = DATA[:, None].expand(-1, replicates, -1)
    return p, x, *log_probs(p, x, *draw(p, x, samples, seed))


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    """The bound of each image [3], and its gradient [3, P], summed over all configurations."""
    values, grads = [], []
    for x in DATA:
        p = parameters()
        log_p, log_q = log_probs(
            p, x.expand(len(CONFIGURATIONS), X), CONFIGURATIONS[:, :Z1], CONFIGURATIONS[:, Z1:]
        )
        log_p, log_q = log_p.sum(-1), log_q.sum(-1)
        torch.testing.assert_close(log_q.exp().sum().item(), 1.0)
        value = (log_q.exp() * (log_p - log_q)).sum()
        grads.append(flat(torch.autograd.grad(value, list(p.values())), 0))
        values.append(value.detach())
    return torch.stack(values), torch.stack(grads)


def flat(grads, dims: int) -> Tensor:
    return torch.cat([g.flatten(dims) for g in grads], -1)


def gradients(estimate, samples: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Values [3, N] and gradients [3, N, P] of ``estimate(log_p, log_q, x)``."""
    p, x, log_p, log_q = batch(samples, REPLICATES, seed)
    bound = estimate(log_p, log_q, x)
    assert bound.shape == x.shape[:-1]
    return bound.detach(), flat(torch.autograd.grad(bound.sum(), list(p.values())), 2)


def whole(**options):
    """An estimate of the joint log-probabilities; ``baseline`` may be a function of x."""

    def estimate(log_p: Tensor, log_q: Tensor, x: Tensor) -> Tensor:
        more = {k: v(x) if k == "baseline" else v for k, v in options.items()}
        return score_function_bound(log_p.sum(-1), log_q.sum(-1), **more)

    return estimate


# Which terms depend on which bit. z2 is drawn from z1, so that all of z2's terms depend on z1.
P_DEPENDS = torch.zeros(FACTORS, TERMS, dtype=torch.bool)
P_DEPENDS[:Z1] = True
P_DEPENDS[Z1:, Z2:-1] = True  # p(z1 | z2)
P_DEPENDS[Z1:, :Z2] = torch.eye(Z2).bool()
Q_DEPENDS = torch.eye(FACTORS).bool()
Q_DEPENDS[:Z1, Z1:] = True


def local(p_depends: Tensor = P_DEPENDS, q_depends: Tensor = Q_DEPENDS, **options):
    def estimate(log_p: Tensor, log_q: Tensor, x: Tensor) -> Tensor:
        return rao_blackwell_bound(log_p, log_q, p_depends, q_depends, **options)

    return estimate


def warm(estimate, module: MovingAverage) -> MovingAverage:
    """Fill the state from other samples, and freeze it."""
    _, x, log_p, log_q = batch(2, 300, seed=77)
    for _ in range(3):
        estimate(log_p, log_q, x)
    return module.eval()


def test_score_functions_are_unbiased_and_controls_take_variance_away(truth, network):
    average, normalizer = MovingAverage(), MovingAverage(normalize=True)
    per_factor = MovingAverage(shape=(FACTORS,))

    def predict(x: Tensor) -> Tensor:
        return network(x).squeeze(-1)

    estimators = {
        "plain": whole(),
        "average": whole(control=average),
        "learnt": whole(baseline=predict),
        "nvil": whole(baseline=predict, control=normalizer),
        "leave one out": whole(control=leave_one_out),
        "local": local(),
        "local, average": local(control=per_factor),
        "local, leave one out": local(control=leave_one_out),
    }
    warm(estimators["average"], average)
    warm(estimators["nvil"], normalizer)
    warm(estimators["local, average"], per_factor)
    scale = normalizer.variance.sqrt()
    assert scale > 1.5  # so that normalising does something

    variance, deep = {}, {}
    for name, estimate in estimators.items():
        value, grads = gradients(estimate)
        if name == "nvil":
            grads[..., Q] *= scale  # normalising is a learning rate of q
        assert_mean(value, truth[0], 1)
        assert_mean(grads, truth[1], 1)
        variance[name] = grads[..., Q].var(1).sum().item()
        deep[name] = grads[..., DEEP].var(1).sum().item()

    # measured: 0.12, 0.21, 0.10 of plain
    assert variance["average"] < 0.3 * variance["plain"]
    assert variance["leave one out"] < 0.5 * variance["plain"]
    assert variance["nvil"] < 0.25 * variance["plain"]
    assert variance["nvil"] < variance["average"]  # the images differ in what they can reach
    # Of z2, on which half of the terms do not depend: measured 0.28, 0.56, 0.53. Of z1 the local
    # signal alone is worse than the whole one, 1.1 times plain: what it leaves out was log q of the
    # other bits, of the other sign. Centred, it is ahead.
    assert deep["local"] < 0.6 * deep["plain"]
    assert deep["local, leave one out"] < 0.9 * deep["leave one out"]
    assert deep["local, average"] < 0.8 * deep["average"]
    assert variance["local, leave one out"] < 0.95 * variance["leave one out"]  # measured 0.85


@pytest.fixture(scope="module")
def network() -> nn.Linear:
    """A baseline learnt through the surrogate itself, as a user does."""
    torch.manual_seed(0)
    network = nn.Linear(X, 1).double()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(200):
        _, x, log_p, log_q = batch(1, 32, seed=1000 + step)
        bound = score_function_bound(log_p.sum(-1), log_q.sum(-1), network(x).squeeze(-1))
        optimizer.zero_grad()
        (-bound.mean()).backward()
        optimizer.step()
    return network


def test_a_learnt_baseline_goes_to_the_expected_signal(truth, network):
    off = network(DATA).squeeze(-1) - truth[0]
    assert off.abs().max() < 0.5  # of signals with a deviation of 3.5


class UpdatesFirst(MovingAverage):
    """Algorithm 1 of NVIL to the letter, but for the division: its mean has seen the sample."""

    def forward(self, signal: Tensor) -> Tensor:
        self._update(signal)
        return signal.detach() - self.mean


@pytest.mark.parametrize("right", [True, False], ids=["right", "updates first"])
def test_a_moving_average_must_not_have_seen_the_sample(truth, right):
    """Each replicate with a state of its own, from one call before, on other samples."""
    kind = MovingAverage if right else UpdatesFirst
    average = kind(0.6, shape=(len(DATA), REPLICATES))
    estimate = whole(control=average)
    gradients(estimate, samples=1, seed=2)
    value, grads = gradients(estimate, samples=1, seed=3)
    assert_mean(value, truth[0], 1)
    if right:
        assert_mean(grads, truth[1], 1)
    else:
        with pytest.raises(AssertionError):
            assert_mean(grads, truth[1], 1)


def sees_itself(log_p: Tensor, log_q: Tensor, x: Tensor) -> Tensor:
    signal = (log_p.sum(-1) - log_q.sum(-1)).detach()
    return score_function_bound(log_p.sum(-1), log_q.sum(-1), baseline=0.3 * signal)


def blanket_alone() -> Tensor:
    """The terms in which z1 occurs: without p(z2), although z2 is drawn from z1."""
    depends = P_DEPENDS.clone()
    depends[:Z1, :Z2] = False
    return depends


@pytest.mark.parametrize(
    "wrong",
    [
        whole(control=lambda s: s - s.mean(0)),
        sees_itself,
        local(p_depends=blanket_alone()),
        local(q_depends=torch.eye(FACTORS).bool()),
        lambda log_p, log_q, x: (log_p.sum(-1) - log_q.sum(-1)).mean(0),
    ],
    ids=["own sample in the mean", "baseline of the sample", "p too local", "q too local", "path"],
)
def test_the_check_catches_what_is_biased(truth, wrong):
    value, grads = gradients(wrong)
    assert_mean(value, truth[0], 1)
    assert_mean(grads[..., : Q.start], truth[1][..., : Q.start], 1)  # the model is never wrong
    with pytest.raises(AssertionError):
        assert_mean(grads, truth[1], 1)


def test_no_variance_where_q_is_the_posterior():
    """The signal is log p(x) for every sample: its own mean takes away all of it."""
    logits = normal(6, seed=3).requires_grad_()
    z = torch.bernoulli(torch.sigmoid(logits.detach()).expand(4, 9, 6), generator=generator())
    log_q = fastvae.bernoulli_log_prob(z, logits)
    bound = score_function_bound(log_q.detach() - 3.0, log_q, control=leave_one_out)
    torch.testing.assert_close(bound.detach(), torch.full((9,), -3.0, dtype=torch.float64))
    (grad,) = torch.autograd.grad(bound.sum(), logits)
    assert grad.abs().max() < 1e-12


# --- sample by sample, against the formula written out --------------------------------------------


def small(samples: int = 3, dtype: torch.dtype = torch.float64):
    """theta, phi and functions of them, [K, 4], for log p and log q."""
    theta = normal(4, seed=1).to(dtype).requires_grad_()
    phi = normal(4, seed=2).to(dtype).requires_grad_()
    a, b = (normal(samples, 4, seed=s).to(dtype) for s in (3, 4))
    return theta, phi, theta * a - 1.0, torch.tanh(phi * b)


CONTROLS = {
    "plain": lambda s: s,
    "leave one out": lambda s: torch.stack(
        [s[k] - torch.cat((s[:k], s[k + 1 :])).mean(0) for k in range(len(s))]
    ),
    "average": lambda s: s - 0.25,
    "normalized": lambda s: (s - 0.25) / 2.0,
}


def control(name: str):
    if name in ("plain", "leave one out"):
        return {"plain": None, "leave one out": leave_one_out}[name]
    module = MovingAverage(normalize=name == "normalized").eval()
    module.mean.fill_(0.25)
    module.variance.fill_(4.0)
    return module


each_control = pytest.mark.parametrize("name", CONTROLS)


@each_control
@pytest.mark.parametrize("with_baseline", [False, True], ids=["", "baseline"])
def test_gradient_of_every_sample_is_the_formulas(name, with_baseline):
    theta, phi, log_p, log_q = small()
    psi = normal(4, seed=5).requires_grad_()
    baseline = torch.exp(psi) if with_baseline else None
    bound = score_function_bound(log_p, log_q, baseline, control=control(name))
    torch.testing.assert_close(bound, (log_p - log_q).mean(0))
    scale = torch.linspace(-2, 3, 4, dtype=torch.float64)  # what comes from above counts once
    wrt = [theta, phi, psi] if with_baseline else [theta, phi]
    actual = torch.autograd.grad((scale * bound).sum(), wrt, retain_graph=True)

    signal = (log_p - log_q).detach() - (psi.detach().exp() if with_baseline else 0.0)
    signal = CONTROLS[name](signal)
    by_hand = log_p + signal * log_q + (signal * psi.exp() if with_baseline else 0.0)
    expected = torch.autograd.grad((scale * by_hand.mean(0)).sum(), wrt)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_local_signals_are_those_of_the_terms_met():
    """Against loops; and where all depend on all, the gradient of the joint."""
    log_p, log_q = normal(3, 4, 5), normal(3, 4, 2, seed=1).requires_grad_()
    p_depends = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    q_depends = torch.tensor([[0, 1], [0, 0]]).bool()  # the diagonal is added
    bound = rao_blackwell_bound(log_p, log_q, p_depends, q_depends)
    torch.testing.assert_close(bound, (log_p.sum(-1) - log_q.sum(-1)).mean(0))
    (grad,) = torch.autograd.grad(bound.sum(), log_q)
    q = log_q.detach()
    first = log_p[..., 0] + log_p[..., 2] + log_p[..., 3] - q[..., 0] - q[..., 1]
    second = log_p[..., 1] + log_p[..., 2] - q[..., 1]
    expected = torch.stack((first, second), -1) / 3
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)

    everything = torch.ones(2, 5).bool(), torch.ones(2, 2).bool()
    for options in ({}, {"control": leave_one_out}, {"baseline": 1.5}):
        bounds = (
            rao_blackwell_bound(log_p, log_q, *everything, **options),
            score_function_bound(log_p.sum(-1), log_q.sum(-1), **options),
        )
        one, other = (torch.autograd.grad(b.sum(), log_q)[0] for b in bounds)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(), (4, 2), (3, 4, 2), (4, 1), (3, 4, 1)], ids=str)
def test_local_baselines(shape):
    log_p, log_q = normal(3, 4, 5), normal(3, 4, 2, seed=1).requires_grad_()
    masks = torch.ones(2, 5).bool(), torch.ones(2, 2).bool()
    baseline = normal(*shape, seed=2).requires_grad_()
    bound = rao_blackwell_bound(log_p, log_q, *masks, baseline)
    of_q, of_baseline = torch.autograd.grad(bound.sum(), [log_q, baseline])
    signal = (log_p.sum(-1) - log_q.detach().sum(-1)).unsqueeze(-1) - baseline.detach()
    torch.testing.assert_close(of_q, signal.expand(3, 4, 2) / 3)
    torch.testing.assert_close(of_baseline, (signal.expand(3, 4, 2) / 3).sum_to_size(shape))


def test_local_sums_are_not_rounded_by_autocast():
    log_p, log_q = 100 * normal(3, 4, 5).float(), normal(3, 4, 2).float().requires_grad_()
    masks = torch.ones(2, 5).bool(), torch.eye(2).bool()

    def gradient() -> Tensor:
        return torch.autograd.grad(rao_blackwell_bound(log_p, log_q, *masks).sum(), log_q)[0]

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(), expected)


def test_leave_one_out_by_hand_and_without_cancellation():
    signal = normal(5, 3)
    torch.testing.assert_close(leave_one_out(signal), CONTROLS["leave one out"](signal))
    assert torch.equal(leave_one_out(torch.full((4, 3), 1e30)), torch.zeros(4, 3))


# --- the state of a moving average ----------------------------------------------------------------


def test_moving_average_is_that_of_the_batches_before():
    average, batches = MovingAverage(0.9, normalize=True), [normal(4, 5, seed=s) for s in range(5)]
    for t, x in enumerate(batches):
        weights = torch.tensor([0.9 ** (t - 1 - i) for i in range(t)], dtype=torch.float64)
        weights = weights / weights.sum()
        mean = sum(w * b.mean() for w, b in zip(weights, batches[:t], strict=True))
        variance = sum(w * b.var(correction=0) for w, b in zip(weights, batches[:t], strict=True))
        expected = (x - mean) / max(1.0, math.sqrt(variance))
        torch.testing.assert_close(average(3 * x) / 3 if t == 0 else average(x), expected)
        if t == 0:  # start again, from the batch itself
            average = MovingAverage(0.9, normalize=True)
            average(x)
    torch.testing.assert_close(average.weight.item(), 1 - 0.9**5)


def test_moving_average_has_one_state_per_entry_of_shape():
    average = MovingAverage(shape=(2,))
    signal = normal(3, 4, 2) * torch.tensor([1.0, 10.0]) + torch.tensor([5.0, -5.0])
    average(signal)
    torch.testing.assert_close(average.mean, signal.mean((0, 1)).float())
    torch.testing.assert_close(average.variance, signal.var((0, 1), correction=0).float())
    torch.testing.assert_close(average(signal), signal - average.mean, atol=1e-5, rtol=0)


def test_evaluation_mode_reads_only():
    average = MovingAverage()
    average(normal(4, 5))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    average.eval()(normal(4, 5, seed=1))
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())


@pytest.mark.parametrize("bad", [INF, -INF, NAN, 1e30])
def test_what_is_not_finite_leaves_no_trace_in_the_state(bad):
    """Also 1e30, whose square is not."""
    average = MovingAverage(normalize=True, shape=(2,))
    average(normal(3, 4, 2, dtype=torch.float32))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    signal = normal(3, 4, 2, seed=1, dtype=torch.float32)
    finite = signal.clone()
    signal[:, :, 0] = bad
    assert average(signal)[..., 1].isfinite().all()
    for name, buffer in average.state_dict().items():
        assert torch.equal(buffer[0], before[name][0])
        assert buffer[1] != before[name][1]
    if math.isinf(bad) or math.isnan(bad):  # among others: as if it were not there
        other = MovingAverage(normalize=True, shape=(2,))
        other.load_state_dict(before)
        other(torch.cat([finite, torch.full((1, 4, 2), bad)]))
        again = MovingAverage(normalize=True, shape=(2,))
        again.load_state_dict(before)
        again(finite)
        torch.testing.assert_close(other.state_dict(), again.state_dict())


def test_the_state_survives_a_checkpoint_and_an_empty_batch():
    average = MovingAverage(0.5, normalize=True)
    average(10 * normal(4, 5))
    again = MovingAverage(0.5, normalize=True)
    again.load_state_dict(average.state_dict())
    empty = average(torch.zeros(4, 0))
    assert empty.shape == (4, 0)
    x = normal(4, 5, seed=1)
    assert torch.equal(average(x), again(x))
    assert torch.equal(average(x), again(x))
    assert "decay=0.5, normalize=True, shape=()" in repr(average)


# --- what is not finite ---------------------------------------------------------------------------


@each_control
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_stays_in_its_datapoint(name, bad):
    _, _, log_p, log_q = small()
    log_p, log_q = log_p.detach(), log_q.detach().requires_grad_()
    baseline = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    clean = score_function_bound(log_p, log_q, baseline, control=control(name))
    expected = torch.autograd.grad(clean.sum(), [log_q, baseline])
    log_p[1, 2] = bad

    def estimate() -> Tensor:
        return score_function_bound(log_p, log_q, baseline, control=control(name))

    bound = estimate()
    assert not bound[2].isfinite()
    others = [0, 1, 3]
    torch.testing.assert_close(bound[others], clean[others])
    of_q, of_baseline = torch.autograd.grad(bound.sum(), [log_q, baseline])
    torch.testing.assert_close(of_q[:, others], expected[0][:, others])
    assert not of_q[1, 2].isfinite()  # where a gradient scaler sees it
    torch.testing.assert_close(of_baseline[others], expected[1][others])
    assert of_baseline.isfinite().all()

    bound = estimate()  # left out of the loss, it sends nothing
    of_q, of_baseline = torch.autograd.grad(bound[bound.isfinite()].sum(), [log_q, baseline])
    torch.testing.assert_close(of_q[:, others], expected[0][:, others])
    assert (of_q[:, 2] == 0).all()
    assert of_baseline.isfinite().all()


def test_an_infinite_term_shows_in_the_factors_that_meet_it():
    log_p, log_q = normal(2, 3, 3), normal(2, 3, 3).requires_grad_()
    log_p[0, :, 0] = torch.tensor([-INF, INF, NAN])
    own = torch.eye(3).bool()
    (grad,) = torch.autograd.grad(rao_blackwell_bound(log_p, log_q, own, own).sum(), log_q)
    assert torch.equal(grad[0, :2, 0], torch.tensor([-INF, INF]).double())
    assert grad[0, 2, 0].isnan()
    assert grad[..., 1:].isfinite().all()
    log_p[0, 0, 1] = INF
    both = torch.ones(3, 3).bool()
    (grad,) = torch.autograd.grad(rao_blackwell_bound(log_p, log_q, both, own).sum(), log_q)
    assert grad[0, 0].isnan().all()  # inf - inf


def test_a_gradient_scaler_skips_the_step():
    logits = torch.zeros(4, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD([logits], 1.0)
    for log_p, moved in ((-INF, False), (-2.0, True)):
        log_q = fastvae.bernoulli_log_prob(torch.ones(1, 1, 4), logits)
        bound = score_function_bound(torch.full((1, 1), log_p), log_q)
        optimizer.zero_grad()
        scaler.scale(-bound.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(logits.any()) == moved
        assert logits.isfinite().all()


# --- how it composes ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_state_and_a_learnt_baseline(backend):
    """NVIL in local form, twice: the second step reads what the first has written."""
    torch._dynamo.reset()
    masks = torch.ones(2, 3).bool(), torch.eye(2).bool()
    log_p, log_q = normal(3, 4, 3), normal(3, 4, 2, seed=1).requires_grad_()
    x, network = normal(4, 5, seed=2), nn.Linear(5, 2).double()

    def two_steps(step, average):
        found = []
        for _ in range(2):
            bound = step(log_p, log_q, x, average)
            wrt = [log_q, *network.parameters()]
            found.append((bound, *torch.autograd.grad((1.5 * bound).sum(), wrt)))
        return found, average.state_dict()

    def step(log_p, log_q, x, average):
        return rao_blackwell_bound(log_p, log_q, *masks, network(x), control=average)

    # A state in float32 would round a mean that the two sum in another order.
    expected = two_steps(step, MovingAverage(normalize=True, shape=(2,)).double())
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    actual = two_steps(compiled, MovingAverage(normalize=True, shape=(2,)).double())
    torch.testing.assert_close(actual, expected)


def test_compile_leave_one_out():
    torch._dynamo.reset()
    _, phi, log_p, log_q = small()

    def step(log_p, log_q):
        return score_function_bound(log_p, log_q, control=leave_one_out)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(log_p, log_q).sum(), phi, retain_graph=True)[0]
        for f in (step, compiled)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_control
def test_half_types_give_float32(name, dtype):
    """Signals of -300 nats, which a half type knows to a quarter of a nat at best."""
    log_p, log_q = (x.to(dtype) for x in (normal(3, 4) - 300, normal(3, 4, seed=1)))
    found = []
    for wide in (False, True):
        p, q = (x.float() if wide else x.clone() for x in (log_p, log_q))
        q.requires_grad_()
        bound = score_function_bound(p, q, -300.0, control=control(name))
        assert bound.dtype == torch.float32
        (grad,) = torch.autograd.grad(bound.sum(), q)
        assert grad.dtype == q.dtype
        found.append((bound, grad.float()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.01, atol=1e-3)


def test_a_second_derivative_holds_the_signal_constant():
    seconds = []
    for surrogate in (True, False):
        theta, phi, log_p, log_q = small()
        if surrogate:
            y = score_function_bound(log_p, log_q, control=leave_one_out)
        else:
            y = (log_p + leave_one_out(log_p - log_q) * log_q).mean(0)
        first = torch.autograd.grad(y.sum(), [theta, phi], create_graph=True)
        seconds.append(torch.autograd.grad(first[1].square().sum(), phi)[0])
    torch.testing.assert_close(*seconds)
    assert seconds[0].abs().min() > 1e-3


def test_func_transforms_and_forward_mode():
    log_p, log_q = normal(3, 4), normal(3, 4, seed=1)

    def loss(log_q: Tensor, log_p: Tensor) -> Tensor:
        return score_function_bound(log_p, log_q, control=leave_one_out).sum()

    leaf = log_q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, log_p), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(log_q, log_p), expected)
    per_datapoint = torch.func.vmap(torch.func.grad(loss), in_dims=1, out_dims=1)(log_q, log_p)
    torch.testing.assert_close(per_datapoint, expected)

    average = MovingAverage()

    def with_state(log_q: Tensor) -> Tensor:
        return score_function_bound(log_p, log_q, control=average).sum()

    with pytest.raises(RuntimeError, match="in-place"):
        torch.func.grad(with_state)(log_q)
    average.eval()
    assert torch.func.grad(with_state)(log_q).isfinite().all()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: loss(q, log_p), (log_q,), (log_q,))


def test_nothing_is_read_back_to_the_host():
    """On the meta device there are no values to read: whoever asks for one raises."""
    log_p, log_q = torch.zeros(3, 4, 5, device="meta"), torch.zeros(3, 4, 2, device="meta")
    log_q.requires_grad_()
    masks = [torch.ones(2, n, device="meta").bool() for n in (5, 2)]
    average = MovingAverage(normalize=True, shape=(2,)).to("meta")
    baseline = torch.zeros(4, 2, device="meta", requires_grad=True)
    bound = rao_blackwell_bound(log_p, log_q, *masks, baseline, control=average)
    grads = torch.autograd.grad(bound.sum(), [log_q, baseline])
    assert [g.shape for g in (bound, *grads)] == [(4,), (3, 4, 2), (4, 2)]
    bound = score_function_bound(log_p[..., 0], log_q[..., 0], control=leave_one_out)
    assert bound.shape == (4,)


def test_ddp_trains_model_q_and_baseline(tmp_path):
    class Nvil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.p, self.baseline = nn.Linear(5, 3), nn.Linear(3, 5), nn.Linear(5, 1)
            self.average = MovingAverage(normalize=True)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.q(x)
            z = torch.bernoulli(torch.sigmoid(logits.detach()).expand(2, *logits.shape))
            log_p = fastvae.bernoulli_log_prob(x, self.p(z))
            log_q = fastvae.bernoulli_log_prob(z, logits)
            return score_function_bound(
                log_p, log_q, self.baseline(x).squeeze(-1), control=self.average
            )

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Nvil())
        x = torch.bernoulli(torch.rand(8, 5))
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                bound = model(x)
            assert bound.dtype == torch.float32
            (-bound.mean()).backward()
            assert all(p.grad.abs().max() > 0 for p in model.parameters())
        assert model.module.average.weight > 0.1
        # What the model holds of the process group goes first: as its last owner it would wait for
        # gloo's threads with the interpreter locked, and sometimes for ever.
        del model, bound
    finally:
        torch.distributed.destroy_process_group()


def test_no_samples_of_no_datapoints():
    empty = torch.zeros(3, 0, requires_grad=True)
    for choice in (None, leave_one_out, MovingAverage(normalize=True)):
        bound = score_function_bound(empty, empty, control=choice)
        assert bound.shape == (0,)
        bound.sum().backward()


# --- errors ---------------------------------------------------------------------------------------

ZERO = torch.zeros(3, 4)
META = torch.zeros(3, 4, device="meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_p": None}, TypeError, "log_p must be a tensor, got NoneType"),
        ({"log_q": ZERO.int()}, TypeError, "log_q must be floating-point, got torch.int32"),
        (
            {"log_q": ZERO[0]},
            ValueError,
            r"log_q must have the shape of log_p, got \[4\] and \[3, 4\]",
        ),
        ({"log_q": META}, ValueError, "log_q must be on the device of log_p, got meta and cpu"),
        ({"log_p": ZERO[0, 0]}, ValueError, r"log_p must have at least one sample, got \[\]"),
        ({"log_p": ZERO[:0]}, ValueError, r"log_p must have at least one sample, got \[0, 4\]"),
        (
            {"baseline": "leave_one_out"},
            TypeError,
            "baseline must be a tensor or a number, got str",
        ),
        (
            {"baseline": ZERO[0].int()},
            TypeError,
            "baseline must be floating-point, got torch.int32",
        ),
        (
            {"baseline": ZERO[:, :1]},
            ValueError,
            r"baseline must be \[3, 4\] or \[4\], got \[3, 1\]",
        ),
        (
            {"baseline": META},
            ValueError,
            "baseline must be on the device of log_p, got meta and cpu",
        ),
        ({"control": 0.9}, TypeError, "control must be a function of the signal, got float"),
        ({"control": lambda s: None}, TypeError, "control must return a floating-.*, got NoneType"),
        ({"control": torch.isnan}, TypeError, "control must return a floating-.*, got torch.bool"),
        (
            {"control": lambda s: s[0]},
            ValueError,
            r"control must keep the shape of the signal, got \[4\] and \[3, 4\]",
        ),
    ],
)
def test_errors_of_score_function_bound(arguments, error, message):
    with pytest.raises(error, match="^fastvae::score_function_bound: " + message):
        score_function_bound(**{"log_p": ZERO, "log_q": ZERO, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_p": ZERO.int()}, TypeError, "log_p must be floating-point, got torch.int32"),
        (
            {"log_q": torch.zeros(3, 5, 2)},
            ValueError,
            r"log_p and log_q must be \[K, .*T\] and \[K, .*F\], got \[3, 4\] and \[3, 5, 2\]",
        ),
        (
            {"log_p": torch.zeros(3), "log_q": torch.zeros(3)},
            ValueError,
            r"log_p and log_q must be .* got \[3\] and \[3\]",
        ),
        (
            {"p_depends": torch.ones(2, 4)},
            TypeError,
            "p_depends must be a bool tensor, got torch.f",
        ),
        ({"q_depends": [[True]]}, TypeError, "q_depends must be a bool tensor, got list"),
        (
            {"p_depends": torch.ones(4, 2).bool()},
            ValueError,
            r"p_depends must be \[2, 4\], got \[4, 2\]",
        ),
        (
            {"q_depends": torch.ones(2, 2, device="meta").bool()},
            ValueError,
            "q_depends must be on the device of log_p, got meta and cpu",
        ),
        (
            {"baseline": torch.zeros(3)},
            ValueError,
            r"baseline must be \[3, 2\] or \[2\] or \[3, 1\] or \[1\], got \[3\]",
        ),
    ],
)
def test_errors_of_rao_blackwell_bound(arguments, error, message):
    default = {
        "log_p": ZERO,
        "log_q": torch.zeros(3, 2),
        "p_depends": torch.ones(2, 4).bool(),
        "q_depends": torch.eye(2).bool(),
    }
    with pytest.raises(error, match="^fastvae::rao_blackwell_bound: " + message):
        rao_blackwell_bound(**{**default, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: leave_one_out(ZERO[:1]),
            ValueError,
            r"leave_one_out: .* two samples, got \[1, 4\]",
        ),
        (lambda: leave_one_out(ZERO[0, 0]), ValueError, r"leave_one_out: .* two samples, got \[\]"),
        (
            lambda: leave_one_out([1.0]),
            TypeError,
            "leave_one_out: signal must be a tensor, got list",
        ),
        (
            lambda: MovingAverage(1.0),
            ValueError,
            r"MovingAverage: decay must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: MovingAverage(NAN),
            ValueError,
            r"MovingAverage: decay must be in \[0, 1\), got nan",
        ),
        (
            lambda: MovingAverage(shape=(0,)),
            ValueError,
            r"MovingAverage: shape must be positive, got \[0\]",
        ),
        (
            lambda: MovingAverage(shape=(3,))(ZERO),
            ValueError,
            r"MovingAverage: signal must be \[K, ..., 3\], got \[3, 4\]",
        ),
        (
            lambda: MovingAverage()(ZERO[0, 0]),
            ValueError,
            r"MovingAverage: signal must be \[K, ...\], got \[\]",
        ),
        (
            lambda: MovingAverage()(META),
            ValueError,
            "MovingAverage: signal must be on the device of the state, got meta and cpu",
        ),
        (lambda: MovingAverage()(ZERO.int()), TypeError, "MovingAverage: signal must be floating-"),
    ],
)
def test_errors_of_controls(call, error, message):
    with pytest.raises(error, match="^fastvae::" + message):
        call()
