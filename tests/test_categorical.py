"""Categorical latents: what the generic tests of test_ops.py cannot know."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import fastvae

INF = math.inf
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def noise(count: int, dtype: torch.dtype, key: Tensor) -> Tensor:
    """Read off the kernel: of two classes, log y_0 - log y_1 is a difference of Gumbels."""
    y = fastvae.gumbel_softmax(torch.zeros(count, 2, dtype=dtype), 1.0, key=key).double()
    return torch.logit(y[:, 0])


# --- the noise ------------------------------------------------------------------------------------


def test_gumbels_are_standard(device):
    g = fastvae.random.gumbel(fastvae.random.key(5), (1_000_000,), torch.float64)
    assert stats.kstest(g.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert g.mean().item() == pytest.approx(0.5772156649, abs=6 * math.pi / math.sqrt(6) / 1e3)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_noise_of_the_kernel_is_standard(dtype):
    g = noise(200_000, dtype, fastvae.random.key(6))
    assert stats.kstest(g.numpy(), stats.logistic.cdf).pvalue > 1e-3


def words_near(target: float, count: int) -> list[tuple[int, int]]:
    """(index, word) of elements whose words are the closest to one end of the range."""
    w = fastvae.random.words(fastvae.random.key(0), count).flatten()
    order = (w.double() - target * 2.0**32).abs().argsort()[:20]
    return [(int(i), int(w[i])) for i in order]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_tails_keep_their_digits(end, dtype):
    """Of the 20 most extreme of 40 million words; in float32 these u near 1 would all be 1."""
    blocks = 1 << 20
    for index, word in words_near(end, blocks):
        u = (word + 0.5) * 2.0**-32
        exact = -math.log(-math.log1p((word - 2**32 + 0.5) * 2.0**-32 if end else u - 1.0))
        key = fastvae.random.key(0, index // 4)
        # of one class against three that are impossible but for their logits of -100
        logits = torch.full((1, 4), -INF, dtype=torch.float64)
        logits[0, index % 4] = 0.0
        other = (index + 1) % 4
        logits[0, other] = 0.0
        y = fastvae.gumbel_softmax(logits.to(dtype), 8.0, key=key).double()
        ratio = 8.0 * (y[0, index % 4].log() - y[0, other].log())
        w = int(fastvae.random.words(key, 1)[0, other])
        reference = exact + math.log(-math.log((w + 0.5) * 2.0**-32))
        assert ratio.item() == pytest.approx(
            reference, abs=1e-5 if dtype == torch.float32 else 1e-12
        )


def test_gumbels_are_finite_to_the_last_word(monkeypatch):
    ends = torch.tensor([[0, 1, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(fastvae.random, "words", lambda key, blocks: ends)
    g = fastvae.random.gumbel(fastvae.random.key(0), (4,))
    expected = [-math.log(33 * math.log(2)), 33 * math.log(2)]
    torch.testing.assert_close(g[[0, 3]].double(), torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_largest_is_a_sample_of_the_softmax(dtype, hard):
    """Chi-square of a fixed key, each class a word of its own."""
    logits, n = draw(7, dtype=dtype), 100_000
    y = fastvae.gumbel_softmax(logits, 0.5, n, hard=hard, key=fastvae.random.key(11))
    assert y.shape == (n, 7)
    counts = torch.bincount(y.float().argmax(-1), minlength=7)
    if hard:
        assert torch.equal(counts.double(), y.double().sum(0))
    expected = n * torch.softmax(logits.double(), -1)
    assert stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue > 1e-3


# --- samples --------------------------------------------------------------------------------------


def test_samples_are_a_leading_dimension():
    logits, key = draw(4, 5), fastvae.random.key(1)
    y = fastvae.gumbel_softmax(logits, 0.5, 3, key=key)
    assert torch.equal(y, fastvae.gumbel_softmax(logits.expand(3, 4, 5).clone(), 0.5, key=key))
    assert fastvae.gumbel_softmax(logits, 0.5, 0, key=key).shape == (0, 4, 5)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        fastvae.gumbel_softmax(logits, 0.5, 3, key=key)[..., 0].sum(), logits
    )
    full = logits.detach().expand(3, 4, 5).clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        fastvae.gumbel_softmax(full, 0.5, key=key)[..., 0].sum(), full
    )
    torch.testing.assert_close(grad, expected.sum(0))


def test_draws_from_generators():
    logits = draw(4, 5)
    torch.manual_seed(1)
    a = fastvae.gumbel_softmax(logits, 0.5)
    b = fastvae.gumbel_softmax(logits, 0.5)
    torch.manual_seed(1)
    assert torch.equal(a, fastvae.gumbel_softmax(logits, 0.5))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("classes", [1, 2, 10, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_is_the_largest_of_soft_and_has_its_gradient(classes, dtype):
    logits, key = draw(9, classes, dtype=dtype).requires_grad_(), fastvae.random.key(2)
    grad = draw(9, classes, seed=1, dtype=dtype)
    soft = fastvae.gumbel_softmax(logits, 0.5, key=key)
    hard = fastvae.gumbel_softmax(logits, 0.5, hard=True, key=key)
    assert torch.equal(hard.sum(-1), torch.ones(9, dtype=dtype))
    assert ((hard == 0) | (hard == 1)).all()
    of_soft = soft.detach().double().gather(-1, hard.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(of_soft, soft.detach().double().amax(-1))
    (a,) = torch.autograd.grad(soft, logits, grad)
    (b,) = torch.autograd.grad(hard, logits, grad)
    assert b.abs().max() > 0 or classes == 1
    torch.testing.assert_close(a, b)


def test_of_equal_scores_the_first_wins():
    """Scores that differ by less than a float can say, far from 0."""
    logits = torch.full((1000, 5), 1e9)
    y = fastvae.gumbel_softmax(logits, 1.0, hard=True, key=fastvae.random.key(3))
    assert torch.equal(
        y, torch.nn.functional.one_hot(torch.zeros(1000, dtype=torch.long), 5).float()
    )
    y = fastvae.gumbel_softmax(logits, 1.0, key=fastvae.random.key(3))
    torch.testing.assert_close(y, torch.full((1000, 5), 0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_low_temperatures_reach_the_one_hot(temperature, dtype):
    logits, key = draw(200, 6, dtype=dtype).requires_grad_(), fastvae.random.key(4)
    y = fastvae.gumbel_softmax(logits, temperature, key=key)
    hard = fastvae.gumbel_softmax(logits, temperature, hard=True, key=key)
    assert y.isfinite().all()
    close = ((y - hard).abs() < 1e-3).all(-1)
    assert close.all() if temperature < 1e-20 else close.double().mean() > 0.98


def test_high_temperatures_reach_the_uniform():
    y = fastvae.gumbel_softmax(draw(20, 6), 1e30, key=fastvae.random.key(4))
    torch.testing.assert_close(y, torch.full((20, 6), 1 / 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_finite_logits_give_finite_samples(dtype, hard):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, -top, 0.0], [top, top, top], [-top, -top, -top]], dtype=dtype)
    logits.requires_grad_()
    for temperature in (1e-30, 1.0, 1e30):
        y = fastvae.gumbel_softmax(logits, temperature, hard=hard, key=fastvae.random.key(1))
        assert y.isfinite().all()
        torch.testing.assert_close(y.float().sum(-1), torch.ones(3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_impossible_classes_are_never_drawn(dtype, hard):
    logits = draw(500, 6, dtype=dtype)
    logits[:, 1::2] = -INF
    logits.requires_grad_()
    y = fastvae.gumbel_softmax(logits, 0.5, hard=hard, key=fastvae.random.key(1))
    assert not y[:, 1::2].any()
    (grad,) = torch.autograd.grad((y * torch.arange(6)).sum(), logits)
    assert grad.isfinite().all()
    assert not grad[:, 1::2].any()


@pytest.mark.parametrize(
    "row", [[INF, 0.0, 0.0], [math.nan, 0.0, 0.0], [-INF, -INF, -INF]], ids=str
)
@pytest.mark.parametrize("hard", [False, True])
def test_no_largest_is_nan(row, hard):
    logits = torch.tensor([row, [0.0, 0.0, 0.0]])
    y = fastvae.gumbel_softmax(logits, 1.0, hard=hard, key=fastvae.random.key(1))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("num_samples", [None, 3])
def test_samples_of_no_class_raise(num_samples):
    message = "gumbel_softmax: logits must have at least one dimension, got a 0-dim"
    with pytest.raises(RuntimeError, match=message):
        fastvae.gumbel_softmax(torch.tensor(0.0), 1.0, num_samples)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, INF, math.nan])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_temperatures_raise(temperature, device):
    message = "fastvae::gumbel_softmax: temperature must be a positive number, got "
    with pytest.raises(ValueError, match=message):
        fastvae.gumbel_softmax(torch.zeros(2, 3, device=device), temperature)
    with pytest.raises(ValueError, match=message):
        fastvae.reference.gumbel_softmax(torch.zeros(2, 3), fastvae.random.key(0), temperature)


# --- KL divergences -------------------------------------------------------------------------------


def exact_kl(q: list[float], p: list[float]) -> float:
    """Of probabilities' logarithms, to 60 digits."""
    from mpmath import mp, mpf

    with mp.workdps(60):
        q, p = [mpf(x) for x in q], [mpf(x) for x in p]
        log_q = [x - mp.log(sum(mp.exp(y) for y in q)) for x in q]
        log_p = [x - mp.log(sum(mp.exp(y) for y in p)) for x in p]
        return float(sum(mp.exp(a) * (a - b) for a, b in zip(log_q, log_p, strict=True)))


