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

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..estimators import Elbo, importance_weighted_bound, rao_blackwell_bound
from ..estimators.control import MovingAverage
from ..functional import bernoulli_log_prob
from .base import Batch, Model, bernoulli_sample, check_option, configured, owned
from .networks import mlp

if TYPE_CHECKING:
    from ..data import Dataset

__all__ = ["SigmoidBelief"]

OBJECTIVES = {"nvil": None, "vimco": 10, "rws": 10}  # and K, if nobody says


class SigmoidBelief(Model):
    """A model of bits by layers of bits, inferred by layers of bits.

    Args:
        data_dim: D.
        latent_dim: the units of each layer.
        layers: L.
        likelihood: ``"bernoulli"``; there is no other.
        objective: ``"nvil"``, ``"vimco"`` or ``"rws"``.
        num_samples: K of vimco and rws; default: 10.

    >>> model = fastvae.models.SigmoidBelief(12, latent_dim=5, layers=2)
    >>> model.elbo(torch.rand(4, 12).bernoulli()).elbo.shape
    torch.Size([4])
    """

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
        many = {name: k for name, k in OBJECTIVES.items() if k is not None}
        num_samples = owned("SigmoidBelief", "num_samples", num_samples, objective, many)
        if objective == "vimco" and num_samples == 1:
            raise ValueError("SigmoidBelief: num_samples of vimco must be at least 2, got 1")
        self.config["num_samples"] = num_samples
        self.latent_dim, self.num_samples = latent_dim, num_samples
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

    def draw(
        self, x: Tensor, num_samples: int, generator: Generator | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Bits ``h_l`` of q(h | x), ``[K, B, units]`` each; log q of each layer, ``[K, B, L]``."""
        below = (x - self.mean).expand(num_samples, *x.shape)
        bits: list[Tensor] = []
        log_q: list[Tensor] = []
        for layer in self.inference:
            logits = layer(below[:1] if not bits else below).expand(num_samples, -1, -1)
            below = bernoulli_sample(logits, generator=generator)
            bits.append(below)
            log_q.append(bernoulli_log_prob(below, logits))
        return bits, torch.stack(log_q, -1)

    def log_p(self, x: Tensor, bits: list[Tensor]) -> Tensor:
        """log p(h_{l-1} | h_l) from the lowest, and of the top layer, ``[K, B, L + 1]``."""
        below = [x, *bits]
        terms = [
            bernoulli_log_prob(low, layer(high))
            for layer, (low, high) in zip(self.generation, pairwise(below), strict=True)
        ]
        return torch.stack([*terms, bernoulli_log_prob(bits[-1], self.top)], -1)

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound of one sample, without a gradient for q, ``[B]``."""
        bits, log_q = self.draw(x, 1, generator)
        log_p = self.log_p(x, bits)
        recon = log_p[0, :, 0]
        kl = log_q[0].sum(-1) - log_p[0, :, 1:].sum(-1)
        return Elbo(recon - kl, recon, kl)

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """The bound of K samples with the gradient that the objective names, ``[B]``."""
        bits, log_q = self.draw(batch.x, self.num_samples or 1, generator)
        log_p = self.log_p(batch.x, bits)
        recon = log_p[..., 0].mean(0)
        name = self.config["objective"]
        if name == "nvil":
            seen = [batch.x - self.mean, *bits[:-1]]
            shape = log_q.shape[:-1]
            baseline = torch.cat(
                [net(h).expand(*shape, 1) for net, h in zip(self.baselines, seen, strict=True)], -1
            )
            bound = rao_blackwell_bound(
                log_p, log_q, self.depends, self.depends[:, :-1], baseline, control=self.control
            )
        else:
            log_q = log_q.sum(-1)
            bound = importance_weighted_bound(log_p.sum(-1) - log_q, name, log_q=log_q)
        return Elbo(bound, recon, recon - bound)

    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        for start in range(0, num_samples, chunk):
            bits, log_q = self.draw(x, min(chunk, num_samples - start), generator)
            yield self.log_p(x, bits).sum(-1) - log_q.sum(-1)

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` draws of the top layer, ``[n, units]``."""
        return bernoulli_sample(self.top.expand(n, -1), generator=generator)

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """The means of p(x | h_1), from the top down, ``[n, D]``."""
        h = self.sample_prior(n, generator=generator)
        for layer in list(self.generation)[:0:-1]:
            h = bernoulli_sample(layer(h), generator=generator)
        return self.generation[0](h).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The means of p(x | h_1) at the likelier bits of q(h_1 | x), ``[B, D]``."""
        h = (self.inference[0](x - self.mean) > 0).to(x.dtype)
        return self.generation[0](h).sigmoid()
