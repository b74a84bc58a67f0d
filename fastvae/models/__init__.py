"""Models made of fastvae's functions.

To add one, write a subclass of :class:`Model` or, if z is a vector, of reals or of bits, of
:class:`LatentVector`, whose ``__init__`` is :func:`base.configured`, in a file of its own, and name
it in :data:`MODELS`: training, checkpoints, evaluation, the command line and
``tests/test_models.py`` find it there.
"""

from __future__ import annotations

from typing import Any

from .base import LIKELIHOODS, Batch, Elbo, LatentVector, Likelihood, Model
from .dlgm import DLGM
from .factor_analysis import FactorAnalysis
from .local import LocalVAE
from .m1m2 import M1M2
from .m2 import M2
from .naive_bayes import NaiveBayes
from .networks import ACTIVATIONS
from .objective import OBJECTIVES
from .posterior import POSTERIORS
from .prior import PRIORS
from .sigmoid_belief import SigmoidBelief
from .vae import VAE

__all__ = [
    "ACTIVATIONS",
    "DLGM",
    "LIKELIHOODS",
    "M1M2",
    "M2",
    "MODELS",
    "OBJECTIVES",
    "POSTERIORS",
    "PRIORS",
    "VAE",
    "Batch",
    "Elbo",
    "FactorAnalysis",
    "LatentVector",
    "Likelihood",
    "LocalVAE",
    "Model",
    "NaiveBayes",
    "SigmoidBelief",
    "build",
]

MODELS: dict[str, type[Model]] = {
    "vae": VAE,
    "dlgm": DLGM,
    "local-vae": LocalVAE,
    "factor-analysis": FactorAnalysis,
    "naive-bayes": NaiveBayes,
    "m2": M2,
    "m1m2": M1M2,
    "sbn": SigmoidBelief,
}


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
