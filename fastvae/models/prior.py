r"""Priors p(z) beside N(0, I).

=============  =====================================================================================
``mixture``    :math:`\sum_k w_k N(\mu_k, \sigma_k^2)`, all learnt
``vamp``       :math:`\frac1K \sum_k q(z | u_k)`: what the encoder makes of K learnt pseudo-inputs
               (with a flow posterior, before the flow moves it)
``flow``       N(0, I), moved by affine couplings
=============  =====================================================================================

Papers: Tomczak & Welling, "VAE with a VampPrior", AISTATS 2018; Chen et al., "Variational Lossy
Autoencoder", ICLR 2017 (a flow).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from .. import flows
from ..functional import gaussian_mixture_log_prob, reparameterize
from .posterior import LogProb

__all__ = ["PRIORS", "Prior"]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # x to mu and log_var of q(z | x)


class Prior(nn.Module, ABC):
    """p(z), learnt with the model."""

    @abstractmethod
    def density(self) -> LogProb:
        """z to log p(z), nats, ``[..., L]`` to ``[...]``; what all z share is computed but once."""

    @abstractmethod
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``[n, L]``."""


class _Components(Prior):
    """A mixture of diagonal Gaussians."""

    @abstractmethod
    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``mu`` and ``log_var``, ``[K, L]``, and ``log_weights``, ``[K]``; None for all alike."""

    def density(self) -> LogProb:
        components = self.components()
        return lambda z: gaussian_mixture_log_prob(z, *components)

    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        mu, log_var, log_weights = self.components()
        weights = mu.new_ones(len(mu)) if log_weights is None else log_weights.exp()
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        return reparameterize(mu[k], log_var[k], generator=generator)


class Mixture(_Components):
    def __init__(self, latent_dim: int, size: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(size, latent_dim))
        self.log_var = nn.Parameter(torch.zeros(size, latent_dim))
        self.logits = nn.Parameter(torch.zeros(size))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mu, self.log_var, self.logits.log_softmax(0)


class Vamp(_Components):
    """``pseudo_logits`` are those of the pseudo-inputs' pixels, which start dark, as images are."""

    def __init__(self, data_dim: int, size: int, encode: Encode) -> None:
        super().__init__()
        self.encode = encode
        self.pseudo_logits = nn.Parameter(torch.randn(size, data_dim) - 2.0)

    def components(self) -> tuple[Tensor, Tensor, None]:
        return *self.encode(self.pseudo_logits.sigmoid()), None


class Flow(Prior):
    def __init__(self, latent_dim: int, size: int) -> None:
        super().__init__()
        couplings = [flows.AffineCoupling(latent_dim, flip=k % 2 == 1) for k in range(size)]
        self.flow = flows.Flow(flows.StandardNormal(latent_dim), couplings)

    def density(self) -> LogProb:
        return self.flow.log_prob

    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        like = next(self.parameters())
        noise = torch.randn(
            n, self.flow.base.dim, generator=generator, dtype=like.dtype, device=like.device
        )
        return self.flow.forward_and_log_det(noise)[0]


class Family(NamedTuple):
    """``size`` is the number of components or of steps."""

    size: int  # if nobody says
    make: Callable[[int, int, int, Encode], Prior]  # of latent_dim, data_dim, size, encode


PRIORS = {
    "mixture": Family(32, lambda latent, _, size, encode: Mixture(latent, size)),
    "vamp": Family(500, lambda _, data, size, encode: Vamp(data, size, encode)),
    "flow": Family(4, lambda latent, _, size, encode: Flow(latent, size)),
}
