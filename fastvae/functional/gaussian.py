"""Diagonal Gaussians: sampling by reparameterization, KL divergences, log-densities."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .. import random
from .route import op

__all__ = ["gaussian_kl", "gaussian_log_prob", "reparameterize", "reparameterize_kl"]

_reparameterize = op("reparameterize")
_reparameterize_kl = op("reparameterize_kl")
_gaussian_kl = op("gaussian_kl")
_gaussian_log_prob = op("gaussian_log_prob")


def _check_num_samples(op: str, num_samples: int) -> None:
    if num_samples < 0:
        raise ValueError(f"fastvae::{op}: num_samples must be non-negative, got {num_samples}")


def _key(op: str, mu: Tensor, generator: Generator | None, key: Tensor | None) -> Tensor:
    if key is None:
        return random.from_generator(generator, mu.device)
    if generator is not None:
        raise ValueError(f"fastvae::{op}: key and generator must not be given together, got both")
    return key


def reparameterize(
    mu: Tensor,
    log_var: Tensor,
    num_samples: int | None = None,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Sample a diagonal Gaussian so that gradients reach its parameters.

    .. math:: z = \mu + e^{\log\sigma^2 / 2}\, \epsilon, \qquad \epsilon \sim N(0, I)

    Args:
        mu: mean, ``[..., D]``.
        log_var: :math:`\log \sigma^2`, broadcast with ``mu``.
        num_samples: ``S`` adds a leading dimension of independent samples.
        generator: where the key is drawn from; default: the device's default generator.
        key: an int64 tensor ``(seed, offset)``: replays the same noise on any device
            (:mod:`fastvae.random`).

    Returns:
        ``z``, ``[..., D]`` or ``[S, ..., D]``, in the dtype of ``mu``.

    The noise is never stored: backward draws it again. Half types compute in float32.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if the shapes do not broadcast, or the key is not int64 of shape ``[2]``.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

    >>> mu, log_var = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> fastvae.reparameterize(mu, log_var, num_samples=5).shape
    torch.Size([5, 2, 3])
    """
    key = _key("reparameterize", mu, generator, key)
    if num_samples is not None:
        _check_num_samples("reparameterize", num_samples)
        mu = torch.broadcast_tensors(mu, log_var)[0]
        mu = mu.expand(num_samples, *mu.shape)
    return _reparameterize(mu, log_var, key)


def reparameterize_kl(
    mu: Tensor,
    log_var: Tensor,
    num_samples: int | None = None,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a diagonal Gaussian, and its KL divergence to N(0, I), in one pass.

    .. math::
        z = \mu + \sigma \epsilon, \qquad
        \mathrm{KL} = \tfrac12 \sum_{d} \mu_d^2 + \sigma_d^2 - 1 - \log \sigma_d^2

    Arguments and errors as :func:`reparameterize`.

    Returns:
        ``(z, kl)``: ``z`` as :func:`reparameterize` gives it for the same key; ``kl`` in nats, one
        per row of the parameters, ``[...]`` (float32 for half types).

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B.

    >>> z, kl = fastvae.reparameterize_kl(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> kl
    tensor([0., 0., 0., 0.])
    """
    if num_samples is not None:  # the divergence does not depend on the sample: once per row
        z = reparameterize(mu, log_var, num_samples, generator=generator, key=key)
        return z, gaussian_kl(mu, log_var)
    key = _key("reparameterize_kl", mu, generator, key)
    return _reparameterize_kl(mu, log_var, key)


def gaussian_kl(
    mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor | None = None, log_var_p: Tensor | None = None
) -> Tensor:
    r"""KL divergence between diagonal Gaussians, summed over the last dimension.

    .. math::
        \mathrm{KL}(q \| p) = \tfrac12 \sum_d
        (\mu_q - \mu_p)^2 e^{-\log\sigma_p^2} + e^{\delta} - 1 - \delta,
        \qquad \delta = \log\sigma_q^2 - \log\sigma_p^2

    Args:
        mu_q, log_var_q: mean and log-variance of q, ``[..., D]``.
        mu_p, log_var_p: those of p, broadcast with q's; N(0, I) if neither is given.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Never negative, accurate to a few ulp also
        where q is close to p, and +inf, not NaN, past the range of exp.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, or only one of ``mu_p``, ``log_var_p`` is given.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B.

    >>> fastvae.gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([1.])
    """
    return _gaussian_kl(mu_q, log_var_q, mu_p, log_var_p)


def gaussian_log_prob(x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    r"""Log-density of a diagonal Gaussian, summed over the last dimension.

    .. math::
        \log N(x; \mu, \sigma^2) = -\tfrac12 \sum_d
        \log 2\pi + \log\sigma_d^2 + (x_d - \mu_d)^2 e^{-\log\sigma_d^2}

    Args:
        x, mu, log_var: ``[..., D]``, broadcast together; what is broadcast is not copied, so ``x``
            may be shared by samples of ``mu`` along leading dimensions.

    Returns:
        Nats per row, ``[...]``; float32 for half types.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.2.

    >>> fastvae.gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([-1.8379])
    """
    return _gaussian_log_prob(x, mu, log_var)