@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 10.0, 80.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_kl_keeps_its_digits(distance, classes, dtype):
    """The textbook sum of q (log q - log p) has none left at a distance of 1e-5."""
    q = draw(3, classes, dtype=dtype, scale=2.0)
    p = q + draw(3, classes, seed=1, dtype=dtype, scale=distance)
    kl = fastvae.categorical_kl(q, p)
    assert (kl >= 0).all()
    if distance == 0.0:
        assert not kl.any()
    eps = torch.finfo(dtype).eps
    for got, row_q, row_p in zip(kl.tolist(), q.tolist(), p.tolist(), strict=True):
        want = exact_kl(row_q, row_p)
        # relative, but for the square of what rounding moved all log-ratios by
        assert got == pytest.approx(want, rel=100 * eps, abs=20 * eps**2), (got, want)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kl_to_the_uniform_is_what_entropy_lacks(classes):
    logits = draw(5, classes, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(fastvae.categorical_kl(logits), math.log(classes) - entropy)
    equal = torch.full((5, classes), 3.7)
    assert not fastvae.categorical_kl(equal).any()
    zeros = torch.zeros(classes, dtype=torch.float64)
    torch.testing.assert_close(
        fastvae.categorical_kl(logits), fastvae.categorical_kl(logits, zeros)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_is_never_negative(dtype):
    q = draw(2000, 7, dtype=dtype)
    for p in (q, q + 1, (q.double() + 1e-4 * draw(2000, 7, seed=2).double()).to(dtype)):
        assert (fastvae.categorical_kl(q, p) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_impossible_classes(dtype):
    q = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 0.0], [-INF, -INF, 1.0], [0.0, -INF, 0.0]])
    p = torch.tensor([[0.0, 0.0, 0.0], [0.0, -INF, 0.0], [0.0, 0.0, 0.0], [1.0, -INF, 1.0]])
    q, p = (x.to(dtype).requires_grad_() for x in (q, p))
    kl = fastvae.categorical_kl(q, p)
    expected = torch.tensor([math.log(1.5), INF, math.log(3), 0.0])
    torch.testing.assert_close(kl, expected.to(kl.dtype), atol=1e-6, rtol=1e-6)
    for call in (fastvae.categorical_kl, fastvae.reference.categorical_kl):
        out = call(q, p)
        torch.testing.assert_close(out, expected.to(out.dtype), atol=1e-6, rtol=1e-6)
        d_q, d_p = torch.autograd.grad(out, (q, p), torch.tensor([1.0, 0.0, 1.0, 1.0]).to(out))
        rows = [0, 2, 3]
        # q is uniform where it is not 0
        torch.testing.assert_close(d_q[rows], torch.zeros_like(d_q[rows]), atol=1e-6, rtol=0)
        gap = torch.softmax(p.double(), -1) - torch.softmax(q.double(), -1)
        torch.testing.assert_close(d_p[rows].double(), gap[rows], atol=4e-3, rtol=0)


