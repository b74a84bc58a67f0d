"""Loads what only training needs: matplotlib, safetensors, scikit-learn and tqdm.

They are the extra ``fastvae[train]``; ``import fastvae`` touches none of them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(ImportError):
    """A package of the extra ``fastvae[train]`` is not installed."""


def require(module: str) -> ModuleType:
    """Import ``module``, or say in one sentence how to install it.

    Raises:
        MissingExtraError: if its package is not installed.

    >>> fastvae.extras.require("tqdm").__name__
    'tqdm'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and broken: its own message says more
        raise MissingExtraError(
            f"this needs the package {package.replace('sklearn', 'scikit-learn')}, which is not "
            "installed; run: pip install 'fastvae[train]'"
        ) from error
