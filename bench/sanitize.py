"""Every op, forward and backward, on a few odd shapes: what ``compute-sanitizer`` watches.

    compute-sanitizer --tool memcheck python bench/sanitize.py cuda 60

In 60 seconds, or as far as it gets in them: it takes every op in one shape before the next, and
says how far it got. Odd sizes leave partial vectors and warps, one row is longer than a block sums
at once, and slices are misaligned and strided. The values are checked too, against the reference on
the CPU.
"""

import sys
import time
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # for cases.py

import torch
from cases import CASES, Case
from torch import Tensor

import fastvae

SHAPES = ((7, 33), (2, 1027), (3, 5), (130, 40), (1, 1), (2, 40_001))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def results(case: Case, inputs: list[Tensor], key: Tensor, reference: bool) -> list[Tensor]:
    """Outputs and gradients, float64 and on the CPU."""
    outputs = (case.call_reference if reference else case.call)(inputs, key)
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return [t.detach().cpu().double() for t in (*outputs, *grads)]


def misaligned(x: Tensor) -> Tensor:
    """Rows that begin anywhere, and do not follow one another."""
    if x.dim() == 0:
        return x.clone()
    return torch.cat([x.new_full((*x.shape[:-1], 1), torch.nan), x], -1)[..., 1:]


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    end = time.monotonic() + float(sys.argv[2] if len(sys.argv) > 2 else "inf")
    key, wrong = fastvae.random.key(7), 0
    for done, (shape, case) in enumerate(product(SHAPES, CASES)):
        if time.monotonic() > end:
            print(f"sanitize: out of time after {done} of {len(SHAPES) * len(CASES)}")
            break
        if case.quadratic and shape[1] > 100:
            continue  # it has a matrix a row
        for dtype, tolerance in TOLERANCE.items():
            tolerance = max(tolerance, 2 * case.rtol[dtype])
            most = torch.finfo(dtype).max  # beyond which a half is infinite
            inputs = case.draw(shape, dtype)
            exact = [t.double() for t in inputs]
            inputs = [t.to(device) for t in inputs]
            layouts = {"contiguous": inputs, "sliced": [misaligned(t) for t in inputs]}
            for tensors in (exact, *layouts.values()):
                for spec, tensor in zip(case.inputs, tensors, strict=True):
                    tensor.requires_grad_(not spec.data)
            truths = results(case, exact, key, reference=True)
            for layout, tensors in layouts.items():
                values = results(case, tensors, key.to(device), reference=False)
                for value, truth in zip(values, truths, strict=True):
                    value, truth = value.clamp(-most, most), truth.clamp(-most, most)
                    error = (value - truth).abs().max().item()
                    if not error <= tolerance * max(1.0, truth.abs().max().item()):  # NaN is wrong
                        print(f"{case.name} {dtype} {list(shape)} {layout}: off by {error:.2g}")
                        wrong += 1
    print(f"sanitize: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
