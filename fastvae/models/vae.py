r"""The variational autoencoder of Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

.. math::
    \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, N(0, I)),
    \qquad q(z|x) = N(z; \mu(x), \mathrm{diag}\, \sigma^2(x))

or a sample of that Gaussian moved by a normalizing flow (:mod:`fastvae.models.posterior`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from ..estimators import Elbo, elbo, gaussian_entropy, importance_sampled_log_likelihood
from ..estimators.evidence import log_prior
from ..flows.flow import Chain
from ..functional import reparameterize
from .base import LIKELIHOODS, Model
from .posterior import POSTERIORS

__all__ = ["VAE"]


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Affine maps from size to size, with tanh between them, as in the paper."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class VAE(Model):
    """A Gaussian latent variable decoded by a perceptron, and a perceptron that infers it.

    Args:
        data_dim: D, the number of pixels.
        latent_dim: the size of z.
        hidden: the widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: of x in [0, 1]: ``"bernoulli"``, or ``"gaussian"`` with a predicted variance.
        posterior: ``"gaussian"``; or its samples moved by a flow: ``"planar"``, ``"radial"``,
            ``"householder"``, ``"sylvester"``, ``"iaf"``, ``"realnvp"`` or ``"nsf"``.
        flow_length: the steps of the flow; default: 16, planar and radial, 4, or, of nsf, 2.

    Raises:
        ValueError: if a size is not positive, there is no such likelihood or posterior, or a
            Gaussian one is given a length.

    >>> model = fastvae.models.VAE(784, latent_dim=50, hidden=(200, 200))
    >>> elbo, recon, kl = model.elbo(torch.rand(16, 784))
    >>> (-elbo.mean()).backward()
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        posterior: str = "gaussian",
        flow_length: int | None = None,
    ) -> None:
        super().__init__()
        if min(data_dim, latent_dim, *hidden) < 1:
            raise ValueError(
                f"VAE: sizes must be positive, got {data_dim}, {latent_dim} and {list(hidden)}"
            )
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"VAE: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}"
            )
        if posterior != "gaussian" and posterior not in POSTERIORS:
            known = ", ".join(("gaussian", *POSTERIORS))
            raise ValueError(f"VAE: posterior must be one of {known}, got {posterior!r}")
        steps = flow_length
        if posterior == "gaussian":
            if flow_length is not None:
                raise ValueError(
                    f"VAE: flow_length must be that of a flow, got {flow_length} and {posterior!r}"
                )
        elif steps is None:
            steps = POSTERIORS[posterior].length
        elif not isinstance(steps, int) or steps < 1:
            raise ValueError(f"VAE: flow_length must be a positive integer, got {steps}")
        self.config = {
            "data_dim": data_dim,
            "latent_dim": latent_dim,
            "hidden": list(hidden),
            "likelihood": likelihood,
            "posterior": posterior,
            "flow_length": steps,
        }
        self.latent_dim = latent_dim
        self.likelihood = LIKELIHOODS[likelihood]
        self.encoder = _mlp([data_dim, *hidden, 2 * latent_dim])
        self.flow = None
        if steps is not None:
            context_dim = hidden[-1] if hidden else data_dim
            transforms = POSTERIORS[posterior].make(latent_dim, steps, context_dim)
            self.flow = Chain(transforms)
        self.decoder = _mlp([latent_dim, *reversed(hidden), self.likelihood.heads * data_dim])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``mu`` and ``log_var`` of q(z | x), each ``[B, latent_dim]``, for ``x`` of ``[B, D]``.

        Where there is a flow, of the sample that it moves.
        """
        mu, log_var, _ = self._encode(x)
        return mu, log_var

    def context(self, x: Tensor) -> Tensor:
        """The encoder's last hidden layer, ``[B, H]``, which a flow is given."""
        *trunk, _ = self.encoder
        return functools.reduce(lambda h, layer: layer(h), trunk, x)

    def _encode(
        self, x: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """``mu`` and ``log_var``; and the flow, z to (z, log_det), given the last hidden layer."""
        context = self.context(x)
        mu, log_var = self.encoder[-1](context).chunk(2, dim=-1)
        if (flow := self.flow) is None:
            return mu, log_var, lambda z: (z, z.new_zeros(z.shape[:-1]))
        return mu, log_var, lambda z: flow.forward_and_log_det(z, context)

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | z), each ``[..., D]``: logits, or ``mu`` and ``log_var``."""
        return self.likelihood.link(*self.decoder(z).chunk(self.likelihood.heads, dim=-1))

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound and its terms, in nats, each ``[B]``, from one sample of z per row."""
        mu, log_var, flow = self._encode(x)
        if self.flow is None:
            return elbo(self._log_likelihood(x), mu, log_var, generator=generator)
        z, log_det = flow(reparameterize(mu, log_var, generator=generator))
        recon = self._log_likelihood(x)(z)
        kl = -gaussian_entropy(log_var) - log_det - log_prior("VAE", None, z, "log_var")
        return Elbo(recon - kl, recon, kl)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 128,
        chunk: int = 16,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Importance-sampled log p(x), in nats, ``[B]``.

        x, ``[B, D]``, is encoded once. See :func:`fastvae.importance_sampled_log_likelihood` for
        the estimate, the arguments and errors.

        >>> model = fastvae.models.VAE(784)
        >>> model.log_likelihood(torch.rand(16, 784), num_samples=64).shape
        torch.Size([16])
        """
        mu, log_var, flow = self._encode(x)
        log_likelihood = self._log_likelihood(x)

        def log_joint(start: Tensor) -> Tensor:  # of what the flow moves
            z, log_det = flow(start)
            return log_likelihood(z) + log_prior("VAE", None, z, "log_var") + log_det

        return importance_sampled_log_likelihood(
            log_joint,
            mu,
            log_var,
            num_samples,
            chunk=chunk,
            prior=lambda z: z.new_zeros(z.shape[:-1]),  # the joint has it
            generator=generator,
        )

    def _log_likelihood(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z to log p(x | z), one number per row of z."""
        return lambda z: self.likelihood.log_prob(x, *self.decode(z))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from N(0, I), ``[n, D]``.

        >>> model = fastvae.models.VAE(784)
        >>> model.sample(9).shape
        torch.Size([9, 784])
        """
        z = self.sample_prior(n, generator=generator)
        return self.likelihood.mean(*self.decode(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The means of p(x | z) at the mean of q(z | x), moved by its flow, ``[B, D]``."""
        mu, _, flow = self._encode(x)
        return self.likelihood.mean(*self.decode(flow(mu)[0]))
