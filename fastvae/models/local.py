r"""Variational parameters of each datum's own, as inference was before it was amortised.

.. math::
    \max_\theta \sum_i \max_{\phi_i} \mathcal L(\theta, \phi_i; x_i), \qquad
    q_i(z) = N(z;\, \mu_i, \mathrm{diag}\, \sigma_i^2)

:func:`refine` climbs in :math:`\phi_i` by natural gradients, whose steps are measured in deviations
of q, so that one rate serves all data and all dimensions:

.. math::
    \mu \leftarrow \mu + \rho\, \sigma^2\, E_q[g], \qquad
    \log\sigma^2 \leftarrow \log\sigma^2 + 2 \rho\, E_q[\tfrac12 (z - \mu) g], \qquad
    g = \nabla_z (\log p(x, z) - \log q_i(z))

The gradient is that of the path alone, which has no variance where q is the posterior.
What a VAE's bound gains by it on images is its amortisation gap; what then is left to log p(x), the
gap of the family.

Papers: Hoffman et al., "Stochastic Variational Inference", JMLR 2013; Roeder et al., "Sticking the
Landing", NeurIPS 2017; Kim et al., "Semi-Amortized Variational Autoencoders", ICML 2018; Cremer, Li
& Duvenaud, "Inference Suboptimality in Variational Autoencoders", ICML 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from .. import random
from ..estimators import Elbo
from ..estimators.surrogate import check_no_inference_mode
from .base import Batch, LatentVector, check_option, configured
from .posterior import Gaussian
from .vae import VAE

__all__ = ["LocalVAE", "refine"]

INFERENCES = ("local", "semi")


def refine(
    model: LatentVector,
    x: Tensor,
    q: Gaussian,
    steps: int,
    *,
    num_samples: int = 8,
    rate: float = 0.5,
    create_graph: bool = False,
    key: Tensor,
) -> Gaussian:
    r"""A better Gaussian for each row of ``x``, ``[B, D]``, from where ``q`` is.

    Args:
        steps: of natural gradient, of rates :math:`\rho_k = \rho\, (1 + k / 5)^{-0.7}`, none of
            which moves a mean by more than a deviation, or a variance by more than a factor of e.
        num_samples: of z for each row and step.
        create_graph: whether the result has gradients to the model and to ``q``: then what was
            drawn is held for backward.

    Raises:
        RuntimeError: under ``torch.inference_mode``.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12)
    >>> key = fastvae.random.key(0)
    >>> q = fastvae.models.local.refine(model, x, model.posterior(x), steps=20, key=key)
    >>> q.mu.shape
    torch.Size([5, 3])
    """
    check_no_inference_mode("refine")
    log_joint = model.log_joint(x)
    create_graph = create_graph and torch.is_grad_enabled()
    with torch.enable_grad():
        for k in range(steps):
            z = q.sample(num_samples, key=random.fold_in(key, k))
            if not create_graph:
                q, z = q.detach(), z.detach().requires_grad_()
            log_w = sum(log_joint(z)) - q.log_prob(z)
            (slope,) = torch.autograd.grad(log_w.sum(), z, create_graph=create_graph)
            sigma, rho = torch.exp(0.5 * q.log_var), rate * (1 + k / 5) ** -0.7
            d_mu, d_log_var = slope.mean(0), 0.5 * ((z - q.mu) * slope).mean(0)
            q = Gaussian(
                q.mu + sigma * (rho * sigma * d_mu).clamp(-1.0, 1.0),
                q.log_var + (2.0 * rho * d_log_var).clamp(-1.0, 1.0),
            )
    return q if create_graph else q.detach()


class LocalVAE(VAE):
    r"""A VAE whose q(z | x_i) has parameters of its own for every image.

    Args:
        inference: ``"local"``: each training image's :math:`\phi_i` is stored, and goes on from
            where it was; an unseen image starts from N(0, I). ``"semi"``: from what the encoder
            says, and the encoder learns through the steps.
        dataset_size: N, of ``"local"``: the training images.
        refine_steps: of :func:`refine` for each training step.
        test_refine_steps: for an image that is inferred on its own; default: those of training of
            ``"semi"``, and 100 of ``"local"``.
        others: of :class:`VAE`; the posterior is Gaussian, the objective the bound, and the prior
            none that needs an encoder.

    Raises:
        ValueError: as :class:`VAE`; if a number is not positive, or there is no such inference.

    >>> model = fastvae.models.LocalVAE(12, dataset_size=100, latent_dim=3, test_refine_steps=5)
    >>> model.elbo(torch.rand(5, 12)).elbo.shape
    torch.Size([5])
    """

    of_data = (*VAE.of_data, "dataset_size")

    mu: Tensor
    log_var: Tensor

    @configured
    def __init__(
        self,
        data_dim: int,
        dataset_size: int,
        inference: str = "local",
        refine_steps: int = 2,
        test_refine_steps: int | None = None,
        **others: Any,
    ) -> None:
        check_option("LocalVAE", "inference", inference, INFERENCES)
        for name, only in (("posterior", "gaussian"), ("objective", "elbo")):
            check_option("LocalVAE", name, others.get(name, only), (only,))
        if others.get("prior") == "vamp":
            raise ValueError("LocalVAE: prior must need no encoder, got 'vamp'")
        if test_refine_steps is None:
            test_refine_steps = refine_steps if inference == "semi" else 100
        numbers = refine_steps, test_refine_steps, dataset_size
        if min(numbers) < 1:
            raise ValueError(
                "LocalVAE: refine_steps, test_refine_steps and dataset_size must be positive, got "
                f"{numbers[0]}, {numbers[1]} and {numbers[2]}"
            )
        super().__init__(data_dim, **others)
        self.config["test_refine_steps"] = test_refine_steps
        self.steps, self.test_steps, self.local = (
            refine_steps,
            test_refine_steps,
            inference == "local",
        )
        self.weighs_kl = not self.local  # each image climbs the bound itself
        if self.local:
            del self.encoder
            self.register_buffer("mu", torch.zeros(dataset_size, self.latent_dim))
            self.register_buffer("log_var", torch.zeros(dataset_size, self.latent_dim))

    def _start(self, x: Tensor) -> Gaussian:
        if not self.local:
            return Gaussian(*self.encoder(x).chunk(2, -1))
        zero = x.new_zeros(len(x), self.latent_dim)
        return Gaussian(zero, zero)

    def posterior(self, x: Tensor) -> Gaussian:
        """q(z | x) of images ``[B, D]`` that may be unseen, each climbed to; without gradient."""
        key = random.key(0, device=x.device)
        return refine(self, x, self._start(x), self.test_steps, key=key)

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """The bound after some steps of each image's own; ``"local"`` stores where they led."""
        x, rows = batch.x, batch.rows
        key = random.from_generator(generator, x.device)
        if self.local:
            start = Gaussian(self.mu[rows], self.log_var[rows])
            q = refine(self, x, start, self.steps, key=random.fold_in(key, 0))
            self.mu[rows], self.log_var[rows] = q.mu, q.log_var
        else:
            own = random.fold_in(key, 0)
            q = refine(self, x, self._start(x), self.steps, create_graph=True, key=own)
        return self.bound(x, q, key=key).weighted(kl_weight)
