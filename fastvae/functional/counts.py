"""Likelihoods of counts p(x | z)."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = [
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]

_negative_binomial_log_prob = op("negative_binomial_log_prob")
_poisson_log_prob = op("poisson_log_prob")
_zero_inflated_negative_binomial_log_prob = op("zero_inflated_negative_binomial_log_prob")


def poisson_log_prob(x: Tensor, log_rate: Tensor) -> Tensor:
    r"""Log-probability of counts under Poisson distributions, summed over the last dimension.

    .. math:: \log p(x \mid r) = \sum_d x_d r_d - e^{r_d} - \log x_d!

    Args:
        x: ``[..., D]``, counts: at least 0; need not be whole (:math:`x! = \Gamma(x + 1)`).
        log_rate: ``[..., D]``, broadcast with ``x`` and not copied.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Computed as a deviance (Loader), so that no
        large terms cancel where the rate fits the count. NaN where ``x`` is negative or infinite.

    Raises:
        TypeError: if a dtype is not floating, or the two differ.
        ValueError: if the shapes do not broadcast.

    Paper: Loader, "Fast and accurate computation of binomial probabilities", 2000.

    >>> fastvae.poisson_log_prob(torch.tensor([[0.0, 3.0]]), torch.zeros(1, 2))
    tensor([-3.7918])
    """
    return _poisson_log_prob(x, log_rate)


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    r"""Log-probability of overdispersed counts, summed over the last dimension.

    .. math::
        \log p(x \mid \mu, \theta) = \sum_d
        \log \frac{\Gamma(x_d + \theta_d)}{\Gamma(\theta_d)\, x_d!}
        + \theta_d \log \frac{\theta_d}{\theta_d + \mu_d}
        + x_d \log \frac{\mu_d}{\theta_d + \mu_d}

    Args:
        x: ``[..., D]``, counts: at least 0.
        mu: ``[..., D]``, the mean, at least 0.
        theta: ``[..., D]``, the inverse dispersion, above 0: the variance is
            :math:`\mu + \mu^2 / \theta`. All three broadcast and are not copied: a ``theta`` of
            shape ``[D]`` is shared by the batch.

    Returns:
        Nats per row, ``[...]``; float32 for half types. As ``theta`` grows it goes over into the
        Poisson's, where the difference of two ``lgamma`` has lost all its digits. NaN where an
        argument is out of its range or infinite; no epsilon is added anywhere.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast.

    Papers: Lopez et al., "Deep generative modeling for single-cell transcriptomics", Nature Methods
    2018 (the parameters); Loader, "Fast and accurate computation of binomial probabilities", 2000.

    >>> fastvae.negative_binomial_log_prob(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2))
    tensor([-2.7726])
    """
    return _negative_binomial_log_prob(x, mu, theta)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, logits: Tensor
) -> Tensor:
    r"""Log-probability of counts with dropout, summed over the last dimension.

    .. math::
        \log p(x) = \sum_d \log\bigl(\pi_d\, [x_d = 0] + (1 - \pi_d)\,
        \mathrm{NB}(x_d; \mu_d, \theta_d)\bigr), \qquad \pi = \sigma(\text{logits})

    Args:
        x, mu, theta: as :func:`negative_binomial_log_prob`.
        logits: ``[..., D]``, of the probability :math:`\pi` that a count was dropped.

    Returns, errors and papers as :func:`negative_binomial_log_prob`.

    >>> x, one = torch.zeros(1, 2), torch.ones(1, 2)
    >>> fastvae.zero_inflated_negative_binomial_log_prob(x, one, one, torch.zeros(2))
    tensor([-0.5754])
    """
    return _zero_inflated_negative_binomial_log_prob(x, mu, theta, logits)
