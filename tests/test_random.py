"""Philox and the normals made of it: known answers, distribution, keys."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

import fastvae
from fastvae import random

KEYS = [(seed, offset) for seed in range(10) for offset in (0, 2**40)]  # 20, fixed

# Random123, tests/kat_vectors: rounds, counter, key -> words
ZEROS, ONES = "00000000", "ffffffff"
PI = ("243f6a88", "85a308d3", "13198a2e", "03707344"), ("a4093822", "299f31d0")
KNOWN_ANSWERS = [
    (7, (ZEROS,) * 4, (ZEROS,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (ONES,) * 4, (ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, (ZEROS,) * 4, (ZEROS,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

needs_module = pytest.mark.skipif(
    not fastvae.build_info()["compiled"], reason="no compiled module: its probes cannot be asked"
)


def draw(key: tuple[int, int], *shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Normals as the kernel draws them: mu = 0, log_var = 0."""
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    return fastvae.reparameterize(zeros, zeros, key=random.key(*key, device=device))


# --- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN_ANSWERS)
def test_random123_known_answers(rounds, counter, key, words):
    c, k = [int(x, 16) for x in counter], [int(x, 16) for x in key]
    expected = [int(x, 16) for x in words.split()]
    python = random._philox(tuple(torch.tensor(x) for x in c), *map(torch.tensor, k), rounds)
    assert [int(x) for x in python] == expected
    if fastvae.build_info()["compiled"]:
        assert fastvae._load.module.philox(rounds, c, k) == expected


def test_cxx26_philox_10000th_output():
    """std::philox4x32, default seed 20111115: the 10000th output is word 3 of block 2499."""
    assert int(random.words(random.key(20111115), 2500)[2499, 3]) == 1955073260


def test_torch_stateless_words():
    """What torch's own tests pin for its stateless generator."""
    assert random.words(random.key(0, 4), 1)[0, :2].tolist() == [4013802324, 2979262830]
    assert random.words(random.key(10, 1), 1)[0, :2].tolist() == [2007330488, 2354548925]


@needs_module
@pytest.mark.parametrize("offset", [0, 5, 2**32 - 8, 2**64 - 8, 2**63 - 3])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x0123456789ABCDEF])
def test_vector_words_equal_scalar_words_across_carries(seed, offset):
    """Counters past 2^32, 2^63 or 2^64 within a chunk, against the definition one by one."""
    expected = []
    for block in range(128):
        counter = (offset + block) % 2**64
        expected += fastvae._load.module.philox(
            10, [counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed >> 32]
        )
    assert fastvae._load.module.philox_group(seed, offset, 0) == expected
    assert fastvae._load.module.philox_group(seed, offset - 16 & 2**64 - 1, 16) == expected
    assert random.words(random.key(seed, offset), 128).flatten().tolist() == expected


def test_normals_equal_torch_stateless_generator(device):
    try:
        torch_random = importlib.import_module("torch.func._random")
        torch_random.normal(torch.zeros(2, dtype=torch.uint64), (4,))
    except (ImportError, NotImplementedError):
        pytest.skip(f"torch {torch.__version__} has no stateless normals on the CPU (2.14 has)")
    for seed, offset in KEYS[:4]:
        key = torch.tensor([seed, offset], dtype=torch.uint64)
        expected = torch_random.normal(key, (1001,))
        torch.testing.assert_close(draw((seed, offset), 1001), expected, rtol=2e-6, atol=2e-6)


def test_normals_equal_twenty_lines_of_numpy(device):
    """The stream of torch's stateless generator, written out again from its definition."""
    n = 1003
    for seed, offset in [*KEYS, (-1, -1), (5, 2**32 - 100), (2**63, 2**64 - 100)]:
        c = [np.full(n, 0, np.uint64) for _ in range(4)]
        block = np.uint64(offset % 2**64) + np.arange(n, dtype=np.uint64)
        c[0], c[1] = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
        k0, k1 = seed % 2**32, (seed % 2**64) >> 32
        for _ in range(10):
            p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
            low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
            c = [
                (p1 >> high) ^ c[1] ^ np.uint64(k0),
                p1 & low,
                (p0 >> high) ^ c[3] ^ np.uint64(k1),
                p0 & low,
            ]
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        for dtype, rtol in ((np.float32, 1e-6), (np.float64, 1e-13)):
            # the uniform is rounded to dtype; what follows is exact
            u = [(x.astype(dtype) * dtype(2.0**-32) + dtype(2.0**-33)).astype(float) for x in c]
            expected = np.empty((n, 4))
            for a, b in ((0, 1), (2, 3)):
                radius = np.sqrt(-2 * np.log(u[a]))
                expected[:, a] = radius * np.cos(2 * np.pi * u[b])
                expected[:, b] = radius * np.sin(2 * np.pi * u[b])
            kind = torch.float32 if dtype is np.float32 else torch.float64
            z = draw((seed, offset), 4 * n, dtype=kind, device=device).cpu().numpy()
            np.testing.assert_allclose(z, expected.ravel(), rtol=rtol, atol=rtol / 5)


