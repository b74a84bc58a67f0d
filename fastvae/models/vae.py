r"""The variational autoencoder of Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

.. math::
    \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, N(0, I)),
    \qquad q(z|x) = N(z; \mu(x), \mathrm{diag}\, \sigma^2(x))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from ..estimators import Elbo, elbo, importance_sampled_log_likelihood
from .base import LIKELIHOODS, Model

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

    Raises:
        ValueError: if a size is not positive, or there is no such likelihood.

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
        self.config = {
            "data_dim": data_dim,
            "latent_dim": latent_dim,
            "hidden": list(hidden),
            "likelihood": likelihood,
        }
        self.latent_dim = latent_dim
        self.likelihood = LIKELIHOODS[likelihood]
        self.encoder = _mlp([data_dim, *hidden, 2 * latent_dim])
        self.decoder = _mlp([latent_dim, *reversed(hidden), self.likelihood.heads * data_dim])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``mu`` and ``log_var`` of q(z | x), each ``[B, latent_dim]``, for ``x`` of ``[B, D]``."""
        mu, log_var = self.encoder(x).chunk(2, dim=-1)
        return mu, log_var

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | z), each ``[..., D]``: logits, or ``mu`` and ``log_var``."""
        return self.likelihood.link(*self.decoder(z).chunk(self.likelihood.heads, dim=-1))

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound and its terms, in nats, each ``[B]``, from one sample of z per row."""
        return elbo(self._log_likelihood(x), *self.encode(x), generator=generator)

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

        >>> model.log_likelihood(torch.rand(16, 784), num_samples=64).shape
        torch.Size([16])
        """
        return importance_sampled_log_likelihood(
            self._log_likelihood(x),
            *self.encode(x),
            num_samples,
            chunk=chunk,
            generator=generator,
        )

    def _log_likelihood(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z to log p(x | z), one number per row of z."""
        return lambda z: self.likelihood.log_prob(x, *self.decode(z))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from N(0, I), ``[n, D]``.

        >>> model.sample(9).shape
        torch.Size([9, 784])
        """
        parameter = next(self.parameters())
        z = torch.randn(
            n,
            self.latent_dim,
            generator=generator,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        return self.likelihood.mean(*self.decode(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The means of p(x | z) at the mean of q(z | x), ``[B, D]``."""
        mu, _ = self.encode(x)
        return self.likelihood.mean(*self.decode(mu))
