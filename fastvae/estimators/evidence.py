"""The evidence lower bound of a model with a Gaussian posterior, in its three forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ..functional import gaussian_kl, gaussian_log_prob, reparameterize, reparameterize_kl
from ..reference.scale import scale_map
from .surrogate import check_floating, check_same_device, wide

__all__ = ["Elbo", "elbo", "gaussian_entropy"]

FORMS = ("analytic", "entropy", "monte_carlo")

LogProb = Callable[[Tensor], Tensor]  # z, [..., D] -> nats per row, [...]
Prior = tuple[Tensor, Tensor] | LogProb | None  # (mu, log_var), log p(z), or N(0, I)


class Elbo(NamedTuple):
    """The evidence lower bound and its terms, in nats per example: ``elbo = recon - kl``."""

    elbo: Tensor
    recon: Tensor
    kl: Tensor

    def weighted(self, kl_weight: float) -> Elbo:
        """``recon - kl_weight * kl``, and the terms as they are: beta-VAE, warm-up."""
        return Elbo(self.recon - kl_weight * self.kl, self.recon, self.kl)


def gaussian_entropy(log_var: Tensor, *, parameterization: str = "log_var") -> Tensor:
    r"""Differential entropy of a diagonal Gaussian, summed over the last dimension.

    .. math:: H = \tfrac12 \sum_d 1 + \log 2\pi + \log\sigma_d^2

    Args:
        log_var: the scale :math:`\sigma`, ``[..., D]``: all D of them, also where they are equal.
        parameterization: what ``log_var`` holds, as in :func:`fastvae.reparameterize`.

    Returns:
        Nats per row, ``[...]``; float32 for half types. It may be negative.

    Raises:
        TypeError: if ``log_var`` is not a floating-point tensor.
        ValueError: if it has no dimension, or there is no such parameterization.

    >>> fastvae.gaussian_entropy(torch.zeros(1, 2))
    tensor([2.8379])
    """
    check_floating("gaussian_entropy", "log_var", log_var)
    if log_var.dim() == 0:
        raise ValueError("fastvae::gaussian_entropy: log_var must be [..., D], got []")
    log_sigma = scale_map("gaussian_entropy", parameterization).log_sigma(wide(log_var))
    return (log_sigma + 0.5 * (1.0 + math.log(2.0 * math.pi))).sum(-1)


def elbo(
    log_likelihood: LogProb,
    mu: Tensor,
    log_var: Tensor,
    form: str = "analytic",
    *,
    num_samples: int | None = None,
    prior: Prior = None,
    parameterization: str = "log_var",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Elbo:
    r"""Evidence lower bound on log p(x) for q(z|x) = N(mu, e^log_var), to be maximised.

    .. math::
        \mathcal L
        &= E_q[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, p(z)) && \text{analytic} \\
        &= E_q[\log p(x, z)] + H[q(z|x)] && \text{entropy} \\
        &= E_q[\log p(x, z) - \log q(z|x)] && \text{monte\_carlo}

    One number in expectation, in value and gradient; what is integrated instead of sampled differs,
    and so does the variance. ``monte_carlo`` has none at all where q is the posterior, the others
    have; far from there ``analytic`` mostly has the least.

    Args:
        log_likelihood: z of ``[..., D]`` or ``[S, ..., D]`` to log p(x|z), one number per row of z.
            It is called once, and closes over x: that broadcasts against S decoded samples.
        mu, log_var: of q, ``[..., D]``, broadcast together: what an encoder made of x.
        form: which expectation is exact: ``analytic``, ``entropy`` or ``monte_carlo``.
        num_samples: S draws of z per row, over which the mean is taken; default: one, without a
            dimension of its own.
        prior: ``(mu, log_var)`` of a Gaussian p(z), broadcast with q's; or, but for ``analytic``, a
            function from z to log p(z) like ``log_likelihood``. Default: N(0, I).
        parameterization: what ``log_var``, and that of a Gaussian prior, holds, as in
            :func:`fastvae.reparameterize`.
        generator, key: as in :func:`fastvae.reparameterize`.

    Returns:
        ``(elbo, recon, kl)``, nats per datapoint, ``[...]`` each; float32 for half types.
        ``recon`` is the mean of log p(x|z). ``kl = recon - elbo`` is exact and never negative for
        ``analytic``, and else an estimate, which may be negative.

    For any other q, draw z from it (for a discrete one see :func:`fastvae.score_function_bound`);
    ``importance_weighted_bound(log_p - log_q, "elbo")`` is ``monte_carlo``. Derivatives of any
    order are those of the value. What is infinite or NaN stays in its datapoint.

    Raises:
        TypeError: if an argument is not of its kind, or a function returns no floating-point
            tensor.
        ValueError: if the form is unknown, ``num_samples`` is not positive, ``prior`` does not
            serve the form or broadcast to q, or a function does not return one number per row.
        Errors of the ops in use: :func:`fastvae.reparameterize`, :func:`fastvae.gaussian_kl`.

    Papers: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014; of the three forms:
    Roeder et al., "Sticking the Landing", NeurIPS 2017.

    >>> x, decoder = torch.rand(16, 784), torch.nn.Linear(8, 784)
    >>> mu, log_var = torch.zeros(16, 8), torch.zeros(16, 8)
    >>> elbo, recon, kl = fastvae.elbo(
    ...     lambda z: fastvae.bernoulli_log_prob(x, decoder(z)), mu, log_var, num_samples=5
    ... )
    >>> elbo.shape
    torch.Size([16])
    """
    _check_arguments(log_likelihood, mu, log_var, form, num_samples, prior)
    scale = {"parameterization": parameterization}
    draw = {"num_samples": num_samples, "generator": generator, "key": key, **scale}
    if form == "analytic" and prior is None:
        z, kl = reparameterize_kl(mu, log_var, **draw)  # type: ignore[arg-type]
    else:
        z = reparameterize(mu, log_var, **draw)  # type: ignore[arg-type]
    recon = rows_of("elbo", "log_likelihood", log_likelihood, z)
    datapoints = z.shape[:-1] if num_samples is None else z.shape[1:-1]
    if isinstance(prior, tuple):
        check_prior("elbo", prior, z, datapoints)

    def mean(x: Tensor) -> Tensor:
        return x if num_samples is None else x.mean(0)

    if form == "entropy":
        full = torch.broadcast_tensors(mu, log_var)[1]
        kl = -mean(log_prior("elbo", prior, z, **scale)) - gaussian_entropy(full, **scale)
    elif form == "monte_carlo":
        log_q = gaussian_log_prob(z, mu, log_var, **scale)
        kl = mean(log_q - log_prior("elbo", prior, z, **scale))
    elif prior is not None:
        kl = gaussian_kl(mu, log_var, *prior, **scale)  # type: ignore
    recon = mean(recon)
    return Elbo(recon - kl, recon, kl)


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I), one number per row."""
    zero = z.new_zeros(1)
    return gaussian_log_prob(z, zero, zero)


