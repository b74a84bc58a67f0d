"""Every op, forward and backward, on a few odd shapes: what ``compute-sanitizer`` watches.

    compute-sanitizer --tool memcheck python bench/sanitize.py cuda

Odd sizes leave partial vectors and warps, one row is longer than a block sums at once, and slices
are misaligned and strided. The values are checked too, against the reference on the CPU.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # for cases.py

import torch
from cases import CASES, Case
from torch import Tensor

import fastvae

SHAPES = ((1, 1), (3, 5), (7, 33), (2, 1027), (130, 40), (2, 40_001))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def results(case: Case, inputs: list[Tensor], key: Tensor, reference: bool) -> list[Tensor]:
    """Outputs and gradients, float64 and on the CPU."""
    outputs = (case.call_reference if reference else case.call)(inputs, key)
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return [t.detach().cpu().double() for t in (*outputs, *grads)]


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    key, wrong = fastvae.random.key(7), 0
    for case, (dtype, tolerance), shape in product(CASES, TOLERANCE.items(), SHAPES):
        # one column too many, cut off: rows begin anywhere, and do not follow one another
        wide = case.draw((shape[0], shape[1] + 1), dtype)
        cut = [t.to(device)[..., 1:] if t.dim() > 1 else t.to(device) for t in wide]
        layouts = {"sliced": cut, "contiguous": [t.contiguous() for t in cut]}
        exact = [t.cpu().double() for t in cut]
        for tensors in (exact, *layouts.values()):
            for spec, tensor in zip(case.inputs, tensors, strict=True):
                tensor.requires_grad_(not spec.data)
        truths = results(case, exact, key, reference=True)
        for layout, inputs in layouts.items():
            values = results(case, inputs, key.to(device), reference=False)
            for value, truth in zip(values, truths, strict=True):
                error = (value - truth).abs().max().item()
                if not error <= tolerance * max(1.0, truth.abs().max().item()):  # NaN is wrong
                    print(f"{case.name} {dtype} {list(shape)} {layout}: off by {error:.2g}")
                    wrong += 1
    print(f"sanitize: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
