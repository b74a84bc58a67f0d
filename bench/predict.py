"""How long each case would take of a device at its limits: what a measurement is held against.

The bytes are the fewest that a case must read and write (:func:`bytes_min`). The operations are
those of the formula as fastvae.reference has it, counted by running it on meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from cases import Case, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .measure import bytes_min

__all__ = ["H200", "Device", "Prediction", "operations", "predict", "table"]


class Device(NamedTuple):
    name: str
    bandwidth: float  # bytes a second of a copy, read and written
    operations: float  # of float32 a second, a fused multiply-add being one
    launch: float  # seconds that a launch takes of the device


# The copy is measured (issue 5). 132 multiprocessors of 128 lanes at 1.98 GHz.
H200 = Device("H200", 4.3e12, 132 * 128 * 1.98e9, 3e-6)

# Functions of which each is some twenty operations, with all its digits.
_DEAR = {
    *("exp", "log", "log1p", "expm1", "tanh", "sigmoid", "softplus", "cos", "sin", "pow", "lgamma"),
    *("digamma", "logsumexp", "_softmax", "_log_softmax", "log_sigmoid_forward", "erfinv"),
}
_DEAR_COSTS = 20
_MOVES = ("clone", "copy_", "_to_copy", "cat", "stack", "zeros", "ones", "full", "empty", "fill_",
          "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_empty",
          "new_full", "new_ones", "arange", "index", "gather", "scatter", "scatter_add",
          "select_backward", "slice_backward", "flip", "detach", "alias", "eye", "scalar_tensor",
          "diagonal_backward", "tril", "triu", "unbind")  # fmt: skip
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class _Count(TorchDispatchMode):
    """Elementwise operations and products of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in _MOVES:
            return out
        tensors = [x for x in args if isinstance(x, Tensor)]
        results = list(out) if isinstance(out, tuple | list) else [out]
        numel = max((x.numel() for x in (*tensors, *results) if isinstance(x, Tensor)), default=0)
        if name in _PRODUCTS:
            numel = results[0].numel() * tensors[-2].shape[-1]
        self.operations += numel * (_DEAR_COSTS if name in _DEAR else 1)
        return out


def operations(case: Case, shape: Shape, mode: str) -> int:
    """Of the reference formula: forward, or forward and backward."""
    inputs = [
        torch.empty(i.shape(shape), device="meta").requires_grad_(mode == "full" and not i.data)
        for i in case.inputs
    ]
    key = torch.empty(2, dtype=torch.uint64, device="meta")
    with _Count() as count:
        outputs = case.call_reference(inputs, key)
        if mode == "full":
            wanted = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return count.operations


class Prediction(NamedTuple):
    title: str
    bytes: int
    operations: int
    seconds: float
    bound: str  # by memory, arithmetic, or launches


def predict(
    case: Case, shape: Shape, dtype: torch.dtype, mode: str, device: Device = H200
) -> Prediction:
    moved, done = bytes_min(case, shape, dtype, mode), operations(case, shape, mode)
    launches = device.launch * (2 if mode == "full" else 1)
    times = {
        "memory": moved / device.bandwidth,
        "arithmetic": done / device.operations,
        "launches": launches,
    }
    bound = max(times, key=lambda k: times[k])
    size = "x".join(map(str, shape))
    title = f"{case.name} {size} {str(dtype).removeprefix('torch.')} {mode}"
    return Prediction(title, moved, done, times[bound], bound)


def table(predictions: Iterable[Prediction]) -> str:
    lines = [f"{'case':<72} {'MB':>9} {'M operations':>13} {'us':>9}  bound by"]
    for p in predictions:
        lines.append(
            f"{p.title:<72} {p.bytes / 1e6:9.3g} {p.operations / 1e6:13.4g} "
            f"{p.seconds * 1e6:9.3g}  {p.bound}"
        )
    return "\n".join(lines)
