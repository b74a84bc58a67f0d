r"""Posteriors q(z | x), made of the outputs of an encoder.

=============  =====================================================================================
``gaussian``   :math:`z = \mu + \sigma \epsilon`
``full``       :math:`z = \mu + C \epsilon`, C a triangle
``low-rank``   :math:`z = \mu + \sigma \epsilon + V \eta`, V of R columns
``mixture``    :math:`q = \sum_m \pi_m N(\mu_m, \sigma_m^2)`: a sample of each component, weighted
others         a flow: :math:`z = f_h(z_0)`, :math:`\log q(z|x) = \log q_0(z_0|x) -
               \log|\det \partial f_h / \partial z_0|`, :math:`z_0` of ``gaussian``
=============  =====================================================================================

The context h of a flow is the last hidden layer of the encoder, of which each transform makes its
parameters.

Papers: Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in Deep
Generative Models", ICML 2014 (full, low rank); Morningstar et al., "Automatic Differentiation
Variational Inference with Mixture Families", AISTATS 2021; Rezende & Mohamed, "Variational
Inference with Normalizing Flows", ICML 2015; Kingma et al., "Improved Variational Inference with
Inverse Autoregressive Flow", NeurIPS 2016.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal

from .. import flows, random
from ..estimators import gaussian_entropy
from ..estimators.evidence import standard_log_prob
from ..estimators.surrogate import wide
from ..functional import (
    gaussian_log_prob,
    reparameterize,
    reparameterize_kl,
    reparameterize_low_rank_kl,
    reparameterize_tril_kl,
)

__all__ = ["POSTERIORS", "Family", "Posterior"]

LogProb = Callable[[Tensor], Tensor]
LogJoint = Callable[[Tensor], tuple[Tensor, Tensor]]  # z to log p(x | z) and log p(z)


@dataclass(frozen=True)
class Posterior(ABC):
    """q(z | x) of each datum of a batch, with a mean ``mu``, ``[B, D]``."""

    mu: Tensor

    @property
    def mean(self) -> Tensor:
        """What stands for z where one value must."""
        return self.mu

    @abstractmethod
    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        """``z``, ``[K, B, D]``, and log q(z | x), ``[K, B]``; both without K by default."""

    @abstractmethod
    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        """A sample ``z``, and its estimate of KL(q || p), of which is sampled what must be.

        Args:
            log_prior: z to log p(z); None for N(0, I).
        """

    def average(self, x: Tensor) -> Tensor:
        """The mean over what :meth:`draw_kl` drew for a datum, ``[B, ...]``."""
        return x

    @property
    def together(self) -> int:
        """How many samples come at once: :meth:`draw` takes multiples."""
        return 1

    def draws(
        self, num_samples: int, chunk: int, *, key: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`draw` in parts; those of ``low-rank`` and of bits depend on the parts' size."""
        rows, dim = math.prod(self.mu.shape[:-1]), self.mu.shape[-1]
        samples, size = (math.ceil(n / self.together) for n in (num_samples, chunk))
        size += -size % 4  # so that every part starts with a whole block of noise
        for start in range(0, samples, size):
            part = random.shard(key, start * rows, dim)
            yield self.draw(min(size, samples - start) * self.together, key=part)

    def log_weights(
        self, log_joint: LogJoint, num_samples: int, chunk: int, *, key: Tensor
    ) -> Iterator[Tensor]:
        """log p(x, z) - log q(z | x) of :meth:`draws`, ``[K, B]`` in parts."""
        for z, log_q in self.draws(num_samples, chunk, key=key):
            yield torch.add(*log_joint(z)) - log_q


class Dense(Posterior):
    """A posterior whose density is known at any z."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x), ``[..., B]``."""

    @abstractmethod
    def sample(self, num_samples: int | None = None, *, key: Tensor) -> Tensor:
        """``z`` of :meth:`draw`."""

    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z = self.sample(num_samples, key=key)
        return z, self.log_prob(z)

    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = self.draw(key=key)
        return z, log_q - (log_prior or standard_log_prob)(z)


