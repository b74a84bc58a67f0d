"""Every op again in plain PyTorch, formula by formula, with the names and arguments of the op.

The oracle of the tests (in float64), the baseline of the benchmark, what double backward
differentiates, and what runs under functorch transforms, under forward-mode AD and without a
compiled module. Written to be right and readable, not fast.
"""

from __future__ import annotations

import torch

from . import (
    bound,
    categorical,
    counts,
    coupling,
    covariance,
    gaussian,
    likelihood,
    logistic,
    mixture,
    residual_flow,
    spline,
)
from .bound import *  # noqa: F403
from .categorical import *  # noqa: F403
from .counts import *  # noqa: F403
from .coupling import *  # noqa: F403
from .covariance import *  # noqa: F403
from .gaussian import *  # noqa: F403
from .likelihood import *  # noqa: F403
from .logistic import *  # noqa: F403
from .mixture import *  # noqa: F403
from .residual_flow import *  # noqa: F403
from .spline import *  # noqa: F403

__all__: list[str] = ["register"]
__all__ += bound.__all__
__all__ += categorical.__all__
__all__ += counts.__all__
__all__ += coupling.__all__
__all__ += covariance.__all__
__all__ += gaussian.__all__
__all__ += likelihood.__all__
__all__ += logistic.__all__
__all__ += mixture.__all__
__all__ += residual_flow.__all__
__all__ += spline.__all__


def register(ops: list[str]) -> torch.library.Library:
    """Make the twins of ``ops`` callable from C++, where double backward differentiates them."""
    library = torch.library.Library("fastvae_reference", "DEF")
    for name in ops:
        schema = str(getattr(torch.ops.fastvae, name).default._schema)
        library.define(schema.removeprefix("fastvae::"))
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
            library.impl(name, globals()[name], key)
    return library  # the registrations live as long as this
