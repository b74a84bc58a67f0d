"""Categorical latents and likelihoods: samples with gradients, KL divergences, densities."""

from __future__ import annotations

from torch import Generator, Tensor

from .gaussian import _check_num_samples, _key
from .route import op

__all__ = ["categorical_kl", "categorical_log_prob", "gumbel_softmax"]

_categorical_kl = op("categorical_kl")
_categorical_log_prob = op("categorical_log_prob")
_gumbel_softmax = op("gumbel_softmax")


def gumbel_softmax(
    logits: Tensor,
    temperature: float,
    num_samples: int | None = None,
    *,
    hard: bool = False,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Sample a categorical distribution, relaxed so that gradients reach its logits.

    .. math::
        y = \mathrm{softmax}\Big(\frac{l + g}{\tau}\Big), \qquad g_k = -\log(-\log u_k)

    over the last dimension: the largest of :math:`l_k + g_k` is a sample of softmax(l), which y
    approaches as the temperature :math:`\tau` falls.

    Args:
        logits: unnormalised log-probabilities :math:`l`, ``[..., K]``; -inf for a class that is
            impossible.
        temperature: :math:`\tau`, a positive number. It gets no gradient.
        num_samples: ``S`` adds a leading dimension of independent samples; the logits are not
            copied.
        hard: straight-through: return that sample, one-hot, and give the logits the gradient of y.
        generator: where the key is drawn from; default: the device's default generator.
        key: an int64 tensor ``(seed, offset)``: replays the same noise on any device
            (:mod:`fastvae.random`).

    Returns:
        ``[..., K]`` or ``[S, ..., K]``, in the dtype of ``logits``: rows that sum to 1. NaN where
        no class is the largest: one is NaN or +inf, or all are -inf.

    The noise is never stored. It comes from all 32 bits of a word, in the same range in every
    dtype: from -3.13 to 22.87, which is :math:`33 \log 2` and finite, as is all that is made of it.
    Half types compute in float32.

    Raises:
        TypeError: if the dtype is not floating.
        ValueError: if the temperature is not positive, or the key is not int64 of shape ``[2]``.

    Papers: Jang, Gu & Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017;
    Maddison, Mnih & Teh, "The Concrete Distribution", ICLR 2017; straight-through: Bengio, Leonard
    & Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.

    >>> y = fastvae.gumbel_softmax(torch.zeros(4, 10), temperature=0.5, hard=True)
    >>> y.sum(-1)
    tensor([1., 1., 1., 1.])
    """
    key = _key("gumbel_softmax", logits, generator, key)
    if num_samples is not None and logits.dim() > 0:  # else the op has its say
        _check_num_samples("gumbel_softmax", num_samples)
        logits = logits.expand(num_samples, *logits.shape)
    return _gumbel_softmax(logits, key, temperature, hard)


def categorical_kl(logits_q: Tensor, logits_p: Tensor | None = None) -> Tensor:
    r"""KL divergence between categorical distributions over the last dimension.

    .. math::
        \mathrm{KL}(q \| p) = \sum_{k=1}^{K} q_k \log \frac{q_k}{p_k}, \qquad
        q = \mathrm{softmax}(l), \quad p = \mathrm{softmax}(m)

    Args:
        logits_q: unnormalised log-probabilities :math:`l`, ``[..., K]``; -inf for a class that is
            impossible.
        logits_p: :math:`m`, broadcast with ``logits_q``; default: all classes are equally likely,
            and the divergence is :math:`\log K` minus the entropy of q.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Never negative, accurate also where q is
        close to p. A class that q excludes adds nothing; one that only p excludes makes it +inf
        (with a gradient of NaN for q). NaN where a logit is NaN or +inf, or all are -inf.

    Raises:
        TypeError: if a dtype is not floating, or they differ.
        ValueError: if the shapes do not broadcast.

    Paper: Jang, Gu & Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017.

    >>> fastvae.categorical_kl(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
    tensor([0.0000, 0.6931])
    """
    return _categorical_kl(logits_q, logits_p)


def categorical_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    r"""Log-probability of classes, summed over the variables of a datum.

    .. math:: \log p(x) = \sum_{d=1}^{D} l_{d x_d} - \log \sum_{k=1}^{K} e^{l_{dk}}

    Args:
        x: a class in 0, ..., K - 1 for each variable, ``[..., D]``, int64; or in the dtype of
            ``logits``, then rounded to the nearest integer (bfloat16 holds no odd class beyond
            256). It gets no gradient but zero.
        logits: unnormalised log-probabilities, ``[..., D, K]``; ``x`` broadcasts against
            ``[..., D]`` and is not copied, so it may be shared by samples along leading dimensions.

    Returns:
        Nats per row, ``[...]``; float32 for half types. Where there is no such class, NaN, for the
        value and the gradient: nothing is read out of bounds, and no device waits to find out.

    Raises:
        TypeError: if the dtype of ``logits`` is not floating, or ``x`` has neither that nor int64.
        ValueError: if the shapes do not broadcast.

    >>> x = torch.tensor([[1, 0]])
    >>> fastvae.categorical_log_prob(x, torch.zeros(1, 2, 4))
    tensor([-2.7726])
    """
    return _categorical_log_prob(x, logits)
