"""What holds of affine couplings beyond tests/cases.py: round trips, extremes, the additive one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvae

KINDS = ("exp", "tanh_exp", "sigmoid", "gated")


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(64, 16, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "additive"])
def test_round_trip(kind, masked):
    x, shift, scale = inputs()
    options = {"mask": torch.arange(16) % 2 == 0} if masked else {}
    arguments = (shift,) if kind == "additive" else (shift, scale)
    if kind != "additive":
        options["kind"] = kind
    y, log_det = fastvae.affine_coupling(x, *arguments, **options)
    back, minus = fastvae.affine_coupling(y, *arguments, **options, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-13, rtol=0.0)
    torch.testing.assert_close(minus, -log_det, atol=1e-13, rtol=0.0)
    if masked:
        assert torch.equal(y[:, ::2], x[:, ::2])
        assert not torch.equal(y, x)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_det_is_that_of_the_jacobian(kind, inverse):
    x, shift, scale = (t[0] for t in inputs())
    mask = torch.arange(16) % 3 == 0

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.affine_coupling(x, shift, scale, mask, kind=kind, inverse=inverse)

    jacobian = torch.autograd.functional.jacobian(lambda x: step(x)[0], x)
    assert abs(step(x)[1] - torch.linalg.slogdet(jacobian)[1]) <= 1e-10


def test_additive_has_no_determinant():
    x, shift, _ = inputs(torch.bfloat16)
    y, log_det = fastvae.affine_coupling(x, shift)
    assert torch.equal(y, x + shift)
    assert y.dtype == torch.bfloat16
    assert log_det.dtype == torch.float32
    assert torch.equal(log_det, torch.zeros(64))
    for wrong, error, message in (
        (x.int(), TypeError, "x must be"),
        (x.float(), TypeError, "shift must have the dtype of x"),
        (x[:, :5], ValueError, "shift must broadcast with x"),
    ):
        with pytest.raises(error, match=f"fastvae::affine_coupling: {message}"):
            fastvae.affine_coupling(wrong, shift)


def test_a_mask_may_be_of_numbers_or_of_booleans_and_gets_no_gradient():
    x, shift, scale = inputs()
    mask = (torch.arange(16) % 2).double()
    y, log_det = fastvae.affine_coupling(x, shift, scale, mask)
    same, log_same = fastvae.affine_coupling(x, shift, scale, mask.bool())
    assert torch.equal(y, same)
    assert torch.equal(log_det, log_same)
    mask.requires_grad_()
    y, log_det = fastvae.affine_coupling(x, shift, scale, mask)
    (grad,) = torch.autograd.grad(y.sum() + log_det.sum(), mask)
    assert torch.equal(grad, torch.zeros(16, dtype=torch.float64))


def test_halves_are_slices_and_parameters_may_be_shared():
    x, shift, scale = inputs()
    y, log_det = fastvae.affine_coupling(x[:, 8:], shift[:, ::2], scale[:, 1::2])
    expected = fastvae.reference.affine_coupling(x[:, 8:], shift[:, ::2], scale[:, 1::2])
    torch.testing.assert_close((y, log_det), expected)
    own = [t[0].clone().requires_grad_() for t in (shift, scale)]  # as in ActNorm
    y, log_det = fastvae.affine_coupling(x, *own)
    d_shift, d_scale = torch.autograd.grad(y.sum() + log_det.sum(), own)
    torch.testing.assert_close(d_shift, torch.full((16,), 64.0, dtype=torch.float64))
    torch.testing.assert_close(d_scale, (x * own[1].exp() + 1.0).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_det_alone_has_a_finite_gradient_where_sigma_has_none(kind):
    x, shift = torch.ones(2, 3), torch.ones(2, 3)
    for size in (-200.0, 200.0):
        scale = torch.full((2, 3), size, requires_grad=True)
        for inverse in (False, True):
            _, log_det = fastvae.affine_coupling(x, shift, scale, kind=kind, inverse=inverse)
            (grad,) = torch.autograd.grad(log_det.sum(), scale)
            assert log_det.isfinite().all()
            assert grad.isfinite().all()


@pytest.mark.parametrize("kind", ["sigmoid", "gated"])
def test_log_sigma_keeps_its_digits_where_sigma_has_none(kind):
    scale = torch.tensor([[-500.0], [-40.0], [40.0]])
    _, log_det = fastvae.affine_coupling(torch.zeros(3, 1), torch.zeros(1), scale, kind=kind)
    exact = torch.nn.functional.logsigmoid(scale.double() + (2.0 if kind == "sigmoid" else 0.0))
    torch.testing.assert_close(log_det.double(), exact.squeeze(-1), rtol=1e-6, atol=0.0)


def test_no_such_kind():
    x, shift, scale = inputs()
    message = "affine_coupling: kind must be one of exp, tanh_exp, sigmoid, gated, got additive"
    with pytest.raises(ValueError, match=message):
        fastvae.affine_coupling(x, shift, scale, kind="additive")
