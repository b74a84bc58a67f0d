"""Who computes a case: fastvae, and what it is compared with; and whether the answer is right."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Case
from torch import Tensor

import fastvae

__all__ = ["PROVIDERS", "Call", "WrongAnswerError", "as_tuple", "build", "check", "timed_call"]

PROVIDERS = (
    *("fastvae", "eager", "compile", "compile-max-autotune", "torch.distributions"),
    *("nflows", "normflows", "zuko", "zuko-compile", "limit"),
)

Function = Callable[..., Any]
Call = Callable[[], Any]


class WrongAnswerError(Exception):
    """A provider's answer is not the answer."""


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def build(case: Case, device: str, wanted: tuple[str, ...]) -> dict[str, Function]:
    """The providers of a case by name, in the order in which they are shown; ``limit`` apart."""
    torch.compiler.reset()  # else the second size of an op would be compiled for dynamic shapes
    ours = functools.partial(case.fastvae, **case.options) if case.options else case.fastvae
    functions: dict[str, Function] = {"fastvae": ours, "eager": case.eager}
    functions["compile"] = torch.compile(case.eager)
    if device == "cuda":
        functions["compile-max-autotune"] = torch.compile(case.eager, mode="max-autotune")
    if case.distributions is not None:
        functions["torch.distributions"] = case.distributions
    functions.update(case.peers)
    return {name: f for name, f in functions.items() if name in wanted}


def timed_call(function: Function, inputs: list[Tensor], grad_outputs: list[Tensor] | None) -> Call:
    """What is timed: the function, and with ``grad_outputs`` the gradients of its inputs too."""
    if grad_outputs is None:
        return lambda: function(*inputs)
    wanted = [t for t in inputs if t.requires_grad]

    def full() -> tuple[Tensor, ...]:
        outputs = as_tuple(function(*inputs))
        return outputs + torch.autograd.grad(outputs, wanted, grad_outputs)

    return full


# --- the check ------------------------------------------------------------------------------------

# Wide enough for honest rounding in a formula written by hand (the textbook KL cancels), far too
# narrow for a wrong formula: how far off an output may be, as a fraction of its largest value.
_ALLOWED = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
_EDGE = 2**18  # elements checked at each end of inputs too large for float64 copies of everything
_BATCH = 512  # rows checked where each sees all the others: then no end of a batch stands alone


def _edges(shape: torch.Size) -> Iterator[slice]:
    """All rows, or the first and the last: that is where an index that overflows goes wrong."""
    rows, row_size = shape[0], math.prod(shape[1:])
    edge = max(1, _EDGE // row_size)
    if rows <= 2 * edge:
        yield slice(0, rows)
    else:
        yield slice(0, edge)
        yield slice(rows - edge, rows)


def _noise(case: Case, z: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The noise in a sample that cannot be replayed, if it can pass for a standard normal's."""
    noise = case.noise_in(z, *(x.detach() for x in inputs))
    mean, std, n = noise.mean().item(), noise.std().item(), noise.numel()
    slack = 6 / math.sqrt(n) + torch.finfo(dtype).eps  # six standard errors
    if not (abs(mean) <= slack and abs(std - 1) <= slack):
        raise WrongAnswerError(f"its noise has mean {mean:.3g} and std {std:.3g} over {n} elements")
    return noise


def _compare(what: str, value: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    if value.shape != truth.shape:
        raise WrongAnswerError(f"{what} is {list(value.shape)}, must be {list(truth.shape)}")
    error = (value.detach().double() - truth).abs().max().item()
    allowed = _ALLOWED[dtype] * truth.abs().max().item()
    if not error <= allowed:  # and NaN is wrong
        raise WrongAnswerError(f"{what} is off by {error:.2g}, allowed {allowed:.2g}")
    return error


def check(
    case: Case,
    name: str,
    function: Function,
    inputs: list[Tensor],
    grad_outputs: list[Tensor] | None,
) -> float:
    """The largest absolute error against the float64 reference, or :class:`WrongAnswerError`.

    fastvae's samples are replayed from its key. Others' cannot be: their noise is recovered from
    ``z`` and tested to be standard normal, and then gradients are compared for that very noise.
    """
    if case.sees_batch:
        few = slice(0, _BATCH)
        inputs = [t.detach()[few].requires_grad_(t.requires_grad) for t in inputs]
        grad_outputs = grad_outputs and [g[few] for g in grad_outputs]
    dtype, shape = inputs[0].dtype, inputs[0].shape
    key = fastvae.random.key(2026, device=inputs[0].device)
    replayed = case.sampled and name == "fastvae"
    outputs = as_tuple(function(*inputs, **({"key": key} if replayed else {})))
    kinds = dict(zip(case.outputs, outputs, strict=True))
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad and grad_outputs is not None]
    grads: tuple[Tensor, ...] = ()
    if grad_outputs is not None:
        cast = [g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [inputs[i] for i in wanted], cast)

    worst = 0.0
    # the gradient of what rows share is a sum over all of them
    apart = all(
        i.has_rows and t.dim() > 0 and t.shape[0] == shape[0]
        for t, i in zip(inputs, case.inputs, strict=True)
    )
    for rows in _edges(shape) if apart else [slice(None)]:
        cut = case.rows([t.detach() for t in inputs], rows)
        exact = [t.double().requires_grad_(i in wanted) for i, t in enumerate(cut)]
        start = rows.start or 0
        at = fastvae.random.shard(key, start, math.prod(shape[1:])) if case.sampled else None
        truths = list(case.call_reference(exact, at))
        if case.sampled and not replayed:
            z = kinds["element"][rows].detach().double()
            noise = _noise(case, z, exact, dtype)
            truths[case.outputs.index("element")] = case.sample_from(noise, *exact)
        true_grads: tuple[Tensor, ...] = ()
        if grad_outputs is not None:
            ones = [g[rows].double() for g in grad_outputs]
            true_grads = torch.autograd.grad(truths, [exact[i] for i in wanted], ones)
        pairs = [
            (f"output {i}", o[rows], t)
            for i, (o, t) in enumerate(zip(outputs, truths, strict=True))
        ]
        pairs += [
            (f"the gradient of {case.inputs[i].name}", g[rows] if case.inputs[i].has_rows else g, t)
            for i, g, t in zip(wanted, grads, true_grads, strict=True)
        ]
        for what, value, truth in pairs:
            is_other = name in case.others or (case.approximate and name != "fastvae")
            if is_other:  # reported, not refused
                worst = max(worst, (value.detach().double() - truth).abs().max().item())
                continue
            worst = max(worst, _compare(what, value, truth.detach(), dtype))
    return worst
