"""Which way a call goes: the dispatcher op, or the same formula in plain PyTorch.

With a compiled module every call goes to the dispatcher, which knows the device and the transforms
in force: CPU and CUDA tensors meet the kernels; under ``torch.func`` and forward-mode AD, where a
C++ autograd function cannot serve, the op calls its twin in :mod:`fastvae.reference`, which draws
the same noise from the same key. Without a compiled module the twin is all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _load, reference

__all__ = ["OPS", "explain", "op"]

OPS: list[str] = []  # every op that a family has asked for


def op(name: str) -> Callable[..., Any]:
    """The dispatcher op, its overload looked up once, or its twin."""
    OPS.append(name)
    if _load.module is None:
        return getattr(reference, name)  # type: ignore[no-any-return]
    return getattr(torch.ops.fastvae, name).default  # type: ignore[no-any-return]


def explain(name: str, device: str) -> str:
    """One phrase: the path that ``name`` takes for tensors on ``device`` outside any transform.

    >>> fastvae.route("gaussian_kl", "cpu")
    'cpu kernel'
    """
    if name not in OPS:
        raise ValueError(f"fastvae::route: op must be one of {', '.join(OPS)}, got {name}")
    kind = torch.device(device).type
    if _load.module is None:
        return f"reference ({_load.reason})"
    if kind == "cpu":
        return "cpu kernel"
    if kind == "cuda" and _load.module.cuda:
        return "cuda kernel"
    if kind == "cuda":
        return "none (fastvae was built without CUDA; rebuild with FASTVAE_CUDA=ON)"
    return f"none (no kernel for {kind}; use fastvae.reference.{name})"
