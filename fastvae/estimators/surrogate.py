"""What estimators share whose gradient is not that of their value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

__all__ = [
    "HALF",
    "AddGradient",
    "bernoulli_sample",
    "check_floating",
    "check_no_inference_mode",
    "check_same_device",
    "wide",
]

HALF = (torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """Half types compute in float32."""
    return x.float() if x.dtype in HALF else x


def bernoulli_sample(logits: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Bits, without a gradient. Faster than torch.bernoulli, which also refuses NaN, here 0.

    Of half types by uniforms in float32: theirs would add 1/512 to what is rare.
    """
    p = wide(logits.detach()).sigmoid()
    u = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
    return (u < p).to(logits.dtype)


class AddGradient(torch.autograd.Function):
    """``bound``; backward gives x the gradient of ``(coefficient * x).sum(0)`` as well.

    Where the gradient of the bound is zero, so is this one, also if the coefficient is infinite or
    NaN: what a user leaves out of the loss sends nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(bound: Tensor, coefficient: Tensor, x: Tensor) -> Tensor:
        return bound.view_as(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[2].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (coefficient,) = ctx.saved_tensors
        # The coefficient is cleared, not the product: that stays linear in grad where it is finite.
        left_out = (grad == 0.0) & ~coefficient.isfinite()
        coefficient = coefficient.masked_fill(left_out, 0.0)
        return grad, None, (grad * coefficient).to(ctx.dtype)


# --- checks ---------------------------------------------------------------------------------------


def check_floating(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"fastvae::{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"fastvae::{op}: {name} must be floating-point, got {x.dtype}")


def check_same_device(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(
            f"fastvae::{op}: {name} must be on the device of {other}, got {x.device} and {y.device}"
        )


def check_no_inference_mode(op: str) -> None:
    """Of what takes slopes even under torch.no_grad."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"fastvae::{op}: torch.inference_mode must be off, as slopes in z are taken; use "
            "torch.no_grad"
        )
