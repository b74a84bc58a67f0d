"""Gaussians of full covariance, and of a diagonal one plus one of low rank."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .. import random
from ..reference.scale import scale_map
from .gaussian import _check_num_samples, _key, gaussian_kl, reparameterize
from .route import op

__all__ = [
    "gaussian_tril_kl",
    "reparameterize_low_rank_kl",
    "reparameterize_tril",
    "reparameterize_tril_kl",
]

_reparameterize_tril_kl = op("reparameterize_tril_kl")


def reparameterize_tril(
    mu: Tensor,
    scale_tril: Tensor,
    num_samples: int | None = None,
    *,
    parameterization: str = "scale",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Sample a Gaussian of full covariance so that gradients reach its parameters.

    .. math:: z = \mu + C \epsilon, \qquad \epsilon \sim N(0, I), \qquad
        \mathrm{Cov}(z) = C C^\top

    Args:
        mu: mean, ``[..., D]``.
        scale_tril: the lower triangle of C, ``[..., D, D]``, broadcast with ``mu``: one triangle
            may serve many rows. What lies above the diagonal is not read, and gets no gradient.
        num_samples: ``S`` adds a leading dimension of independent samples, which share C; its
            gradient is summed as it comes, not stored S times.
        parameterization: what the diagonal of ``scale_tril`` holds, as in
            :func:`fastvae.reparameterize`: a positive number itself, or with ``"softplus"``,
            ``"log_scale"`` and ``"log_var"`` one of any sign.
        generator: where the key is drawn from; default: the device's default generator.
        key: an int64 tensor ``(seed, offset)``: replays the same noise on any device.

    Returns:
        ``z``, ``[..., D]`` or ``[S, ..., D]``, in the dtype of ``mu``.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if ``scale_tril`` is not square or not of the D of ``mu``, the leading
            dimensions do not broadcast, or there is no such parameterization.

    Paper: Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in
    Deep Generative Models", ICML 2014, section 4.

    >>> fastvae.reparameterize_tril(torch.zeros(4, 3), torch.eye(3), num_samples=5).shape
    torch.Size([5, 4, 3])
    """
    z, _ = reparameterize_tril_kl(
        mu,
        scale_tril,
        num_samples,
        parameterization=parameterization,
        generator=generator,
        key=key,
    )
    return z


