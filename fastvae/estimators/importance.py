"""log p(x) from importance samples: as many as one likes, in the memory of a few."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor

from .. import random
from ..functional import gaussian_log_prob, log_mean_exp, reparameterize
from .evidence import LogProb, Prior, check_pieces, check_prior, log_prior, rows_of
from .surrogate import check_floating, check_same_device

__all__ = ["importance_sampled_log_likelihood", "streaming_log_mean_exp"]


@torch.no_grad()
def streaming_log_mean_exp(chunks: Iterable[Tensor]) -> Tensor:
    r"""Logarithm of the mean of exponentials over all samples of all chunks, without gradient.

    .. math:: \log \frac1K \sum_k w_k, \qquad K = \sum_c K_c

    Args:
        chunks: of log-weights, ``[K_c, ...]`` each; taken one at a time, so that a generator of
            them needs the memory of one.

    Returns:
        ``[...]``, nats; float32 for half types. All -inf gives -inf; +inf and NaN give themselves.
        A running maximum, and a sum relative to it: what is rounded is that sum, not log p(x) once
        per chunk.

    Raises:
        TypeError: if a chunk is not a floating-point tensor.
        ValueError: if there is no sample, or the chunks differ in more than their number of them.

    >>> fastvae.streaming_log_mean_exp(torch.zeros(16, 4) for _ in range(10))
    tensor([0., 0., 0., 0.])
    """
    name, samples = "streaming_log_mean_exp", 0
    total: Tensor | None = None
    for chunk in chunks:
        check_floating(name, "a chunk", chunk)
        if chunk.dim() == 0:
            raise ValueError(f"fastvae::{name}: a chunk must be [K, ...], got []")
        part = log_mean_exp(chunk.movedim(0, -1))
        if total is None:
            top, total = torch.full_like(part, -math.inf), torch.zeros_like(part)
        elif part.shape != total.shape:
            raise ValueError(
                f"fastvae::{name}: chunks must have the same shape but for K, got"
                f" {list(part.shape)} and {list(total.shape)}"
            )
        else:
            check_same_device(name, "a chunk", chunk, "the first", total)
        if len(chunk) == 0:
            continue
        samples += len(chunk)
        higher = torch.maximum(top, part)
        at = _finite(higher)
        total = total * torch.exp(top - at) + len(chunk) * torch.exp(part - at)
        top = higher
    if total is None or samples == 0:
        raise ValueError(f"fastvae::{name}: chunks must have at least one sample, got none")
    return _finite(top) + torch.log(total / samples)


def _finite(top: Tensor) -> Tensor:
    """Where the maximum is infinite the sum is relative to 0: not inf - inf."""
    return torch.where(top.isinf(), 0.0, top)


@torch.no_grad()
def importance_sampled_log_likelihood(
    log_likelihood: LogProb,
    mu: Tensor,
    log_var: Tensor,
    num_samples: int,
    *,
    chunk: int = 16,
    prior: Prior = None,
    parameterization: str = "log_var",
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Importance-sampled log p(x), with q(z|x) = N(mu, e^log_var) for the proposal.

    .. math::
        \log \frac1K \sum_{k=1}^K \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    A lower bound in expectation, which rises to log p(x) with K; at K = 1 it is the ELBO. It is for
    evaluation, and has no gradient: :func:`fastvae.importance_weighted_bound` trains.

    Args:
        log_likelihood: z of ``[C, ..., D]`` to log p(x|z), ``[C, ...]``. It is called once per
            chunk and closes over x, which broadcasts: a batch of images is never repeated.
        mu, log_var: of q, ``[..., D]``, broadcast together: x encoded once.
        num_samples: K.
        chunk: how many samples are held at once, rounded up to a multiple of 4: the memory is that
            of ``chunk`` decoded batches, whatever K. It changes no sample.
        prior: ``(mu, log_var)`` of a Gaussian p(z), or a function from z to log p(z); default:
            N(0, I).
        parameterization: what ``log_var``, and that of a Gaussian prior, holds, as in
            :func:`fastvae.reparameterize`.
        generator, key: as in :func:`fastvae.reparameterize`: sample k has the noise that it has
            there for ``num_samples=K``.

    Returns:
        Nats per datapoint, ``[...]``; float32 for half types. If all weights of a datapoint are 0,
        -inf; one that is NaN makes its datapoint NaN.

    Raises:
        TypeError: if an argument is not of its kind, or a function returns no floating-point
            tensor.
        ValueError: if ``num_samples`` or ``chunk`` is not positive, shapes or devices do not fit,
            a function does not return one number per row, or key and generator are both given.

    Papers: Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in
    Deep Generative Models", ICML 2014; Burda et al., "Importance Weighted
    Autoencoders", ICLR 2016.

    >>> x, decoder = torch.rand(16, 784), torch.nn.Linear(8, 784)
    >>> mu, log_var = torch.zeros(16, 8), torch.zeros(16, 8)
    >>> log_px = fastvae.importance_sampled_log_likelihood(
    ...     lambda z: fastvae.bernoulli_log_prob(x, decoder(z)), mu, log_var, 100
    ... )
    >>> log_px.shape
    torch.Size([16])
    """
    name = "importance_sampled_log_likelihood"
    check_pieces(name, log_likelihood, mu, log_var, prior)
    for what, value in (("num_samples", num_samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"fastvae::{name}: {what} must be positive, got {value}")
    if key is not None and generator is not None:
        raise ValueError(f"fastvae::{name}: key and generator must not be given together, got both")
    if key is not None:
        random.check_key(name, key)
    first = random.from_generator(generator, mu.device) if key is None else key
    size = chunk + -chunk % 4  # so that every chunk starts with a whole block of noise
    shape = torch.broadcast_shapes(mu.shape, log_var.shape)
    if isinstance(prior, tuple):
        check_prior(name, prior, mu.expand(shape), shape[:-1])

    def log_weights() -> Iterator[Tensor]:
        for start in range(0, num_samples, size):
            z = reparameterize(
                mu,
                log_var,
                num_samples=min(size, num_samples - start),
                parameterization=parameterization,
                key=random.shard(first, start * math.prod(shape[:-1]), shape[-1]),
            )
            log_p = rows_of(name, "log_likelihood", log_likelihood, z)
            log_p = log_p + log_prior(name, prior, z, parameterization)
            yield log_p - gaussian_log_prob(z, mu, log_var, parameterization=parameterization)

    return streaming_log_mean_exp(log_weights())