@pytest.mark.parametrize("row", [[INF, 0.0], [math.nan, 0.0], [-INF, -INF]], ids=str)
def test_kl_of_no_distribution_is_nan(row):
    bad, good = torch.tensor([row, [0.0, 1.0]]), torch.zeros(2, 2)
    for kl in (fastvae.categorical_kl(bad), fastvae.categorical_kl(bad, good)):
        assert kl.isnan().tolist() == [True, False]
    assert fastvae.categorical_kl(good, bad).isnan().tolist() == [True, False]


def test_kl_of_huge_logits():
    top = torch.finfo(torch.float32).max
    q = torch.tensor([[top, top], [top, -top], [-top, -top]])
    p = torch.tensor([[-top, -top], [0.0, 0.0], [top, top]])
    expected = torch.tensor([0.0, math.log(2), 0.0])
    torch.testing.assert_close(fastvae.categorical_kl(q, p), expected)


def test_far_log_ratios_overflow_nothing():
    q, p = torch.tensor([[0.0, -80.0]]), torch.tensor([[0.0, 80.0]])
    kl = fastvae.categorical_kl(q.requires_grad_(), p.requires_grad_())
    torch.testing.assert_close(kl, torch.tensor([80.0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(kl, (q, p)))


@pytest.mark.parametrize("classes", [1, 2, 10, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_kl_at_every_width(classes, dtype):
    inputs = [draw(9, classes, seed=i, dtype=dtype).requires_grad_() for i in range(2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for count in (1, 2):
        kl, want = (
            fastvae.categorical_kl(*inputs[:count]),
            fastvae.reference.categorical_kl(*exact[:count]),
        )
        torch.testing.assert_close(kl.double(), want, rtol=rtol, atol=rtol)
        for a, e in zip(
            torch.autograd.grad(kl.sum(), inputs[:count]),
            torch.autograd.grad(want.sum(), exact[:count]),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol)


# --- log-probabilities of classes -----------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_of_integers(classes, dtype):
    logits = draw(4, 3, classes, dtype=dtype).requires_grad_()
    x = torch.randint(classes, (4, 3), generator=torch.Generator().manual_seed(1))
    log_p = torch.distributions.Categorical(logits=logits.double()).log_prob(x).sum(-1)
    actual = fastvae.categorical_log_prob(x, logits)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.double(), log_p, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(actual.sum(), logits)
    (expected,) = torch.autograd.grad(log_p.sum(), logits)
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    torch.testing.assert_close(grad.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_classes_are_shared_by_samples():
    """x is [B, D], logits [K, B, D, C]; and the other way round."""
    logits = draw(5, 4, 3, 7, dtype=torch.float64).requires_grad_()
    x = torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(1))
    out = fastvae.categorical_log_prob(x, logits)
    assert torch.equal(out, fastvae.categorical_log_prob(x.expand(5, 4, 3).clone(), logits))
    one = logits.detach()[0].clone().requires_grad_()
    many = torch.stack([x, x.flip(0)])
    both = fastvae.categorical_log_prob(many, one)
    assert both.shape == (2, 4)
    expected = sum(
        torch.autograd.grad(fastvae.categorical_log_prob(y, one).sum(), one)[0] for y in many
    )
    torch.testing.assert_close(torch.autograd.grad(both.sum(), one)[0], expected)


@pytest.mark.parametrize("bad", [-1, 7, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_no_such_class_is_nan_and_reads_nothing(bad):
    logits = draw(2, 3, 7).requires_grad_()
    x = torch.tensor([[0, bad, 1], [2, 3, 4]])
    for call in (fastvae.categorical_log_prob, fastvae.reference.categorical_log_prob):
        out = call(x, logits)
        assert out.isnan().tolist() == [True, False]
        (grad,) = torch.autograd.grad(out.sum(), logits)
        assert grad[0, 1].isnan().all()
        assert grad[0, [0, 2]].isfinite().all()
        assert grad[1].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, INF, -INF, -0.6, 6.6, 1e30])
def test_floats_that_are_no_class_are_nan(bad):
    x = torch.tensor([[0.0, bad], [1.2, 2.8]])
    logits = draw(2, 2, 7)
    out = fastvae.categorical_log_prob(x, logits)
    assert out[0].isnan()
    assert torch.equal(out[1], fastvae.categorical_log_prob(torch.tensor([[1, 3]]), logits)[1])


def test_impossible_classes_are_minus_infinity():
    logits = torch.tensor([[[0.0, -INF]], [[0.0, -INF]]], requires_grad=True)
    out = fastvae.categorical_log_prob(torch.tensor([[0], [1]]), logits)
    assert out.tolist() == [0.0, -INF]
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.tolist() == [[[0.0, 0.0]], [[-1.0, 1.0]]]


def test_no_variables_and_no_classes():
    x = torch.zeros(3, 0, dtype=torch.long)
    assert torch.equal(fastvae.categorical_log_prob(x, torch.zeros(3, 0, 4)), torch.zeros(3))
    x = torch.zeros(3, 2, dtype=torch.long)
    assert fastvae.categorical_log_prob(x, torch.zeros(3, 2, 0)).isnan().all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_classes_raise(device):
    def zeros(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    start, call = "fastvae::categorical_log_prob: ", fastvae.categorical_log_prob
    with pytest.raises(TypeError, match=start + "x must be int64 or have the dtype of logits, got"):
        call(zeros(2, 3, dtype=torch.int32), zeros(2, 3, 4))
    with pytest.raises(TypeError, match=start + "logits must have the dtype of x, got"):
        call(zeros(2, 3, dtype=torch.float64), zeros(2, 3, 4))
    with pytest.raises(TypeError, match=start + "logits must be float32, .*, got Long"):
        call(zeros(2, 3, dtype=torch.long), zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(
        ValueError, match=start + r"logits must have shape \[..., D, K\], got \[4\]"
    ):
        call(zeros(4, dtype=torch.long), zeros(4))
    message = r"x must broadcast with logits\[..., 0\], got \[2, 5\] and \[2, 3, 4\]"
    with pytest.raises(ValueError, match=start + message):
        call(zeros(2, 5, dtype=torch.long), zeros(2, 3, 4))
    with pytest.raises(
        RuntimeError, match=start + "x must have at least one dimension, got a 0-dim"
    ):
        call(torch.zeros((), dtype=torch.long, device=device), zeros(2, 3, 4))


def test_classes_on_another_device_raise():
    with pytest.raises(RuntimeError, match="x must be on the device of logits, got meta and cpu"):
        fastvae.categorical_log_prob(
            torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.zeros(2, 3, 4)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_compose(dtype):
    """What the generic tests show with classes as floats."""
    logits = draw(4, 3, 5, dtype=dtype).requires_grad_()
    x = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(1))
    expected = fastvae.categorical_log_prob(x, logits)
    (grad,) = torch.autograd.grad(expected.sum(), logits)
    compiled = torch.compile(fastvae.categorical_log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), expected)
    (actual,) = torch.autograd.grad(compiled(x, logits).sum(), logits)
    torch.testing.assert_close(actual, grad)
    actual = torch.func.grad(lambda y: fastvae.categorical_log_prob(x, y).sum())(logits.detach())
    torch.testing.assert_close(actual, grad)
    actual = torch.func.vmap(fastvae.categorical_log_prob)(x, logits.detach())
    torch.testing.assert_close(actual, expected.detach())
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda y: fastvae.categorical_log_prob(x, y), logits)
        assert torch.autograd.gradgradcheck(lambda y: fastvae.categorical_log_prob(x, y), logits)
