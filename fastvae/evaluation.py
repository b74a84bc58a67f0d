"""What a trained model is worth, beyond its bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from . import random
from .functional import log_mean_exp
from .models import VAE
from .models.local import refine
from .models.posterior import Gaussian

__all__ = ["InferenceGaps", "inference_gaps"]


class InferenceGaps(NamedTuple):
    """Mean nats per image: what q loses of log p(x), and why."""

    amortized: float  # the bound of what the encoder says
    local: float  # the bound of the best Gaussian of each image's own
    log_px: float  # importance-sampled, of the better of the two for a proposal

    @property
    def amortization_gap(self) -> float:
        """What is lost as one network infers all images."""
        return self.local - self.amortized

    @property
    def family_gap(self) -> float:
        """What is lost as q is a diagonal Gaussian; log p(x) is estimated from below."""
        return self.log_px - self.local

    def __str__(self) -> str:
        return (
            f"amortised bound      {self.amortized:9.2f} nats\n"
            f"each image's own     {self.local:9.2f} nats   "
            f"amortisation gap {self.amortization_gap:.2f}\n"
            f"log-likelihood       {self.log_px:9.2f} nats   family gap {self.family_gap:.2f}"
        )


@torch.no_grad()
def inference_gaps(
    model: VAE,
    x: Tensor,
    steps: int = 100,
    num_samples: int = 1000,
    *,
    generator: Generator | None = None,
) -> InferenceGaps:
    r"""Divides what the bound of a VAE with a Gaussian posterior loses.

    .. math::
        \log p(x) - \mathcal L(q_{\mathrm{encoder}})
        = \underbrace{\log p(x) - \mathcal L(q^*)}_{\text{of the family}}
        + \underbrace{\mathcal L(q^*) - \mathcal L(q_{\mathrm{encoder}})}_{\text{of amortisation}}

    Args:
        x: images, ``[B, D]``.
        steps: of :func:`fastvae.models.local.refine`, from the encoder's q.
        num_samples: for both bounds and for log p(x).

    Raises:
        ValueError: if the posterior is none that :func:`refine` can take.

    Paper: Cremer, Li & Duvenaud, "Inference Suboptimality in Variational Autoencoders", ICML 2018.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12).bernoulli()
    >>> gaps = fastvae.evaluation.inference_gaps(model, x, steps=5, num_samples=10)
    >>> gaps.amortization_gap > 0
    True
    """
    q = model.posterior(x)
    if not isinstance(q, Gaussian):
        kind = model.config["posterior"]
        raise ValueError(f"inference_gaps: model must have a gaussian posterior, got {kind!r}")
    key = random.from_generator(generator, x.device)
    own = refine(model, x, q, steps, key=random.fold_in(key, 0))
    first, second = (
        torch.cat([*model.log_weights(x, each, num_samples, key=random.fold_in(key, 1))])
        for each in (q, own)
    )
    log_px = log_mean_exp(second.movedim(0, -1))
    return InferenceGaps(*(float(w.double().mean()) for w in (first, second, log_px)))
