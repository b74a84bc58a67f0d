"""Linear flows: against matrices built by hand, their inverses, extremes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvae

KINDS = ("lu", "lower", "upper")


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=g, dtype=torch.float64)


def by_hand(matrix: Tensor, kind: str) -> Tensor:
    scale = torch.diag(matrix.diagonal().exp())
    lower, upper = matrix.tril(-1), matrix.triu(1)
    if kind == "lu":
        return (lower + torch.eye(len(matrix), dtype=matrix.dtype)) @ (upper + scale)
    return (lower if kind == "lower" else upper) + scale


@pytest.mark.parametrize("dims", [1, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_flow(kind, dims):
    z, matrix, bias = draw(3, 7, dims), draw(dims, dims, scale=0.2), draw(dims)
    x, log_det = fastvae.linear_flow(z, matrix, bias, kind=kind)
    whole = by_hand(matrix, kind)
    torch.testing.assert_close(x, z @ whole.T + bias)
    exact = torch.linalg.slogdet(whole)
    assert exact.sign == 1.0
    assert log_det.shape == (3, 7)
    assert (log_det - exact.logabsdet).abs().max() <= 1e-10
    back, minus = fastvae.linear_flow(x, matrix, bias, kind=kind, inverse=True)
    torch.testing.assert_close(back, z, atol=1e-11, rtol=0.0)
    assert torch.equal(minus, -log_det)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_flow_is_differentiable_twice_and_compiles(kind, inverse):
    def flow(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.linear_flow(*inputs, kind=kind, inverse=inverse)

    inputs = [t.requires_grad_() for t in (draw(4, 3), draw(3, 3, scale=0.5), draw(3))]
    assert torch.autograd.gradcheck(flow, inputs)
    assert torch.autograd.gradgradcheck(flow, inputs)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), flow(*inputs))


def test_autocast_does_not_round_the_map():
    z, matrix = draw(5, 4).float(), draw(4, 4, scale=0.3).float()
    expected = fastvae.linear_flow(z, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fastvae.linear_flow(z, matrix), expected, rtol=0.0, atol=0.0)
        x, _ = fastvae.linear_flow(z.bfloat16(), matrix)  # as another layer gave it
        assert x.dtype == torch.float32


def test_a_pixel_is_a_row_of_an_invertible_convolution():
    images, matrix = draw(2, 6, 5, 4), draw(4, 4)
    x, log_det = fastvae.linear_flow(images, matrix)
    kernel = by_hand(matrix, "lu")[:, :, None, None]
    expected = torch.nn.functional.conv2d(images.movedim(-1, 1), kernel)
    torch.testing.assert_close(x.movedim(-1, 1), expected)
    torch.testing.assert_close(
        log_det.sum((1, 2)), 30.0 * torch.linalg.slogdet(kernel[..., 0, 0])[1].expand(2)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    z, matrix = draw(5, 4).to(dtype), draw(4, 4, scale=0.3).to(dtype)
    for inverse in (False, True):
        x, log_det = fastvae.linear_flow(z, matrix, inverse=inverse)
        exact = fastvae.linear_flow(z.double(), matrix.double(), inverse=inverse)
        assert x.dtype == dtype
        assert log_det.dtype == torch.float32
        torch.testing.assert_close(x.double(), exact[0], atol=0.05, rtol=0.02)
        torch.testing.assert_close(log_det.double(), exact[1], atol=1e-6, rtol=1e-6)


def test_no_rows_no_columns_and_what_is_not_a_number():
    x, log_det = fastvae.linear_flow(torch.zeros(0, 3), torch.zeros(3, 3), inverse=True)
    assert x.shape == (0, 3)
    assert log_det.shape == (0,)
    for inverse in (False, True):
        x, log_det = fastvae.linear_flow(torch.zeros(2, 0), torch.zeros(0, 0), inverse=inverse)
        assert x.shape == (2, 0)
        assert torch.equal(log_det, torch.zeros(2))
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    x, _ = fastvae.linear_flow(rows, torch.zeros(2, 2))
    assert x[0].isfinite().all()
    assert x[1, 0].isnan()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fastvae.linear_flow(torch.zeros(2, 3), torch.zeros(3, 2)),
            ValueError,
            r"linear_flow: matrix must be \[D, D\] for the D of z, got \[3, 2\] and \[2, 3\]",
        ),
        (
            lambda: fastvae.linear_flow(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2)),
            ValueError,
            r"linear_flow: bias must be \[D\], got \[2\] and \[2, 3\]",
        ),
        (
            lambda: fastvae.linear_flow(torch.zeros(2, 3), torch.zeros(3, 3), kind="svd"),
            ValueError,
            "linear_flow: kind must be one of lu, lower, upper, got svd",
        ),
        (
            lambda: fastvae.linear_flow(torch.zeros(2, 3), torch.zeros(3, 3).double()),
            TypeError,
            "linear_flow: matrix must have the dtype of z, got torch.float64 and torch.float32",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
