"""What only a device can show: streams, graphs, real memory. ``bench/device.sh`` runs this."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import fastvae
from fastvae import flows, random

pytestmark = pytest.mark.skipif(
    not (fastvae.build_info()["cuda"] and torch.cuda.is_available()),
    reason="needs a GPU, and a fastvae built for it",
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def meant_for(device: str) -> None:
    """The fixture by which bench/device.sh chooses tests."""


def forward_and_backward(case: Case, inputs: list[Tensor], key: Tensor) -> list[Tensor]:
    outputs = case.call(inputs, key)
    ones = [torch.ones_like(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, ones)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# --- noise ----------------------------------------------------------------------------------------


def test_words_and_uniforms_are_those_of_the_cpu():
    for seed, offset in ((0, 0), (7, 2**32 - 5), (2**63 + 1, 2**64 - 9)):
        here, there = (random.key(seed, offset, device=d) for d in ("cpu", "cuda"))
        assert torch.equal(random.words(here, 1001), random.words(there, 1001).cpu())
        for dtype in (torch.float32, torch.float64):
            uniforms = [random.uniform(k, (4001,), dtype).cpu() for k in (here, there)]
            assert torch.equal(*uniforms)


def test_normals_are_those_of_the_cpu_to_8_ulp():
    """A radius and an angle, of other logarithms and sines; near 0 an ulp of the angle counts."""
    for dtype, real in ((torch.float32, np.float32), (torch.float64, np.float64)):
        for seed in range(5):
            zero = torch.zeros(1 << 20, dtype=dtype)
            key = random.key(seed)
            a = fastvae.reparameterize(zero, zero, key=key).numpy()
            b = fastvae.reparameterize(zero.cuda(), zero.cuda(), key=key.cuda()).cpu().numpy()
            ulp = np.spacing(np.maximum(np.abs(a), real(0.25)))
            assert np.max(np.abs(a - b) / ulp) <= 8


# --- streams and graphs ---------------------------------------------------------------------------


@each_case
def test_twice_is_the_same_bit_for_bit(case):
    key = random.key(1, device="cuda")
    inputs = case.draw((300, 70), requires_grad=True, device="cuda")
    assert_equal(forward_and_backward(case, inputs, key), forward_and_backward(case, inputs, key))


@each_case
def test_a_call_waits_for_nothing_and_runs_on_the_current_stream(case):
    key = random.key(1, device="cuda")
    inputs = case.draw((33, 20), requires_grad=True, device="cuda")
    expected = forward_and_backward(case, inputs, key)
    side, stalled, done = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(case, inputs, key)  # of memory that this stream then has
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # cycles: a fifth of a second
    stalled.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            got = forward_and_backward(case, inputs, key)
            done.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done.synchronize()
    assert not stalled.query(), "it waited for another stream"
    torch.cuda.synchronize()
    assert_equal(got, expected)


def captured(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is initialised lazily cannot be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    return graph, held


@each_case
def test_a_graph_is_captured_and_replayed(case):
    """On other inputs, and with another key: both are read where they lie."""
    key = random.key(1, device="cuda")
    inputs = case.draw((33, 20), requires_grad=True, device="cuda")
    graph, held = captured(lambda: forward_and_backward(case, inputs, key))
    for seed in (1, 2):
        with torch.no_grad():
            for x, new in zip(inputs, case.draw((33, 20), seed=seed), strict=True):
                x.copy_(new)
            key.copy_(random.key(seed, 3))
        graph.replay()
        assert_equal(held, forward_and_backward(case, inputs, key))


def test_a_graph_draws_fresh_noise_with_every_replay():
    mu = torch.zeros(1 << 16, device="cuda")
    graph, z = captured(lambda: fastvae.reparameterize(mu, mu))
    torch.cuda.manual_seed(5)
    samples = []
    for _ in range(3):
        graph.replay()
        samples.append(z.clone())
        assert abs(samples[-1].mean().item()) < 0.03
        assert abs(samples[-1].std().item() - 1) < 0.03
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


# --- devices and memory ---------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@each_case
def test_a_device_that_is_not_the_current_one(case):
    key = random.key(1, device="cuda:1")
    inputs = case.draw((33, 20), requires_grad=True, device="cuda:1")
    with torch.cuda.device(0):
        got = forward_and_backward(case, inputs, key)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_equal(got, forward_and_backward(case, inputs, key))


def test_more_than_2_31_elements_in_real_memory():
    columns = 1 << 10
    rows = (1 << 21) + 3
    if torch.cuda.mem_get_info()[0] < 6 * rows * columns * 2:
        pytest.skip("needs 27 GB of memory that is free")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.linspace(-2.0, 2.0, columns)
    x.requires_grad_()
    zero = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    log_prob = fastvae.gaussian_log_prob(x, zero, zero)
    (d_x,) = torch.autograd.grad(log_prob.sum(), x)
    ends = x.detach()[[0, -1]].float()
    expected = fastvae.gaussian_log_prob(ends, zero.float(), zero.float())
    torch.testing.assert_close(log_prob[[0, -1]].detach(), expected)
    torch.testing.assert_close(d_x[[0, -1]].float(), -ends, rtol=2**-8, atol=0.0)
    del d_x
    key = random.key(3, device="cuda")
    z = fastvae.reparameterize(x.detach(), zero, key=key)
    last = random.shard(key, rows - 1, columns)
    assert torch.equal(z[-1:], fastvae.reparameterize(x.detach()[-1:], zero, key=last))


# --- what is no row of the table ------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("hidden", [(), (3, 50), (256, 256)])
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_unrolling_is_that_of_the_cpu(dim, hidden, context_dim):
    torch.manual_seed(0)
    flow = flows.AffineAutoregressive(dim, "sigmoid", hidden=hidden, context_dim=context_dim)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(2 * p.shape[-1]))
    flow = flow.double()
    z = torch.randn(130, dim, dtype=torch.float64, requires_grad=True)
    context = torch.randn(130, context_dim, dtype=torch.float64) if context_dim else None

    def results(device: str) -> list[Tensor]:
        flow.to(device)
        given = z.detach().to(device).requires_grad_()
        outputs = flow(given, None if context is None else context.to(device))
        ones = [torch.ones_like(out) for out in outputs]
        gradients = torch.autograd.grad(outputs, [given, *flow.parameters()], ones)
        return [x.detach().cpu() for x in (*outputs, *gradients)]

    for got, want in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
