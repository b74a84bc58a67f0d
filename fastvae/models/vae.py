r"""The variational autoencoder of Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

.. math::
    \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, p(z))

with any posterior of :mod:`fastvae.models.posterior`, any prior of :mod:`fastvae.models.prior`, and
any objective of :mod:`fastvae.models.objective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from .. import random
from ..estimators import Elbo
from ..flows.flow import Chain
from .base import LIKELIHOODS, Batch, LatentVector, check_option, configured, owned
from .networks import mlp
from .objective import OBJECTIVES
from .posterior import POSTERIORS, Gaussian, Moved, Posterior
from .prior import PRIORS, Prior

__all__ = ["VAE"]


class VAE(LatentVector):
    """A latent variable decoded by a perceptron, and a perceptron that infers it.

    Args:
        data_dim: D, the number of pixels.
        latent_dim: the size of z.
        hidden: the widths of the encoder's hidden layers; the decoder has them in reverse.
        activation: ``"tanh"``, ``"relu"``, ``"softplus"``, ``"gated"`` or ``"maxout"``.
        likelihood: of x in [0, 1]: ``"bernoulli"``, or ``"gaussian"`` with a predicted variance.
        posterior: ``"gaussian"``, ``"full"``, ``"low-rank"``, ``"mixture"``; or a flow:
            ``"planar"``, ``"radial"``, ``"householder"``, ``"sylvester"``, ``"iaf"``,
            ``"realnvp"`` or ``"nsf"``.
        posterior_size: the rank, the components, or the steps of the flow; default: 1, 4, or 16,
            planar and radial, 4, or, of nsf, 2.
        prior: ``"standard"``, ``"mixture"``, ``"vamp"`` or ``"flow"``.
        prior_size: the components, the pseudo-inputs or the steps; default: 32, 500, 4.
        objective: ``"elbo"``, ``"beta"``, ``"free-bits"``, ``"tc"``, ``"iwae"`` or ``"dreg"``.
        num_samples: K of iwae and dreg; default: 50.
        beta: of beta and tc; default: 4.
        free_bits: lambda, in nats for each dimension of z, or where the KL has no such parts, as of
            flows, for the whole; default: 0.1.

    Raises:
        ValueError: if a size is not positive, there is no such option, or one is given without what
            it belongs to; and if they do not go together: tc needs a Gaussian posterior, dreg one
            of known density, vamp one that starts as a Gaussian.

    >>> model = fastvae.models.VAE(784, latent_dim=50, hidden=(200, 200))
    >>> elbo, recon, kl = model.elbo(torch.rand(16, 784))
    >>> (-elbo.mean()).backward()
    """

    @configured
    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        posterior: str = "gaussian",
        posterior_size: int | None = None,
        prior: str = "standard",
        prior_size: int | None = None,
        objective: str = "elbo",
        num_samples: int | None = None,
        beta: float | None = None,
        free_bits: float | None = None,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if min(data_dim, latent_dim, *hidden) < 1:
            raise ValueError(
                f"{name}: sizes must be positive, got {data_dim}, {latent_dim} and {list(hidden)}"
            )
        check_option(name, "likelihood", likelihood, LIKELIHOODS)
        check_option(name, "posterior", posterior, POSTERIORS)
        check_option(name, "prior", prior, ("standard", *PRIORS))
        check_option(name, "objective", objective, OBJECTIVES)
        family = POSTERIORS[posterior]
        if objective == "tc":
            check_option(name, "posterior of tc", posterior, ("gaussian",))
        if objective == "dreg":
            check_option(name, "posterior of dreg", posterior, ("gaussian", "full", "low-rank"))
        if prior == "vamp" and posterior != "gaussian" and family.flow is None:
            raise ValueError(
                f"{name}: posterior of vamp must be gaussian or a flow, got {posterior!r}"
            )
        sizes = {key: one.size for key, one in POSTERIORS.items()}
        posterior_size = owned(name, "posterior_size", posterior_size, posterior, sizes)
        sizes = {key: one.size for key, one in PRIORS.items()}
        prior_size = owned(name, "prior_size", prior_size, prior, sizes)
        owners = {"iwae": 50, "dreg": 50}
        num_samples = owned(name, "num_samples", num_samples, objective, owners)
        beta = owned(name, "beta", beta, objective, {"beta": 4.0, "tc": 4.0})
        free_bits = owned(name, "free_bits", free_bits, objective, {"free-bits": 0.1})

        self.config |= {
            "posterior_size": posterior_size,
            "prior_size": prior_size,
            "num_samples": num_samples,
            "beta": beta,
            "free_bits": free_bits,
        }
        self.latent_dim, self.likelihood = latent_dim, LIKELIHOODS[likelihood]
        self.num_samples, self.free_bits = num_samples, free_bits
        self.beta = 1.0 if beta is None else beta
        outputs = family.outputs(latent_dim, posterior_size or 0)
        self.encoder = mlp([data_dim, *hidden, outputs], activation)
        self.flow: Chain | None = None
        if family.flow is not None:
            context_dim = hidden[-1] if hidden else data_dim
            self.flow = Chain(family.flow(latent_dim, posterior_size or 0, context_dim))
        self.prior: Prior | None = None
        if prior != "standard":
            self.prior = PRIORS[prior].make(latent_dim, data_dim, prior_size or 0, self.encode)
        self.decoder = self.make_decoder(hidden, activation)

    def make_decoder(self, hidden: Sequence[int], activation: str) -> nn.Module:
        """A network from z to what the likelihood's link takes."""
        outputs = self.likelihood.heads * self.config["data_dim"]
        return mlp([self.latent_dim, *reversed(hidden), outputs], activation)

    def context(self, x: Tensor) -> Tensor:
        """The encoder's last hidden layer, ``[B, H]``, which a flow is given."""
        *trunk, _ = self.encoder
        return functools.reduce(lambda h, layer: layer(h), trunk, x)

    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of images ``[B, D]``."""
        context = self.context(x)
        q = POSTERIORS[self.config["posterior"]].make(self.encoder[-1](context), self.latent_dim)
        if (flow := self.flow) is None:
            return q
        assert isinstance(q, Gaussian)
        return Moved(q.mu, q.log_var, lambda z: flow.forward_and_log_det(z, context))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``mu`` and ``log_var`` of a Gaussian q(z | x), or of what a flow moves; ``[B, L]``."""
        q = self.posterior(x)
        if not isinstance(q, (Gaussian, Moved)):
            kind = self.config["posterior"]
            raise TypeError(f"{type(self).__name__}: encode must have a diagonal q, got {kind!r}")
        return q.mu, q.log_var

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | z), each ``[..., D]``: logits, or ``mu`` and ``log_var``."""
        return self.likelihood.link(*self.decoder(z).chunk(self.likelihood.heads, dim=-1))

    @property
    def log_prior(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.prior is None else self.prior.density()

    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: self.likelihood.log_prob(x, *self.decode(z))

    def mean_given(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(*self.decode(z))

    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.likelihood.sample(*self.decode(z), generator=generator)

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """What :mod:`fastvae.models.objective` has under the name of the model's objective."""
        key = random.from_generator(generator, batch.x.device)
        return OBJECTIVES[self.config["objective"]](self, batch.x, kl_weight, key)

    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` draws of z from p(z), ``[n, latent_dim]``."""
        if self.prior is None:
            return super().sample_prior(n, generator=generator)
        with torch.no_grad():
            return self.prior.sample(n, generator=generator)