def test_uniforms_use_all_32_bits():
    u = random.uniform(random.key(0), (1 << 16,), torch.float64)
    words = random.words(random.key(0), 1 << 14).flatten()
    assert torch.equal(u, words.double() / 2**32 + 2.0**-33)
    assert u.min() > 0
    assert random.uniform(random.key(0), (1 << 16,)).max() <= 1
    for dtype in (torch.bfloat16, torch.float16):  # 2^32 is not finite in float16
        half = random.uniform(random.key(0), (1 << 16,), dtype)
        assert torch.equal(half, random.uniform(random.key(0), (1 << 16,)).to(dtype))


# --- distribution ---------------------------------------------------------------------------------


def test_kolmogorov_smirnov_and_moments(device):
    """1e7 draws per key; a p-value below 1e-6 in 20 fixed keys would be a defect, not bad luck."""
    n = 10_000_000
    grid = torch.linspace(-6.5, 6.5, 200_001, dtype=torch.float64)
    cdf = torch.special.ndtr(grid).numpy()
    for key in KEYS:
        z = draw(key, n, device=device).cpu()
        # KS on a fine grid: the largest gap between grid points is below 3e-5 / sqrt(n) of a step
        counts = torch.histc(z, bins=200_000, min=-6.5, max=6.5).double().cumsum(0).numpy()
        outside = (z < -6.5).sum().item()
        empirical = (np.concatenate(([0.0], counts)) + outside) / n
        distance = np.abs(empirical - cdf).max()
        assert stats.kstwobign.sf(distance * math.sqrt(n)) > 1e-6, key
        # moments: sample mean, variance, skewness, excess kurtosis, each within 5 standard errors
        z = z.double()
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(z.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / n), (
                key,
                power,
            )


def test_lags_are_uncorrelated(device):
    """Between neighbours, within a block, between blocks, and between squares (a shared radius)."""
    n = 4_000_000
    z = draw(KEYS[3], n, device=device).double().cpu()
    for values in (z, z.square() - 1):
        scale = values.square().mean()
        for lag in (*range(1, 9), 16, 32, 63, 64, 65, 512, 1024):
            correlation = (values[:-lag] * values[lag:]).mean() / scale
            assert abs(correlation.item()) < 5 / math.sqrt(n), lag


def test_different_keys_are_uncorrelated(device):
    n = 1_000_000
    base = draw((0, 0), n, device=device).double()
    for key in ((1, 0), (0, n), (2**32, 0), (0, 2**32)):
        other = draw(key, n, device=device).double()
        assert abs((base * other).mean().item()) < 5 / math.sqrt(n), key


def test_tails_reach_beyond_24_bit_uniforms():
    """A word of 0 gives |z| = 6.76; torch's CPU randn stops at 5.77. Expect 2.1 per 2^28 draws."""
    largest = torch.tensor(0.0)
    for chunk in range(64):  # 2^28 draws, 2^22 at a time
        largest = torch.maximum(largest, draw((4, chunk << 20), 1 << 22).abs().max())
    assert 5.77 < largest < 6.77
    radius = math.sqrt(-2 * math.log(2.0**-33))
    assert radius == pytest.approx(6.7637, abs=1e-4)


# --- keys -----------------------------------------------------------------------------------------