def reparameterize_tril_kl(
    mu: Tensor,
    scale_tril: Tensor,
    num_samples: int | None = None,
    *,
    parameterization: str = "scale",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a Gaussian of full covariance, and its KL divergence to N(0, I), in one pass over C.

    .. math:: \mathrm{KL} = \tfrac12 \big( |\mu|^2 + |C|_F^2 - D \big) - \sum_i \log C_{ii}

    Arguments and errors as :func:`reparameterize_tril`.

    Returns:
        ``(z, kl)``: ``kl`` in nats, one per row of the parameters, ``[...]`` (float32 for half
        types). Never negative, and accurate also where C is close to I. No triangle is solved or
        factorised.

    >>> z, kl = fastvae.reparameterize_tril_kl(torch.zeros(4, 3), torch.eye(3).expand(4, 3, 3))
    >>> kl
    tensor([0., 0., 0., 0.])
    """
    name = "reparameterize_tril_kl"
    key = _key(name, mu, generator, key)
    if num_samples is None:
        return _reparameterize_tril_kl(mu, scale_tril, key, parameterization)  # type: ignore[no-any-return]
    _check_num_samples(name, num_samples)
    kl = gaussian_tril_kl(mu, scale_tril, parameterization=parameterization)
    shape = torch.broadcast_shapes(mu.shape, scale_tril.shape[:-1])
    z, _ = _reparameterize_tril_kl(
        mu.expand(num_samples, *shape), scale_tril, key, parameterization
    )
    return z, kl


def gaussian_tril_kl(mu: Tensor, scale_tril: Tensor, *, parameterization: str = "scale") -> Tensor:
    r"""KL divergence of a Gaussian of full covariance to N(0, I): :func:`reparameterize_tril_kl`'s.

    >>> fastvae.gaussian_tril_kl(torch.ones(2), torch.eye(2))
    tensor(1.)
    """
    key = torch.zeros(2, dtype=torch.int64, device=mu.device)  # of a sample that nobody looks at
    _, kl = _reparameterize_tril_kl(mu, scale_tril, key, parameterization)
    return kl  # type: ignore[no-any-return]


def reparameterize_low_rank_kl(
    mu: Tensor,
    log_var: Tensor,
    factor: Tensor,
    num_samples: int | None = None,
    *,
    parameterization: str = "log_var",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a Gaussian of covariance diagonal plus low rank, and its KL divergence to N(0, I).

    .. math::
        z = \mu + \sigma \epsilon + V \eta, \qquad
        \Sigma = \mathrm{diag}\, \sigma^2 + V V^\top, \qquad
        \mathrm{KL} = \mathrm{KL}_{V = 0} + \tfrac12 |V|_F^2 - \tfrac12 \log\det M,
        \qquad M = I + V^\top \mathrm{diag}(\sigma^{-2}) V

    by the matrix-determinant lemma :math:`\log\det \Sigma = \sum_d \log \sigma_d^2 + \log\det M`:
    what is factorised is R x R. At R = 1 this is the posterior of Rezende et al.

    Args:
        mu: mean, ``[..., D]``.
        log_var: the scale of the diagonal, broadcast with ``mu``, given by ``parameterization`` as
            in :func:`fastvae.reparameterize`.
        factor: V, ``[..., D, R]``, broadcast with ``mu`` along leading dimensions.
        num_samples: ``S`` adds a leading dimension of independent samples.
        generator, key: as in :func:`fastvae.reparameterize`; eta comes of a stream of its own,
            ``fastvae.random.fold_in(key, 0)``.

    Returns:
        ``(z, kl)``: ``[..., D]`` or ``[S, ..., D]``; nats, one per row of the parameters, ``[...]``
        (float32 for half types). NaN where the inputs are, or M is singular to float64's digits.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if ``factor`` is not ``[..., D, R]`` for the D of ``mu``, or the shapes do not
            broadcast.

    Paper: Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in
    Deep Generative Models", ICML 2014, section 4.

    >>> mu, log_var, factor = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3, 2)
    >>> z, kl = fastvae.reparameterize_low_rank_kl(mu, log_var, factor)
    >>> kl
    tensor([0., 0., 0., 0.])
    """
    name = "reparameterize_low_rank_kl"
    if factor.dim() < 2 or mu.dim() < 1 or factor.shape[-2] != mu.shape[-1]:
        raise ValueError(
            f"fastvae::{name}: factor must be [..., D, R] for the D of mu, got "
            f"{list(factor.shape)} and {list(mu.shape)}"
        )
    if factor.dtype != mu.dtype:
        raise TypeError(
            f"fastvae::{name}: factor must have the dtype of mu, got {factor.dtype} and {mu.dtype}"
        )
    key = _key(name, mu, generator, key)
    kl = gaussian_kl(mu, log_var, parameterization=parameterization)
    wide = factor.to(kl.dtype)
    inverse_sigma = scale_map(name, parameterization).inverse_sigma(log_var.to(kl.dtype))
    scaled = (wide * inverse_sigma.unsqueeze(-1)).double()  # M has its squares, and the digits of I
    rank = factor.shape[-1]
    with torch.autocast(mu.device.type, enabled=False):
        capacitance = torch.eye(rank, dtype=scaled.dtype, device=mu.device) + scaled.mT @ scaled
    triangle, failed = torch.linalg.cholesky_ex(capacitance)
    log_det = 2.0 * triangle.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = torch.where(failed == 0, log_det, torch.nan).to(kl.dtype)
    kl = kl + 0.5 * (wide.square().sum((-2, -1)) - log_det)

    rows = torch.broadcast_shapes(mu.shape, log_var.shape, factor.shape[:-1])
    if num_samples is not None:
        _check_num_samples(name, num_samples)
        rows = torch.Size((num_samples, *rows))
    z = reparameterize(mu.expand(rows), log_var, parameterization=parameterization, key=key)
    eta = random.normal(random.fold_in(key, 0), (*rows[:-1], rank), mu.dtype).to(mu.device)
    with torch.autocast(mu.device.type, enabled=False):
        return z + (factor @ eta.unsqueeze(-1)).squeeze(-1), kl
