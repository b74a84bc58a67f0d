r"""Sigmoid belief networks: L layers of bits, which no path's derivative reaches.

.. math::
    p(x, h) = p(h_L) \prod_{l=1}^{L} p(h_{l-1} | h_l), \qquad
    q(h|x) = \prod_{l=1}^{L} q(h_l | h_{l-1}), \qquad h_0 = x

each factor a Bernoulli of an affine function. What trains q:

=========  =========================================================================================
``nvil``   the score function: of layer l, whose signal is what depends on :math:`h_l`, less a
           baseline that looks at :math:`h_{l-1}`, less a running mean, by a running deviation
``vimco``  the bound of K samples, each with the mean of the others for a baseline
``rws``    reweighted wake-sleep: the wake phase of q on K weighted samples
=========  =========================================================================================

Papers: Mnih & Gregor, "Neural Variational Inference and Learning in Belief Networks", ICML 2014;
Mnih & Rezende, "Variational Inference for Monte Carlo Objectives", ICML 2016; Bornschein & Bengio,
"Reweighted Wake-Sleep", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from .. import random
from ..estimators import Elbo, importance_weighted_bound, rao_blackwell_bound
from ..estimators.control import MovingAverage
from ..estimators.surrogate import bernoulli_sample
from ..functional import bernoulli_log_prob
from .base import Batch, LatentVector, check_option, configured, owned
from .networks import mlp
from .posterior import Dense

if TYPE_CHECKING:
    from ..data import Dataset

__all__ = ["SigmoidBelief"]

OBJECTIVES = {"nvil": None, "vimco": 10, "rws": 10}  # and K, if nobody says


@dataclass(frozen=True)
class Bits(Dense):
    """q(h | x), layer by layer. What it begins with, ``mu``, is x less the mean image."""

    layers: Sequence[nn.Module]

    def of_layers(
        self, num_samples: int, generator: Generator | None
    ) -> tuple[list[Tensor], Tensor]:
        """``h_l``, ``[K, B, units]`` each, and log q of each layer, ``[K, B, L]``."""
        low, bits, log_q = self.mu.unsqueeze(0), [], []
        for layer in self.layers:
            logits = layer(low).expand(num_samples, -1, -1)
            low = bernoulli_sample(logits, generator=generator)
            bits.append(low)
            log_q.append(bernoulli_log_prob(low, logits))
        return bits, torch.stack(log_q, -1)

    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        bits, log_q = self.of_layers(num_samples or 1, random.to_generator(key))
        h, log_prob = torch.cat(bits, -1), log_q.sum(-1)
        return (h[0], log_prob[0]) if num_samples is None else (h, log_prob)

    def sample(self, num_samples: int | None = None, *, key: Tensor) -> Tensor:
        return self.draw(num_samples, key=key)[0]

    def log_prob(self, z: Tensor) -> Tensor:
        bits = z.chunk(len(self.layers), -1)
        factors = zip(self.layers, pairwise([self.mu, *bits]), strict=True)
        return torch.stack([bernoulli_log_prob(h, f(low)) for f, (low, h) in factors]).sum(0)

    @property
    def mean(self) -> Tensor:
        """Each layer's, as if the one below it were at its mean: of the lowest it is that of q."""
        h, means = self.mu, []
        for layer in self.layers:
            h = layer(h).sigmoid()
            means.append(h)
        return torch.cat(means, -1)