def test_element_depends_on_key_and_index_alone():
    """A later part of the stream, reached by the offset, also past 2^31 elements."""
    whole = draw((9, 0), 4096)
    assert torch.equal(draw((9, 100), 4096 - 400), whole[400:])
    assert torch.equal(draw((9, 0), 16, 256).flatten(), whole)
    assert torch.equal(draw((9, 0), 13, 315).flatten(), whole[: 13 * 315])
    base = 2**64 - 2**29  # offset + 2^29 blocks = 2^31 elements wraps to 0
    torch.testing.assert_close(draw((9, base + 2**29), 64), draw((9, 0), 64), rtol=0, atol=0)


def test_num_samples_is_a_leading_dimension():
    mu, log_var, key = torch.randn(5, 6), torch.randn(5, 6), random.key(3)
    z = fastvae.reparameterize(mu, log_var, 4, key=key)
    expanded = mu.expand(4, 5, 6).contiguous(), log_var.expand(4, 5, 6).contiguous()
    assert torch.equal(z, fastvae.reparameterize(*expanded, key=key))
    both, kl = fastvae.reparameterize_kl(mu, log_var, 4, key=key)
    assert torch.equal(both, z)
    assert torch.equal(kl, fastvae.gaussian_kl(mu, log_var))
    assert fastvae.reparameterize(mu, log_var, 0).shape == (0, 5, 6)


def test_num_samples_gradients():
    mu = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    log_var = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    key = random.key(3)
    assert torch.autograd.gradcheck(
        lambda m, v: fastvae.reparameterize_kl(m, v, 3, key=key), (mu, log_var)
    )


def test_manual_seed_and_generator():
    mu = torch.zeros(4, 8)
    torch.manual_seed(1)
    a, b = fastvae.reparameterize(mu, mu), fastvae.reparameterize(mu, mu)
    torch.manual_seed(1)
    assert torch.equal(fastvae.reparameterize(mu, mu), a)
    assert not torch.equal(a, b)
    g = torch.Generator().manual_seed(5)
    c = fastvae.reparameterize(mu, mu, generator=g)
    assert torch.equal(
        fastvae.reparameterize(mu, mu, generator=torch.Generator().manual_seed(5)), c
    )
    key = random.from_generator(torch.Generator().manual_seed(5))
    assert torch.equal(fastvae.reparameterize(mu, mu, key=key), c)


def test_backward_draws_the_same_noise_where_z_minus_mu_has_lost_it():
    """mu = 1e4, log_var = -20: z - mu keeps no digit of sigma eps, the gradient all of them."""
    mu = torch.full((64, 64), 1e4, requires_grad=True)
    log_var = torch.full((64, 64), -20.0, requires_grad=True)
    z = fastvae.reparameterize(mu, log_var, key=random.key(7))
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    eps = random.normal(random.key(7), (64, 64)).double()
    torch.testing.assert_close(grad.double(), 0.5 * math.exp(-10) * eps, rtol=1e-5, atol=0)
    torch.testing.assert_close(draw((7, 0), 64, 64).double(), eps, rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", ["reparameterize", "reparameterize_kl"])
def test_gradient_chooses_between_z_minus_mu_and_replay_for_each_element_by_itself(op, device):
    """|mu| / sigma from 1e-4 to 1e10 side by side: exact everywhere, whoever the neighbours are."""
    g = torch.Generator().manual_seed(0)
    mu = 10.0 ** (8.0 * torch.rand(64, 40, generator=g) - 4.0)
    log_var = 8.0 * torch.rand(64, 40, generator=g) - 6.0
    key = random.key(9, device=device)
    grad_z = torch.ones(64, 40, device=device)

    def gradient(mu, log_var, key):
        mu, log_var = (x.to(device).requires_grad_() for x in (mu, log_var))
        out = getattr(fastvae, op)(mu, log_var, key=key)
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, log_var, [torch.ones_like(o) for o in outputs])[0]

    whole = gradient(mu, log_var, key)
    sigma_eps = torch.exp(0.5 * log_var.double()) * random.normal(key, (64, 40)).double().cpu()
    exact = 0.5 * grad_z.double().cpu() * sigma_eps
    if op == "reparameterize_kl":
        exact = exact + 0.5 * torch.expm1(log_var.double())
    error = (whole.double().cpu() - exact).abs() / torch.exp(0.5 * log_var.double())
    assert error.max() <= 64 * 2**-24
    for row in range(64):
        alone = gradient(mu[row], log_var[row], random.shard(key, row, 40))
        assert torch.equal(alone, whole[row])


