"""Models made of fastvae's functions.

To add one, write a subclass of :class:`Model` in a file of its own and name it in :data:`MODELS`:
training, checkpoints, evaluation and the command line find it there.
"""

from __future__ import annotations

from typing import Any

from .base import LIKELIHOODS, Elbo, Likelihood, Model
from .factor_analysis import FactorAnalysis
from .posterior import POSTERIORS
from .vae import VAE

__all__ = [
    "LIKELIHOODS",
    "MODELS",
    "POSTERIORS",
    "VAE",
    "Elbo",
    "FactorAnalysis",
    "Likelihood",
    "Model",
    "build",
]

MODELS: dict[str, type[Model]] = {"vae": VAE, "factor-analysis": FactorAnalysis}


def build(name: str, config: dict[str, Any]) -> Model:
    """The model ``name`` with the arguments ``config``, as :attr:`Model.config` holds them.

    Raises:
        ValueError: if there is no such model, or it does not take these arguments.

    >>> fastvae.models.build("vae", {"data_dim": 64, "latent_dim": 8, "hidden": [32]}).latent_dim
    8
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; take one of {', '.join(MODELS)}")
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name} cannot be built from {config}: {error}") from error
