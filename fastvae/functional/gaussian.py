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
    parameterization: str = "log_var",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Sample a diagonal Gaussian so that gradients reach its parameters.

    .. math:: z = \mu + \sigma\, \epsilon, \qquad \epsilon \sim N(0, I)

    Args:
        mu: mean, ``[..., D]``.
        log_var: the scale :math:`\sigma`, given by ``parameterization``, broadcast with ``mu``.
        num_samples: ``S`` adds a leading dimension of independent samples.
        parameterization: what ``log_var`` holds.

            - ``"log_var"``: :math:`s` of :math:`\sigma = e^{s/2}`;
            - ``"log_scale"``: of :math:`\sigma = e^s`;
            - ``"scale"``: :math:`\sigma` itself, not negative;
            - ``"softplus"``: of :math:`\sigma = \log(1 + e^s)`.

            Gradients are those with respect to :math:`s`, and the map costs no pass of its own.
        generator: where the key is drawn from; default: the device's default generator.
        key: an int64 tensor ``(seed, offset)``: replays the same noise on any device
            (:mod:`fastvae.random`).

    Returns:
        ``z``, ``[..., D]`` or ``[S, ..., D]``, in the dtype of ``mu``.

    The noise is never stored: backward draws it again. Half types compute in float32.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if the shapes do not broadcast, the key is not int64 of shape ``[2]``, or there
            is no such parameterization.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.

    >>> mu, log_var = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> fastvae.reparameterize(mu, log_var, num_samples=5).shape
    torch.Size([5, 2, 3])
    >>> fastvae.reparameterize(mu, torch.ones(2, 3), parameterization="scale").shape
    torch.Size([2, 3])
    """
    key = _key("reparameterize", mu, generator, key)
    if num_samples is not None:
        _check_num_samples("reparameterize", num_samples)
        mu = torch.broadcast_tensors(mu, log_var)[0]
        mu = mu.expand(num_samples, *mu.shape)
    return _reparameterize(mu, log_var, key, parameterization)


def reparameterize_kl(
    mu: Tensor,
    log_var: Tensor,
    num_samples: int | None = None,
    *,
    parameterization: str = "log_var",
    free_bits: float = 0,
    groups: int | None = None,
    beta: float = 1,
    capacity: float | None = None,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a diagonal Gaussian, and its KL divergence to N(0, I), in one pass.

    .. math::
        z = \mu + \sigma \epsilon, \qquad
        \mathrm{KL} = \tfrac12 \sum_{d} \mu_d^2 + \sigma_d^2 - 1 - \log \sigma_d^2

    Arguments and errors as :func:`reparameterize`; ``free_bits``, ``groups``, ``beta`` and
    ``capacity`` as :func:`gaussian_kl`: the same pass has them.

    Returns:
        ``(z, kl)``: ``z`` as :func:`reparameterize` gives it for the same key; ``kl`` in nats, one
        per row of the parameters, ``[...]`` (float32 for half types).

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B.

    >>> z, kl = fastvae.reparameterize_kl(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> kl
    tensor([0., 0., 0., 0.])
    """
    name = "reparameterize_kl"
    if num_samples is not None:  # the divergence does not depend on the sample: once per row
        z = reparameterize(
            mu,
            log_var,
            num_samples,
            parameterization=parameterization,
            generator=generator,
            key=key,
        )
        return z, gaussian_kl(
            mu,
            log_var,
            parameterization=parameterization,
            free_bits=free_bits,
            groups=groups,
            beta=beta,
            capacity=capacity,
        )
    key = _key(name, mu, generator, key)
    if groups is None:
        z, kl = _reparameterize_kl(mu, log_var, key, parameterization, free_bits)
    else:
        z, kl = _reparameterize_kl(*_split(name, groups, mu, log_var), key, parameterization)
        z, kl = z.flatten(-2), _sum_of_groups(name, kl, free_bits)
    if beta != 1 or capacity is not None:
        kl = _weighed(name, kl, beta, capacity)
    return z, kl