def log_prior(op: str, prior: Prior, z: Tensor, parameterization: str) -> Tensor:
    """log p(z), one number per row."""
    if prior is None:
        return standard_log_prob(z)
    if isinstance(prior, tuple):
        return gaussian_log_prob(z, *prior, parameterization=parameterization)
    return rows_of(op, "prior", prior, z)


# --- checks ---------------------------------------------------------------------------------------


def rows_of(op: str, name: str, function: LogProb, z: Tensor) -> Tensor:
    """``function(z)``, which must be one number per row: a sum too few would broadcast."""
    value = function(z)
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"fastvae::{op}: {name} must return a tensor, got {kind}")
    if not value.is_floating_point():
        raise TypeError(
            f"fastvae::{op}: {name} must return a floating-point tensor, got {value.dtype}"
        )
    if value.shape != z.shape[:-1]:
        raise ValueError(
            f"fastvae::{op}: {name} must return one number per row of z, got {list(value.shape)}"
            f" and z of {list(z.shape)}"
        )
    check_same_device(op, f"the value of {name}", value, "z", z)
    return wide(value)


def check_prior(
    op: str, prior: tuple[Tensor, Tensor], z: Tensor, datapoints: tuple[int, ...]
) -> None:
    """A prior with more rows than q would make more bounds than there are datapoints."""
    q = (*datapoints, z.shape[-1])
    for x in prior:
        fits = x.dim() <= len(q) and all(
            a in (1, b) for a, b in zip(reversed(x.shape), reversed(q), strict=False)
        )
        if not fits:
            raise ValueError(
                f"fastvae::{op}: prior must broadcast to q, got {list(x.shape)} and {list(q)}"
            )
        check_same_device(op, "prior", x, "mu", z)


def check_pieces(op: str, log_likelihood: Any, mu: Any, log_var: Any, prior: Any) -> None:
    if isinstance(log_likelihood, Tensor) or not callable(log_likelihood):
        kind = type(log_likelihood).__name__
        raise TypeError(f"fastvae::{op}: log_likelihood must be a function of z, got {kind}")
    check_floating(op, "mu", mu)
    check_floating(op, "log_var", log_var)
    if mu.dim() == 0 and log_var.dim() == 0:
        raise ValueError(f"fastvae::{op}: mu must be [..., D], got []")
    check_same_device(op, "log_var", log_var, "mu", mu)
    if isinstance(prior, tuple):
        if len(prior) != 2:
            raise ValueError(
                f"fastvae::{op}: prior must be (mu, log_var), got {len(prior)} elements"
            )
        for x in prior:
            check_floating(op, "prior", x)
    elif prior is not None and (isinstance(prior, Tensor) or not callable(prior)):
        kind = type(prior).__name__
        raise TypeError(
            f"fastvae::{op}: prior must be (mu, log_var) or a function of z, got {kind}"
        )


def _check_arguments(
    log_likelihood: Any, mu: Any, log_var: Any, form: str, num_samples: int | None, prior: Any
) -> None:
    if form not in FORMS:
        raise ValueError(f"fastvae::elbo: form must be one of {', '.join(FORMS)}, got {form!r}")
    check_pieces("elbo", log_likelihood, mu, log_var, prior)
    if form == "analytic" and prior is not None and not isinstance(prior, tuple):
        raise ValueError(
            "fastvae::elbo: prior must be (mu, log_var) for analytic, got a function; take entropy"
            " or monte_carlo"
        )
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"fastvae::elbo: num_samples must be positive, got {num_samples}")
