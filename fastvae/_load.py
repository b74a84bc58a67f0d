"""Loads the compiled module, or says why it is not used.

The torch that ``_C`` was built against is compared before the library is loaded: a plain extension
built for another torch often loads without an error and then misbehaves.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["built_with", "module", "reason"]


def _same_torch(built: str, running: str) -> bool:
    """Equal up to the patch release: 2.13.0+cpu runs what 2.13.1+cpu built, but not 2.14."""
    strip = [v.partition("+")[0].split(".")[:2] for v in (built, running)]
    return strip[0] == strip[1]


def _load() -> tuple[ModuleType | None, str | None, str]:
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps fastvae"
    try:
        built = str(importlib.import_module("fastvae._build").TORCH_VERSION)
    except ImportError:
        folder = Path(__file__).resolve().parent
        if (folder.parent / "csrc").is_dir():
            reason = (
                f"no compiled module in the source folder {folder} (torch {torch.__version__} is "
                "here; fastvae was built with none); run Python from another folder to meet an "
                "installed fastvae, or build here: pip install --no-build-isolation -e ."
            )
            return None, None, reason
        reason = (
            f"no compiled module in this installation (torch {torch.__version__} is here; fastvae "
            f"was built with none); build it: pip install . in a checkout, or {rebuild}"
        )
        return None, None, reason
    if not _same_torch(built, torch.__version__):
        reason = f"built with torch {built}, running torch {torch.__version__}; rebuild: {rebuild}"
        return None, built, reason
    try:
        return importlib.import_module("fastvae._C"), built, ""
    except ImportError as error:
        reason = (
            f"built with torch {built}, running torch {torch.__version__}, and the module does not "
            f"load ({error}); rebuild: {rebuild}"
        )
        return None, built, reason


module, built_with, reason = _load()
if module is None:
    warnings.warn(
        f"fastvae runs on its slow reference path: {reason}", RuntimeWarning, stacklevel=3
    )
