"""Likelihoods p(x | z) from a decoder's unconstrained outputs, other than the Gaussian."""

from __future__ import annotations

from torch import Tensor

from .route import op

__all__ = ["bernoulli_log_prob"]

_bernoulli_log_prob = op("bernoulli_log_prob")


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