def gaussian_kl(
    mu_q: Tensor,
    log_var_q: Tensor,
    mu_p: Tensor | None = None,
    log_var_p: Tensor | None = None,
    *,
    parameterization: str = "log_var",
    free_bits: float = 0,  # integers, for torch.compile's sake: it takes a float for a variable
    groups: int | None = None,
    beta: float = 1,
    capacity: float | None = None,
) -> Tensor:
    r"""KL divergence between diagonal Gaussians, summed over the last dimension.

    .. math::
        \mathrm{KL}(q \| p) = \tfrac12 \sum_d
        \frac{(\mu_q - \mu_p)^2}{\sigma_p^2} + r^2 - 1 - \log r^2, \qquad r = \sigma_q / \sigma_p

    and what is made of it in the same pass over memory, with groups :math:`g` of dimensions:

    .. math:: \beta\, \Big| \sum_g \max(\lambda, \mathrm{KL}_g) - C \Big|

    Args:
        mu_q, log_var_q: mean and scale of q, ``[..., D]``.
        mu_p, log_var_p: those of p, broadcast with q's; N(0, I) if neither is given.
        parameterization: what both scales hold, as in :func:`reparameterize`.
        free_bits: :math:`\lambda`, nats that each group of a row may use at no cost: where its KL
            is less, it counts as :math:`\lambda` and has no gradient.
        groups: how many groups of adjacent dimensions there are; default: each dimension is one.
        beta: the weight :math:`\beta`.
        capacity: :math:`C`, nats, which the KL is drawn to; default: none, without the absolute
            value.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Never negative, accurate to a few ulp also
        where q is close to p, and +inf, not NaN, past the range of exp.

    Kingma et al. take the maximum after a mean over the batch. That needs the KL of each group,
    ``[B, G]``, which is ``gaussian_kl`` of ``[B, G, D / G]``:
    ``gaussian_kl(mu.unflatten(-1, (G, -1)), ...).mean(0).clamp(min=free_bits).sum()``.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, only one of ``mu_p``, ``log_var_p`` is given,
            there is no such parameterization, ``groups`` does not divide D, or one of
            ``free_bits``, ``beta`` and ``capacity`` is negative.

    Papers: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B; free bits:
    Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016,
    appendix C; beta: Higgins et al., "beta-VAE", ICLR 2017; capacity: Burgess et al.,
    "Understanding disentangling in beta-VAE", 2018.

    >>> fastvae.gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([1.])
    >>> fastvae.gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2), free_bits=2.0, groups=1)
    tensor([2.])
    """
    if groups is None:
        kl = _gaussian_kl(mu_q, log_var_q, mu_p, log_var_p, parameterization, free_bits)
    else:
        inputs = _split("gaussian_kl", groups, mu_q, log_var_q, mu_p, log_var_p)
        kl = _sum_of_groups("gaussian_kl", _gaussian_kl(*inputs, parameterization), free_bits)
    if beta != 1 or capacity is not None:
        kl = _weighed("gaussian_kl", kl, beta, capacity)
    return kl  # type: ignore[no-any-return]


def _split(name: str, groups: int, *inputs: Tensor | None) -> list[Tensor | None]:
    """``[..., D]`` seen as ``[..., G, D / G]``: the row sums are then those of the groups."""
    given = [x for x in inputs if x is not None]
    sizes = [x.shape[-1] for x in given if x.dim() > 0]
    size = max(sizes, default=0)
    if len(sizes) < len(given) or any(one not in (1, size) for one in sizes):
        shapes = ", ".join(str(list(x.shape)) for x in given)
        raise ValueError(f"fastvae::{name}: the last dimensions must broadcast, got {shapes}")
    if groups < 1 or size < 1 or size % groups:
        raise ValueError(
            f"fastvae::{name}: groups must divide the last dimension, got {groups} and {size}"
        )

    def split(x: Tensor) -> Tensor:
        return x.unsqueeze(-1) if x.shape[-1] == 1 else x.unflatten(-1, (groups, -1))

    return [None if x is None else split(x) for x in inputs]


def _sum_of_groups(name: str, kl: Tensor, free_bits: float) -> Tensor:
    _check_non_negative(name, "free_bits", free_bits)
    return kl.clamp(min=free_bits).sum(-1)


def _weighed(name: str, kl: Tensor, beta: float, capacity: float | None) -> Tensor:
    """One number a row is left: what comes now is no pass over the data any more."""
    _check_non_negative(name, "beta", beta)
    if capacity is not None:
        _check_non_negative(name, "capacity", capacity)
        kl = (kl - capacity).abs()
    return beta * kl


def _check_non_negative(name: str, argument: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"fastvae::{name}: {argument} must be non-negative, got {value}")


def gaussian_log_prob(
    x: Tensor, mu: Tensor, log_var: Tensor, *, parameterization: str = "log_var"
) -> Tensor:
    r"""Log-density of a diagonal Gaussian, summed over the last dimension.

    .. math::
        \log N(x; \mu, \sigma^2) = -\tfrac12 \sum_d
        \log 2\pi + \log\sigma_d^2 + (x_d - \mu_d)^2 e^{-\log\sigma_d^2}

    Args:
        x, mu, log_var: ``[..., D]``, broadcast together; what is broadcast is not copied, so ``x``
            may be shared by samples of ``mu`` along leading dimensions, and a scale of shape
            ``[1]`` by all.
        parameterization: what ``log_var`` holds, as in :func:`reparameterize`.

    Returns:
        Nats per row, ``[...]``; float32 for half types.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, or there is no such parameterization.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.2.

    >>> fastvae.gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([-1.8379])
    """
    return _gaussian_log_prob(x, mu, log_var, parameterization)
