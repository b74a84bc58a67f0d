"""fastvae: fused kernels for variational inference in PyTorch.

Drop-in functions with autograd (:mod:`fastvae.functional`), the same in plain PyTorch
(:mod:`fastvae.reference`), bounds and gradients made of them (:mod:`fastvae.estimators`), explicit
randomness (:mod:`fastvae.random`), normalizing flows as modules (:mod:`fastvae.flows`), and models
(:mod:`fastvae.models`). Functions of the first and third are importable from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from . import _load, estimators, flows, functional, random, reference
from .estimators import (
    annealed_importance_sampling,
    elbo,
    gaussian_entropy,
    importance_sampled_log_likelihood,
    importance_weighted_bound,
    leave_one_out,
    rao_blackwell_bound,
    score_function_bound,
    streaming_log_mean_exp,
)
from .functional import *  # noqa: F403
from .functional.route import OPS as _OPS
from .functional.route import explain as route

__version__ = "0.1.0"

_reference_ops = reference.register(_OPS) if _load.module is not None else None

__all__ = [
    "__version__",
    "annealed_importance_sampling",
    "build_info",
    "elbo",
    "estimators",
    "flows",
    "functional",
    "gaussian_entropy",
    "importance_sampled_log_likelihood",
    "importance_weighted_bound",
    "leave_one_out",
    "random",
    "rao_blackwell_bound",
    "reference",
    "route",
    "score_function_bound",
    "streaming_log_mean_exp",
]
__all__ += functional.__all__


_LATE = ("checkpoint", "data", "energies", "evaluation", "models", "pictures", "reproduce", "train")
if TYPE_CHECKING:
    from . import (  # noqa: F401, I001
        checkpoint, data, energies, evaluation, models, pictures, reproduce, train,
    )  # fmt: skip
else:

    def __getattr__(name: str) -> Any:
        """Modules that want more than torch are imported when they are asked for."""
        if name in _LATE:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_info() -> dict[str, object]:
    """Facts about this installation: versions, instruction set, threads, CUDA, and what is missing.

    >>> sorted(fastvae.build_info())[:3]
    ['compiled', 'cuda', 'isa']
    """
    module = _load.module
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_built": _load.built_with,
        "compiled": module is not None,
        "cuda": bool(module is not None and module.cuda),
        "isa": module.isa() if module is not None else "none",
        "threads": torch.get_num_threads(),
        "reason": _load.reason,
    }
