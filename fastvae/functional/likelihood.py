"""Likelihoods p(x | z) from a decoder's unconstrained outputs, other than the Gaussian."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["bernoulli_log_prob", "continuous_bernoulli_log_prob", "laplace_log_prob"]

_bernoulli_log_prob = op("bernoulli_log_prob")
_continuous_bernoulli_log_prob = op("continuous_bernoulli_log_prob")
_laplace_log_prob = op("laplace_log_prob")


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    r"""Log-probability of Bernoulli pixels from logits, summed over the last dimension.

    .. math:: \log p(x \mid l) = \sum_d x_d l_d - \log(1 + e^{l_d})

    Args:
        x: ``[..., D]`` in [0, 1]; not only 0 and 1, as in a cross-entropy.
        logits: ``[..., D]``, broadcast with ``x``: with ``[K, B, D]`` logits of K samples, ``x`` of
            ``[B, D]`` is read K times, and never copied.

    Returns:
        Nats per row, ``[...]``; float32 for half types.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if the shapes do not broadcast.

    Paper: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.1.

    >>> fastvae.bernoulli_log_prob(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([-1.3863])
    """
    return _bernoulli_log_prob(x, logits)


def continuous_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    r"""Log-density of the continuous Bernoulli on [0, 1], summed over the last dimension.

    .. math::
        \log p(x \mid l) = \sum_d x_d l_d - \log \frac{e^{l_d} - 1}{l_d}

    The Bernoulli's :math:`x l - \log(1 + e^l)` is no density in x: it misses the normalising
    constant, which depends on the logits.

    Args:
        x: ``[..., D]`` in [0, 1].
        logits: ``[..., D]``, of the parameter :math:`\lambda`, broadcast with ``x`` and not copied.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Full accuracy also around
        :math:`\lambda = 1/2`, where implementations in :math:`\lambda` switch to a Taylor series.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if the shapes do not broadcast.

    Paper: Loaiza-Ganem & Cunningham, "The continuous Bernoulli: fixing a pervasive error in
    variational autoencoders", NeurIPS 2019.

    >>> fastvae.continuous_bernoulli_log_prob(torch.ones(1, 2), torch.ones(1, 2))
    tensor([0.9174])
    """
    return _continuous_bernoulli_log_prob(x, logits)


def laplace_log_prob(
    x: Tensor, mu: Tensor, log_scale: Tensor, *, parameterization: str = "log_scale"
) -> Tensor:
    r"""Log-density of independent Laplace variables, summed over the last dimension.

    .. math::
        \log p(x \mid \mu, b) = -\sum_d \log 2 + \log b_d + |x_d - \mu_d| / b_d

    Args:
        x, mu, log_scale: ``[..., D]``, broadcast together and not copied. A scale of shape ``[1]``
            is shared by all.
        parameterization: what ``log_scale`` holds: ``"log_scale"``, :math:`s` of :math:`b = e^s`;
            ``"log_var"``, of :math:`b = e^{s/2}`, so that s is :math:`\log b^2` as of a Gaussian
            (the variance of a Laplace is :math:`2 b^2`); ``"scale"``, b itself; ``"softplus"``,
            of :math:`b = \log(1 + e^s)`.

    Returns:
        Nats per row, ``[...]``; float32 for half types. The gradient at ``x = mu`` is 0.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast, or there is no such parameterization.

    >>> fastvae.laplace_log_prob(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1))
    tensor([-3.3863])
    """
    return _laplace_log_prob(x, mu, log_scale, parameterization)
