"""What holds of splines beyond tests/cases.py: round trips, edges, extremes, peers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae

spline = fastvae.rational_quadratic_spline


def numbers(rows: int, columns: int, sigma: float, seed: int = 0, bins: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [sigma * torch.randn(rows, columns, k, generator=g) for k in (bins, bins, bins - 1)]


def slope_at(x: Tensor, p: list[Tensor], **options) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(spline(x, *p, **options)[0].sum(), x)[0]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 6.0])
def test_round_trip_is_as_good_as_the_number_between(sigma, inverse):
    """In float32. Where a bin is flat, an ulp of y is many of x: no method can undo that."""
    for seed in range(50):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1000 + seed))
        p = numbers(64, 16, sigma, seed)
        y, log_det = spline(x, *p, inverse=inverse)
        back, minus = spline(y, *p, inverse=not inverse)
        ulp = 2.0**-23 * y.abs().clamp(min=1.0)
        assert ((back - x).abs() <= 4.0 * (1e-6 + ulp / slope_at(x, p, inverse=inverse))).all()
        again, _ = spline(back, *p, inverse=inverse)
        steep = slope_at(back, p, inverse=inverse)
        assert ((again - y).abs() <= 4.0 * (1e-6 + 2.0**-23 * 3.0 * steep)).all()
        if sigma == 1.0:
            torch.testing.assert_close(minus, -log_det, atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_round_trip_in_float64(tails):
    x = 2.0 * torch.randn(64, 16, dtype=torch.float64)
    p = [n.double() for n in numbers(64, 16, 1.0)]
    if tails == "circular":
        p[2] = torch.randn(64, 16, 8, dtype=torch.float64)
    y, log_det = spline(x, *p, tails=tails)
    back, minus = spline(y, *p, tails=tails, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(minus, -log_det, atol=1e-8, rtol=0.0)


@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_that_of_the_jacobian(inverse):
    x = torch.randn(1, 6, dtype=torch.float64)
    p = [n.double() for n in numbers(1, 6, 1.0)]
    _, log_det = spline(x, *p, inverse=inverse)
    jacobian = torch.autograd.functional.jacobian(lambda x: spline(x, *p, inverse=inverse)[0], x)
    exact = torch.linalg.slogdet(jacobian.reshape(6, 6))[1]
    assert abs(log_det.item() - exact.item()) <= 1e-10


def test_knots_join_smoothly_and_the_tails_are_the_identity():
    p = [n.double() for n in numbers(1, 1, 1.0)]
    x = torch.linspace(-4.0, 4.0, 80_001, dtype=torch.float64).unsqueeze(-1)
    y, log_slope = spline(x, *p)
    outside = x.squeeze(-1).abs() > 3.0
    assert torch.equal(y[outside], x[outside])
    assert (log_slope[outside] == 0.0).all()
    assert (y.diff(dim=0) > 0.0).all()
    differences = (y[1:] - y[:-1]).squeeze(-1) / 1e-4
    middle = 0.5 * (log_slope[1:] + log_slope[:-1])
    torch.testing.assert_close(differences.log(), middle, atol=1e-2, rtol=0.0)
    edges = torch.tensor([[-3.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(spline(edges, *p)[0], edges, atol=1e-14, rtol=0.0)
    torch.testing.assert_close(spline(edges, *p)[1], torch.zeros(2).double(), atol=1e-12, rtol=0.0)


def test_a_circular_spline_turns_with_its_angle():
    g = torch.Generator().manual_seed(0)
    p = [torch.randn(5, 3, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)
    options = {"tails": "circular", "bound": math.pi}
    y, log_det = spline(x, *p, **options)
    turned, same = spline(x + 4.0 * math.pi, *p, **options)
    torch.testing.assert_close(turned, y + 4.0 * math.pi, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(same, log_det, atol=1e-11, rtol=0.0)
    edge = torch.full((5, 3), math.pi, dtype=torch.float64)
    left, right = (spline(edge * (1.0 + e), *p, **options)[1] for e in (-1e-12, 1e-12))
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0.0)


def test_bins_and_slopes_keep_their_minimum():
    huge = torch.tensor([[[200.0, 0.0, 0.0]]], dtype=torch.float64)
    flat = torch.full((1, 1, 2), -1e4, dtype=torch.float64)
    options = {"bound": 1.0, "min_bin_width": 0.1, "min_bin_height": 0.2, "min_derivative": 0.05}
    knots = torch.tensor([[0.6], [0.8]], dtype=torch.float64)  # bins of 0.8, 0.1, 0.1 times 2
    y, _ = spline(knots, huge, huge, flat, **options)
    torch.testing.assert_close(
        y, torch.tensor([[0.2], [0.6]], dtype=torch.float64), atol=1e-12, rtol=0.0
    )
    slopes = slope_at(knots, [huge, huge, flat], **options)
    torch.testing.assert_close(
        slopes, torch.full((2, 1), 0.05, dtype=torch.float64), atol=1e-12, rtol=0.0
    )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", ["linear", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_finite_inputs_have_finite_values_and_gradients(tails, inverse, dtype):
    g = torch.Generator().manual_seed(0)
    count = 7 if tails == "linear" else 8
    for scale in (0.0, 1.0, 30.0, 1e4, 1e30):
        x = 2.0 * torch.randn(64, 16, generator=g)
        x.view(-1)[:6] = torch.tensor([0.0, 3.0, -3.0, 3.0000002, -2.9999998, 1e30])
        p = [scale * torch.randn(64, 16, k, generator=g) for k in (8, 8, count)]
        inputs = [t.to(dtype).requires_grad_() for t in (x, *p)]
        outputs = spline(*inputs, tails=tails, inverse=inverse)
        grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
        for t in (*outputs, *grads):
            assert t.isfinite().all(), (scale, t.shape)


def test_slices_of_one_network_output_are_read_where_they_lie():
    g = torch.Generator().manual_seed(0)
    x, output = torch.randn(9, 5, generator=g), torch.randn(9, 5, 23, generator=g)
    whole = spline(x, *(n.contiguous() for n in output.split([8, 8, 7], -1)))
    for a, b in zip(whole, spline(x, *output.split([8, 8, 7], -1)), strict=True):
        assert torch.equal(a, b)
    channels_first = output.movedim(-1, 0).contiguous().movedim(0, -1)
    for a, b in zip(whole, spline(x, *channels_first.split([8, 8, 7], -1)), strict=True):
        assert torch.equal(a, b)


def test_numbers_may_be_shared_by_all_rows():
    x = torch.randn(4, 9, 5, requires_grad=True)
    shared = [torch.randn(5, k, requires_grad=True) for k in (6, 6, 5)]
    own = [n.detach().expand(4, 9, *n.shape).requires_grad_() for n in shared]
    y, log_det = spline(x, *shared)
    for a, b in zip((y, log_det), spline(x, *own), strict=True):
        assert torch.equal(a, b)
    grads = torch.autograd.grad(y.sum() + log_det.sum(), shared)
    outputs = spline(x, *own)
    each = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), own)
    for grad, n in zip(grads, each, strict=True):
        torch.testing.assert_close(grad, n.sum((0, 1)), atol=1e-4, rtol=1e-4)


def test_no_rows_no_columns_and_one_bin():
    for shape in ((0, 5), (3, 0)):
        x = torch.empty(shape, requires_grad=True)
        p = [torch.empty(*shape, k, requires_grad=True) for k in (4, 4, 3)]
        y, log_det = spline(x, *p)
        assert y.shape == shape
        assert torch.equal(log_det, torch.zeros(shape[0]))
        for grad, n in zip(torch.autograd.grad(y.sum() + log_det.sum(), p), p, strict=True):
            assert grad.shape == n.shape
    x = torch.randn(5, 3)
    y, log_det = spline(x, torch.randn(3, 1), torch.randn(3, 1), torch.empty(3, 0))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros(5), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": torch.zeros(5)}, "widths must be .*of at least one bin"),
        ({"widths": torch.zeros(3, 5, 0)}, "widths must be .*of at least one bin"),
        ({"heights": torch.zeros(3, 5, 7)}, "heights must have the shape of widths"),
        ({"derivatives": torch.zeros(3, 5, 8)}, r"derivatives must be \[..., D, K - 1\]"),
        ({"tails": "circular"}, r"derivatives must be \[..., D, K\] with circular tails"),
        ({"x": torch.zeros(3, 4)}, "widths must broadcast with x but for the bins"),
        ({"tails": "none"}, "tails must be one of linear, circular, got none"),
        ({"bound": 0.0}, "bound must be positive and finite, got 0"),
        ({"bound": math.inf}, "bound must be positive and finite, got inf"),
        ({"min_bin_width": 0.125}, "min_bin_width must leave room for all bins, got 0.125 and 8"),
        ({"min_bin_height": 1.0}, "min_bin_height must leave room for all bins, got 1 and 8"),
        ({"min_bin_height": -1.0}, "min_bin_height must be positive"),
        ({"min_derivative": math.nan}, "min_derivative must be positive"),
    ],
    ids=str,
)
def test_errors(change, message):
    arguments = {
        "x": torch.zeros(3, 5),
        "widths": torch.zeros(3, 5, 8),
        "heights": torch.zeros(3, 5, 8),
        "derivatives": torch.zeros(3, 5, 7),
    }
    with pytest.raises(ValueError, match=f"fastvae::rational_quadratic_spline: {message}"):
        spline(**(arguments | change))


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_equals_nflows_where_it_is_right(inverse):
    peer = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x = 2.0 * torch.randn(64, 16, dtype=torch.float64)
    p = [n.double() for n in numbers(64, 16, 1.0)]
    y, log = peer.unconstrained_rational_quadratic_spline(
        x, *p, inverse=inverse, tails="linear", tail_bound=3.0
    )
    ours = spline(x, *p, inverse=inverse)
    torch.testing.assert_close(ours[0], y, atol=1e-9, rtol=0.0)
    torch.testing.assert_close(ours[1], log.sum(-1), atol=1e-7, rtol=0.0)


def test_nflows_inverse_fails_where_ours_does_not():
    peer = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    failures = 0
    for seed in range(200):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1000 + seed))
        p = numbers(64, 16, 6.0, seed)
        y, _ = spline(x, *p)
        assert spline(y, *p, inverse=True)[0].isfinite().all()
        try:
            peer.unconstrained_rational_quadratic_spline(
                y, *p, inverse=True, tails="linear", tail_bound=3.0
            )
        except AssertionError:
            failures += 1
    assert failures > 0  # of its assert on the discriminant


def test_equals_zuko():
    zuko = pytest.importorskip("zuko.transforms")
    x = 2.0 * torch.randn(64, 16, dtype=torch.float64)
    p = [torch.randn(64, 16, k, dtype=torch.float64) for k in (8, 8, 7)]
    peer = zuko.MonotonicRQSTransform(*p, bound=3.0, slope=1e-3)
    # zuko bounds what it is given, and knows no smallest bin: hand ours what makes the same knots
    squash = abs(math.log(1e-3))
    widths, heights, derivatives = (n / (1 + (2 * n / squash).abs()) for n in p)
    derivatives = (p[2] / (1 + (p[2] / squash).abs())).exp().expm1().log()
    tiny = {"min_bin_width": 1e-300, "min_bin_height": 1e-300, "min_derivative": 1e-300}
    y, log_det = spline(x, widths, heights, derivatives, **tiny)
    expected, log = peer.call_and_ladj(x)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=0.0)
    torch.testing.assert_close(log_det, log.sum(-1), atol=1e-8, rtol=0.0)