class SigmoidBelief(LatentVector):
    """A model of bits by layers of bits, inferred by layers of bits: z has all of them.

    Args:
        data_dim: D.
        latent_dim: the units of each layer; z has L times as much.
        layers: L.
        likelihood: ``"bernoulli"``; there is no other.
        objective: ``"nvil"``, ``"vimco"`` or ``"rws"``.
        num_samples: K of vimco and rws; default: 10.

    >>> model = fastvae.models.SigmoidBelief(12, latent_dim=5, layers=2)
    >>> model.elbo(torch.rand(4, 12).bernoulli()).elbo.shape
    torch.Size([4])
    """

    bits = True
    weighs_kl = False  # a signal is of the whole bound
    mean: Tensor
    depends: Tensor

    @configured
    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 200,
        layers: int = 1,
        likelihood: str = "bernoulli",
        objective: str = "nvil",
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_option("SigmoidBelief", "likelihood", likelihood, ("bernoulli",))
        check_option("SigmoidBelief", "objective", objective, OBJECTIVES)
        if min(data_dim, latent_dim, layers) < 1:
            raise ValueError(
                f"SigmoidBelief: sizes must be positive, got {data_dim}, {latent_dim} and {layers}"
            )
        num_samples = owned("SigmoidBelief", "num_samples", num_samples, objective, OBJECTIVES)
        if objective == "vimco" and num_samples == 1:
            raise ValueError("SigmoidBelief: num_samples of vimco must be at least 2, got 1")
        self.config["num_samples"] = num_samples
        self.latent_dim, self.num_samples = layers * latent_dim, num_samples
        sizes = [data_dim, *[latent_dim] * layers]
        self.inference = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.generation = nn.ModuleList(nn.Linear(b, a) for a, b in pairwise(sizes))
        self.top = nn.Parameter(torch.zeros(latent_dim))
        self.register_buffer("mean", torch.zeros(data_dim))  # of x, which inference subtracts
        if objective == "nvil":
            self.baselines = nn.ModuleList(mlp([size, 100, 1]) for size in sizes[:-1])
            self.control = MovingAverage(decay=0.9, normalize=True, shape=(layers,))
        # Of layer l all that depends on h_l: the factor below it, and all from its own upwards.
        depends = torch.ones(layers, layers + 1).triu().bool()
        self.register_buffer("depends", depends, persistent=False)

    def prepare(self, data: Dataset, generator: Generator) -> None:
        """Takes the mean image: q sees differences from it, and p(x | h) begins with it."""
        self.mean.copy_(data.train.float().mean(0))
        with torch.no_grad():
            self.generation[0].bias.copy_(self.mean.logit(eps=1e-2))  # type: ignore[operator]

    @property
    def decoded_dim(self) -> int:
        return self.latent_dim // len(self.generation)

    def posterior(self, x: Tensor) -> Bits:
        return Bits(x - self.mean, self.inference)  # type: ignore[arg-type]

    def log_p_of_layers(self, z: Tensor) -> list[Tensor]:
        """log p(h_l | h_{l+1}) of each layer, ``[..., B]``."""
        bits = z.chunk(len(self.generation), -1)
        logits = [f(h) for f, h in zip(list(self.generation)[1:], bits[1:], strict=True)]
        pairs = zip(bits, [*logits, self.top], strict=True)
        return [bernoulli_log_prob(h, eta) for h, eta in pairs]

    @property
    def log_prior(self) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.stack(self.log_p_of_layers(z)).sum(0)

    def _logits(self, z: Tensor) -> Tensor:
        """Of p(x | h_1)."""
        return self.generation[0](z[..., : self.decoded_dim])  # type: ignore[no-any-return]

    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: bernoulli_log_prob(x, self._logits(z))

    def mean_given(self, z: Tensor) -> Tensor:
        return self._logits(z).sigmoid()

    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        return bernoulli_sample(self._logits(z), generator=generator)

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` draws of all layers, from the top down, ``[n, L * units]``."""
        bits = [bernoulli_sample(self.top.expand(n, -1), generator=generator)]
        for layer in list(self.generation)[:0:-1]:
            bits.insert(0, bernoulli_sample(layer(bits[0]), generator=generator))
        return torch.cat(bits, -1)

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """The bound of K samples with the gradient that the objective names, ``[B]``."""
        q = self.posterior(batch.x)
        bits, log_q = q.of_layers(self.num_samples or 1, generator)
        z = torch.cat(bits, -1)
        log_p_x = self.log_p_x_given(batch.x)(z)
        log_p = torch.stack([log_p_x, *self.log_p_of_layers(z)], -1)
        kl = log_q.sum(-1) - log_p[..., 1:].sum(-1)
        name = self.config["objective"]
        if name == "nvil":
            seen = [q.mu, *bits[:-1]]
            shape = log_q.shape[:-1]
            baseline = torch.cat(
                [net(h).expand(*shape, 1) for net, h in zip(self.baselines, seen, strict=True)], -1
            )
            bound = rao_blackwell_bound(
                log_p, log_q, self.depends, self.depends[:, :-1], baseline, control=self.control
            )
        else:
            bound = importance_weighted_bound(log_p_x - kl, name, log_q=log_q.sum(-1))
        return Elbo(bound, log_p_x.mean(0), kl.mean(0))
