r"""Factor analysis: a linear model whose bound is exact, if its posterior is of full covariance.

.. math::
    p(z) = N(0, I), \quad p(x|z) = N(x;\, \theta_0 + \theta_1 z,\, \mathrm{diag}\, e^{\theta_2}),
    \quad p(\theta) = N(0, \kappa^2 I)

.. math::
    p(z|x) = N(z;\, \Sigma\, \theta_1^\top e^{-\theta_2} (x - \theta_0),\, \Sigma), \qquad
    \Sigma^{-1} = I + \theta_1^\top \mathrm{diag}(e^{-\theta_2})\, \theta_1

q(z|x) = N(z; A x + a, C C') has the same form: it can be p(z|x) if C is a triangle, and mostly not
if C is diagonal. As all is linear and Gaussian, nothing of z is sampled:

.. math::
    E_q[\log p(x|z)] = \log N(x; \theta_0 + \theta_1 \mu, e^{\theta_2})
    - \tfrac12 \sum_d e^{-\theta_{2,d}} |C^\top \theta_{1,d}|^2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from ..estimators import Elbo
from ..functional import (
    gaussian_log_prob,
    gaussian_tril_kl,
    reparameterize,
    reparameterize_kl,
)
from .base import LatentVector, configured
from .posterior import Full, Gaussian

__all__ = ["FactorAnalysis"]

POSTERIORS = ("full", "diagonal")


class FactorAnalysis(LatentVector):
    """Factors z, of which x is a linear function and noise of a variance for each column.

    Args:
        data_dim: D.
        latent_dim: L, the number of factors.
        likelihood: ``"gaussian"``; there is no other.
        posterior: of z: ``"full"`` covariance, or ``"diagonal"``.
        prior_scale: kappa; default: none, and theta is learnt as it is. With it theta has a
            diagonal Gaussian posterior, and every image bears its share of the divergence.
        dataset_size: N, the images among which it is shared.

    >>> model = fastvae.models.FactorAnalysis(6, latent_dim=2)
    >>> x = torch.randn(5, 6)
    >>> bool((model.elbo(x).elbo <= model.log_likelihood(x)).all())
    True
    """

    @configured
    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 10,
        likelihood: str = "gaussian",
        posterior: str = "full",
        prior_scale: float | None = None,
        dataset_size: int | None = None,
    ) -> None:
        super().__init__()
        if min(data_dim, latent_dim) < 1:
            raise ValueError(
                f"FactorAnalysis: sizes must be positive, got {data_dim} and {latent_dim}"
            )
        if likelihood != "gaussian":
            raise ValueError(
                f"FactorAnalysis: likelihood must be gaussian, got {likelihood!r}: of images that "
                "are no bits, such as freyfaces"
            )
        if posterior not in POSTERIORS:
            known = ", ".join(POSTERIORS)
            raise ValueError(f"FactorAnalysis: posterior must be one of {known}, got {posterior!r}")
        if (prior_scale is None) != (dataset_size is None):
            raise ValueError(
                "FactorAnalysis: prior_scale and dataset_size must be given together, got "
                f"{prior_scale} and {dataset_size}"
            )
        if prior_scale is not None and not (0.0 < prior_scale < math.inf and dataset_size > 0):  # type: ignore[operator]
            raise ValueError(
                "FactorAnalysis: prior_scale and dataset_size must be positive, got "
                f"{prior_scale} and {dataset_size}"
            )
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.prior_scale, self.dataset_size = prior_scale, dataset_size
        self.exact = prior_scale is None
        # theta in units of its prior: theta_0, theta_1 row by row, theta_2
        start = torch.randn(data_dim, latent_dim) * 0.1
        zero = torch.zeros(data_dim)
        start = torch.cat([zero, start.flatten(), zero]) / (prior_scale or 1.0)
        self.theta = nn.Parameter(start)
        if prior_scale is not None:
            self.theta_log_var = nn.Parameter(
                torch.full_like(start, -6.0 - 2 * math.log(prior_scale))
            )
        self.recognition = nn.Linear(data_dim, latent_dim)
        size = (latent_dim, latent_dim) if posterior == "full" else (latent_dim,)
        self.log_scale = nn.Parameter(torch.zeros(size))  # of a triangle, its diagonal is a log

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of q(z | x), ``[B, L]``, and its triangle C, ``[L, L]``, the same for all x."""
        c = self.log_scale
        if self.config["posterior"] == "diagonal":
            return self.recognition(x), c.exp().diag()
        return self.recognition(x), c.tril(-1) + c.diagonal().exp().diag()

    def decode(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``theta_0``, ``[D]``, ``theta_1``, ``[D, L]``, and ``theta_2``, ``[D]``."""
        d, length = self.data_dim, self.latent_dim
        offset, loading, log_var = (theta * (self.prior_scale or 1.0)).split([d, d * length, d])
        return offset, loading.view(d, length), log_var

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound, exact in z and, with a prior of theta, of one sample of theta, ``[B]``."""
        theta: Tensor = self.theta
        shared = x.new_zeros(())
        if self.dataset_size is not None:
            theta, kl = reparameterize_kl(theta, self.theta_log_var, generator=generator)
            shared = kl / self.dataset_size
        offset, loading, log_var = self.decode(theta)
        mu, scale_tril = self.encode(x)
        spread = ((loading @ scale_tril).square().sum(-1) * torch.exp(-log_var)).sum()
        recon = gaussian_log_prob(x, offset + mu @ loading.mT, log_var) - 0.5 * spread
        kl = gaussian_tril_kl(mu, scale_tril) + shared
        return Elbo(recon - kl, recon, kl)

    def exact_posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x) at the mean of theta: means ``[B, L]``, of one covariance for all x."""
        offset, loading, log_var = self.decode(self.theta)
        gain = loading * torch.exp(-log_var).unsqueeze(-1)
        precision = torch.eye(self.latent_dim).to(x) + loading.mT @ gain
        mean = torch.linalg.solve(precision, ((x - offset) @ gain).unsqueeze(-1)).squeeze(-1)
        return MultivariateNormal(mean, precision_matrix=precision)

    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        r"""log N(x; theta_0, theta_1 theta_1' + e^theta_2), exact, ``[1, B]``.

        With a prior of theta: of ``num_samples`` draws of theta from its posterior, so that their
        mean density is the predictive one.
        """
        for _ in range(1 if self.exact else num_samples):
            theta: Tensor = self.theta
            if not self.exact:
                theta = reparameterize(theta, self.theta_log_var, generator=generator)
            yield self._marginal(theta).log_prob(x).unsqueeze(0)

    def _marginal(self, theta: Tensor) -> LowRankMultivariateNormal:
        offset, loading, log_var = self.decode(theta)
        return LowRankMultivariateNormal(offset, loading, log_var.exp(), validate_args=False)

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Draws of x, with their noise, ``[n, D]``."""
        return self.draw_given(self.sample_prior(n, generator=generator), generator=generator)

    def posterior(self, x: Tensor) -> Gaussian | Full:
        mu, scale = self.recognition(x), self.log_scale
        if self.config["posterior"] == "diagonal":
            return Gaussian(mu, (2.0 * scale).expand_as(mu))
        return Full(mu, scale.expand(*mu.shape, -1))

    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """At the mean of theta."""
        offset, loading, log_var = self.decode(self.theta)
        return lambda z: gaussian_log_prob(x, offset + z @ loading.mT, log_var)

    def mean_given(self, z: Tensor) -> Tensor:
        offset, loading, _ = self.decode(self.theta)
        return offset + z @ loading.mT

    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        mean, log_var = self.mean_given(z), self.decode(self.theta)[-1]
        return reparameterize(mean, log_var.expand_as(mean), generator=generator)
