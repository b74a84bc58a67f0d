r"""What training may maximise in place of the bound.

=============  =====================================================================================
``elbo``       :math:`E_q[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, p(z))`
``beta``       the same, with :math:`\beta\, \mathrm{KL}`
``free-bits``  :math:`E_q[\log p(x|z)] - \sum_d \max(\lambda, \overline{\mathrm{KL}_d})`, the mean
               over the batch; of another prior than N(0, I), or another posterior than a Gaussian
               of diagonal covariance, :math:`\max(\lambda, \overline{\mathrm{KL}})` of the whole
``tc``         the bound less :math:`(\beta - 1)\, \mathrm{KL}(q(z) \,\|\, \prod_d q(z_d))`
``iwae``       :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k|x)`; of a mixture, K samples of all its
               components, which in a warm-up count more alike than their weights
``dreg``       the same, with the doubly reparameterised gradient; in a warm-up, with that of iwae
=============  =====================================================================================

Papers: Higgins et al., "beta-VAE", ICLR 2017; Kingma et al., "Improved Variational Inference with
Inverse Autoregressive Flow", NeurIPS 2016 (free bits); Chen et al., "Isolating Sources of
Disentanglement in VAEs", NeurIPS 2018 (tc); Burda et al., "Importance Weighted Autoencoders", ICLR
2016; Tucker et al., "Doubly Reparameterized Gradient Estimators", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..estimators import Elbo, importance_weighted_bound
from ..functional import aggregate_posterior, gaussian_kl
from .posterior import Gaussian, Normal

if TYPE_CHECKING:
    from .vae import VAE

__all__ = ["OBJECTIVES"]

Objective = Callable[["VAE", Tensor, float, Tensor], Elbo]  # (model, x, kl_weight, key)


def _beta(model: VAE, x: Tensor, kl_weight: float, key: Tensor) -> Elbo:
    return model.bound(x, model.posterior(x), key=key).weighted(model.beta * kl_weight)


def _free_bits(model: VAE, x: Tensor, kl_weight: float, key: Tensor) -> Elbo:
    q = model.posterior(x)
    bound = model.bound(x, q, key=key)
    kl = bound.kl.unsqueeze(-1)
    if model.prior is None and isinstance(q, Gaussian):
        kl = gaussian_kl(q.mu.unsqueeze(-1), q.log_var.unsqueeze(-1))
    price = kl.mean(0).clamp(min=model.free_bits).sum()
    return Elbo(bound.recon - kl_weight * price, bound.recon, bound.kl)


def _total_correlation(model: VAE, x: Tensor, kl_weight: float, key: Tensor) -> Elbo:
    q = model.posterior(x)
    assert isinstance(q, Gaussian)
    z, kl = q.draw_kl(model.log_prior, key=key)
    recon = model.log_p_x_given(x)(z)
    log_qz, log_prod_qz = aggregate_posterior(z, q.mu, q.log_var)
    price = kl + (model.beta - 1.0) * (log_qz - log_prod_qz)
    return Elbo(recon - kl_weight * price, recon, kl)


def _importance_weighted(model: VAE, x: Tensor, kl_weight: float, key: Tensor) -> Elbo:
    log_joint = model.log_joint(x)
    z, log_q = model.posterior(x).draw(model.num_samples, key=key)
    recon, log_prior = log_joint(z)
    kl = log_q - log_prior
    bound = importance_weighted_bound(recon - kl_weight * kl)
    return Elbo(bound, recon.mean(0), kl.mean(0))


def _dreg(model: VAE, x: Tensor, kl_weight: float, key: Tensor) -> Elbo:
    if kl_weight != 1.0:  # the squared weights are those of log p - log q as it is
        return _importance_weighted(model, x, kl_weight, key)
    log_joint, q = model.log_joint(x), model.posterior(x)
    assert isinstance(q, Normal)
    recon = kl = x.new_zeros(())

    def log_w(z: Tensor) -> Tensor:
        nonlocal recon, kl
        recon, log_prior = log_joint(z)
        kl = q.detach().log_prob(z) - log_prior
        return recon - kl

    bound = importance_weighted_bound(log_w, "dreg", z=q.sample(model.num_samples, key=key))
    return Elbo(bound, recon.mean(0), kl.mean(0))


OBJECTIVES: dict[str, Objective] = {
    "elbo": _beta,  # of a beta of 1
    "beta": _beta,
    "free-bits": _free_bits,
    "tc": _total_correlation,
    "iwae": _importance_weighted,
    "dreg": _dreg,
}