def test_shard_gives_the_rows_of_one_process():
    key, mu = random.key(11, 5), torch.zeros(8, 6)
    whole = fastvae.reparameterize(mu, mu, key=key)
    for rank in range(4):
        part_key = random.shard(key, 2 * rank, 6)
        part = fastvae.reparameterize(mu[:2], mu[:2], key=part_key)
        assert torch.equal(part, whole[2 * rank : 2 * rank + 2])
    with pytest.raises(ValueError, match=r"must be a multiple of 4 .* got 3 \* 5"):
        random.shard(key, 3, 5)


def test_fold_in_gives_unrelated_streams():
    key = random.key(1)
    keys = [random.fold_in(key, i) for i in range(100)]
    assert len({tuple(k.tolist()) for k in keys}) == 100
    assert torch.equal(random.fold_in(key, 3), keys[3])
    zeros = torch.zeros(100_000)
    z = torch.stack([fastvae.reparameterize(zeros, zeros, key=k) for k in keys[:8]]).double()
    correlation = torch.corrcoef(z) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_key_takes_any_integer():
    assert random.key(2**64 - 1).tolist() == [-1, 0]
    assert random.key(-1).tolist() == [-1, 0]
    assert random.key(1, 2**64 - 1).dtype == torch.int64


# --- randomness under transforms ------------------------------------------------------------------


def test_what_is_no_key_is_refused():
    random = fastvae.random
    calls = (
        lambda key: random.normal(key, (4,)),
        lambda key: random.fold_in(key, 1),
        lambda key: random.shard(key, 4, 1),
    )
    for call in calls:
        for bad in (torch.zeros(2, dtype=torch.int32), torch.zeros(2)):
            with pytest.raises(TypeError, match=r"key must be int64 \(seed, offset\), got"):
                call(bad)
        for shape in ((3,), (2, 2), ()):
            with pytest.raises(ValueError, match=r"key must have shape \[2\] .*, got"):
                call(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match="integer"):
        random.key(0.5)


@pytest.mark.parametrize("draw", ["uniform", "normal", "gumbel"])
def test_noise_of_no_shape_or_dtype_is_refused(draw):
    function, key = getattr(fastvae.random, draw), fastvae.random.key(0)
    with pytest.raises(ValueError, match=r"shape must not be negative, got \[2, -1\]"):
        function(key, (2, -1))
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch\.int64"):
        function(key, (4,), torch.int64)


def test_two_draws_in_one_compiled_training_step_differ():
    """A draw from a hidden generator is merged by CSE: op(x) - op(x) was exactly 0."""

    @torch.compile(fullgraph=True)
    def difference(mu, log_var):
        return fastvae.reparameterize(mu, log_var) - fastvae.reparameterize(mu, log_var)

    mu, log_var = torch.zeros(8, 16, requires_grad=True), torch.zeros(8, 16, requires_grad=True)
    first = difference(mu, log_var)
    assert first.abs().min() > 0
    first.sum().backward()
    assert not torch.equal(difference(mu, log_var), first)
    torch.manual_seed(2)
    a = difference(mu, log_var)
    torch.manual_seed(2)
    assert torch.equal(difference(mu, log_var), a)


def test_vmap_honours_randomness():
    zeros, vmap = torch.zeros(3, 8), torch.func.vmap
    different = vmap(fastvae.reparameterize, randomness="different")(zeros, zeros)
    assert not torch.equal(different[0], different[1])
    same = vmap(fastvae.reparameterize, randomness="same")(zeros, zeros)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(fastvae.reparameterize)(zeros, zeros)
    keys = torch.stack([random.key(i) for i in range(3)])
    by_key = vmap(lambda m, k: fastvae.reparameterize(m, m, key=k))(zeros, keys)
    for i in range(3):
        torch.testing.assert_close(by_key[i], draw((i, 0), 8))


def test_transforms_see_the_kernels_noise():
    """The reference route draws what the kernel draws from the same key."""
    key, mu, log_var = random.key(5), torch.randn(4, 6), torch.randn(4, 6)
    kernel = fastvae.reparameterize(mu, log_var, key=key)
    out, _ = torch.func.jvp(lambda m: fastvae.reparameterize(m, log_var, key=key), (mu,), (mu,))
    torch.testing.assert_close(out, kernel)