class Normal(Dense):
    """A Gaussian of any covariance."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The q of parameters that are changed."""
        return type(self)(*(change(getattr(self, field.name)) for field in fields(self)))

    def detach(self) -> Self:
        """The same q, whose parameters get no gradient."""
        return self.map(Tensor.detach)

    @abstractmethod
    def entropy(self) -> Tensor:
        """In nats, ``[B]``."""

    @abstractmethod
    def sample_kl(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        """``z``, and KL(q || N(0, I)), ``[B]``."""

    def sample(self, num_samples: int | None = None, *, key: Tensor) -> Tensor:
        return self.sample_kl(num_samples, key=key)[0]

    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        if log_prior is None:
            return self.sample_kl(key=key)
        z = self.sample(key=key)
        return z, -self.entropy() - log_prior(z)


@dataclass(frozen=True)
class Gaussian(Normal):
    log_var: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        return gaussian_log_prob(z, self.mu, self.log_var)

    def entropy(self) -> Tensor:
        return gaussian_entropy(self.log_var)

    def sample_kl(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        return reparameterize_kl(self.mu, self.log_var, num_samples, key=key)

    def sample(self, num_samples: int | None = None, *, key: Tensor) -> Tensor:
        return reparameterize(self.mu, self.log_var, num_samples, key=key)


class Correlated(Normal):
    """A Gaussian whose density takes linear algebra, of which half types have none."""

    @property
    @abstractmethod
    def distribution(self) -> Distribution:
        """The same, of torch."""

    def log_prob(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.map(wide).distribution.log_prob(wide(z))


@dataclass(frozen=True)
class Full(Correlated):
    scale_tril: Tensor  # its diagonal is log C_ii

    @property
    def distribution(self) -> Distribution:
        c = self.scale_tril
        triangle = c.tril(-1) + c.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return MultivariateNormal(self.mu, scale_tril=triangle, validate_args=False)

    def entropy(self) -> Tensor:
        return gaussian_entropy(2.0 * self.scale_tril.diagonal(dim1=-2, dim2=-1))

    def sample_kl(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        return reparameterize_tril_kl(
            self.mu, self.scale_tril, num_samples, parameterization="log_scale", key=key
        )


@dataclass(frozen=True)
class LowRank(Correlated):
    log_var: Tensor
    factor: Tensor

    @property
    def distribution(self) -> Distribution:
        return LowRankMultivariateNormal(
            self.mu, self.factor, self.log_var.exp(), validate_args=False
        )

    def entropy(self) -> Tensor:
        with torch.autocast(self.mu.device.type, enabled=False):
            return self.map(wide).distribution.entropy()

    def sample_kl(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        return reparameterize_low_rank_kl(self.mu, self.log_var, self.factor, num_samples, key=key)


@dataclass(frozen=True)
class Mixture(Dense):
    """Components lead: ``mu`` and ``log_var`` are ``[M, B, D]``, ``log_pi`` is ``[M, B]``.

    Which component a sample is of has no gradient, so :meth:`draw` takes as many of every one.
    """

    log_var: Tensor
    log_pi: Tensor

    @property
    def mean(self) -> Tensor:
        return self.average(self.mu)

    @property
    def together(self) -> int:
        return len(self.mu)

    def average(self, x: Tensor) -> Tensor:
        pi = self.log_pi.exp()
        return (pi.reshape(*pi.shape, *[1] * (x.dim() - pi.dim())) * x).sum(0)

    def log_prob(self, z: Tensor) -> Tensor:
        pairs = gaussian_log_prob(z.unsqueeze(-3), self.mu, self.log_var)
        return (pairs + self.log_pi).logsumexp(-2)

    def sample(self, num_samples: int | None = None, *, key: Tensor) -> Tensor:
        """``z``, each of a component by chance."""
        shape = (num_samples or 1, *self.log_pi.shape)
        noise = random.gumbel(random.fold_in(key, 0), shape, self.log_pi.dtype)
        chosen = (self.log_pi + noise).argmax(1)[..., None].expand(-1, *self.mu.shape[1:])
        mu, log_var = (p.gather(0, chosen) for p in (self.mu, self.log_var))
        z = reparameterize(mu, log_var, key=key)
        return z.squeeze(0) if num_samples is None else z

    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        """One of a component by chance; or at least ``num_samples``, as many of each component.

        Of these log q is less by log(M pi_m), so that the plain mean over samples weighs what it
        should.
        """
        if num_samples is None:
            return super().draw(key=key)
        each = math.ceil(num_samples / self.together)
        z = reparameterize(self.mu, self.log_var, each, key=key)  # [S, M, B, D]
        log_q = self.log_prob(z) - self.log_pi - math.log(self.together)
        return z.flatten(0, 1), log_q.flatten(0, 1)

    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z = reparameterize(self.mu, self.log_var, key=key)
        return z, self.log_prob(z) - (log_prior or standard_log_prob)(z)


@dataclass(frozen=True)
class Moved(Posterior):
    """Samples of a Gaussian, moved by a flow."""

    log_var: Tensor
    move: Callable[[Tensor], tuple[Tensor, Tensor]]  # z_0 to z and log_det

    @property
    def mean(self) -> Tensor:
        """Where the flow takes the mean: not that of q, but near."""
        return self.move(self.mu)[0]

    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        start = reparameterize(self.mu, self.log_var, num_samples, key=key)
        z, log_det = self.move(start)
        return z, gaussian_log_prob(start, self.mu, self.log_var) - log_det

    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.move(reparameterize(self.mu, self.log_var, key=key))
        log_p = (log_prior or standard_log_prob)(z)
        return z, -gaussian_entropy(self.log_var) - log_det - log_p


# --- of a network's outputs -----------------------------------------------------------------------


class Family(NamedTuple):
    """How to make posteriors of D latents of a network's outputs.

    ``size`` is the number that a family has beside D: the rank, the components, the steps.
    """

    size: int | None  # if nobody says; None: it has none
    outputs: Callable[[int, int], int]  # (D, size) -> how many numbers make one
    make: Callable[[Tensor, int], Posterior]  # (outputs, D) -> q
    flow: Callable[[int, int, int], list[flows.Transform]] | None = None  # (D, size, context)


def _gaussian(outputs: Tensor, dim: int) -> Gaussian:
    return Gaussian(*outputs.chunk(2, -1))


def _full(outputs: Tensor, dim: int) -> Full:
    mu, entries = outputs.split([dim, dim * (dim + 1) // 2], -1)
    rows, columns = torch.tril_indices(dim, dim, device=outputs.device)
    scale_tril = outputs.new_zeros(*mu.shape, dim)
    scale_tril[..., rows, columns] = entries
    return Full(mu, scale_tril)


def _low_rank(outputs: Tensor, dim: int) -> LowRank:
    mu, log_var, factor = outputs.tensor_split([dim, 2 * dim], -1)
    return LowRank(mu, log_var, factor.unflatten(-1, (dim, -1)))


def _mixture(outputs: Tensor, dim: int) -> Mixture:
    each = outputs.unflatten(-1, (-1, 2 * dim + 1)).movedim(-2, 0)
    mu, log_var, logits = each.split([dim, dim, 1], -1)
    return Mixture(mu, log_var, logits.squeeze(-1).log_softmax(0))


def _iaf(dim: int, length: int, context_dim: int) -> list[flows.Transform]:
    return list(flows.iaf_posterior(dim, context_dim, length).transforms)[1:]  # type: ignore[return-value]


def _couplings(coupling: Callable[..., flows.Coupling]) -> Callable[..., list[flows.Transform]]:
    return lambda dim, length, context_dim: [
        coupling(dim, flip=k % 2 == 1, context_dim=context_dim) for k in range(length)
    ]


def _flow(length: int, make: Callable[[int, int, int], list[flows.Transform]]) -> Family:
    return Family(length, lambda d, _: 2 * d, _gaussian, make)


POSTERIORS = {
    "gaussian": Family(None, lambda d, _: 2 * d, _gaussian),
    "full": Family(None, lambda d, _: d + d * (d + 1) // 2, _full),
    "low-rank": Family(1, lambda d, rank: (2 + rank) * d, _low_rank),
    "mixture": Family(4, lambda d, components: components * (2 * d + 1), _mixture),
    "planar": _flow(16, lambda d, k, c: [flows.Planar(d, k, c)]),
    "radial": _flow(16, lambda d, k, c: [flows.Radial(d, k, c)]),
    "householder": _flow(4, lambda d, k, c: [flows.Householder(d, k, c)]),
    "sylvester": _flow(4, lambda d, k, c: [flows.Sylvester(d, k, min(d, 16), context_dim=c)]),
    "iaf": _flow(4, _iaf),
    "realnvp": _flow(4, _couplings(flows.AffineCoupling)),
    "nsf": _flow(2, _couplings(partial(flows.SplineCoupling, bound=5.0))),
}
