r"""The score function's gradient, for latent variables that cannot be reparameterised.

.. math::
    \nabla E_q[\log p(x, z) - \log q(z|x)]
    = E_q[\nabla \log p(x, z) + (\log p(x, z) - \log q(z|x) - b)\, \nabla \log q(z|x)]

for any b that does not depend on z. The functions here have the bound for their value and this for
their gradient, so that ``(-bound.mean()).backward()`` trains everything: the model by its own
gradient, q by its score times the learning signal, a learned baseline by its squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .surrogate import AddGradient, check_floating, check_same_device, wide

__all__ = ["rao_blackwell_bound", "score_function_bound"]

Control = Callable[[Tensor], Tensor]


def score_function_bound(
    log_p: Tensor,
    log_q: Tensor,
    baseline: Tensor | float | None = None,
    *,
    control: Control | None = None,
) -> Tensor:
    r"""Evidence lower bound whose gradient is the score function's: REINFORCE, NVIL and relatives.

    .. math::
        \mathcal L = \frac1K \sum_k \log p(x, z_k) - \log q(z_k|x), \qquad
        \hat g = \frac1K \sum_k \nabla \log p(x, z_k) + s_k\, \nabla \log q(z_k|x)

    with the signal :math:`s_k = \mathrm{control}(\log p(x, z_k) - \log q(z_k|x) - b_k)`.

    Args:
        log_p: log p(x, z_k), ``[K, ...]`` nats, the samples leading.
        log_q: log q(z_k | x), ``[K, ...]``: not detached, of samples drawn without gradient.
        baseline: b, ``[...]`` or ``[K, ...]``, or one number. It may depend on x but not on sample
            k. If it requires grad it is learnt: its gradient is :math:`s_k \nabla b_k`, which, as
            the bound is maximised, takes it towards the signal by least squares.
        control: what takes the signal ``[K, ...]``, after the baseline, to a better one.

            - ``None``: plain REINFORCE, or with a baseline alone.
            - :class:`fastvae.estimators.MovingAverage`: less a running mean.
            - ``MovingAverage(normalize=True)`` and ``baseline=network(x)``: NVIL.
            - :func:`fastvae.leave_one_out`: less the mean of the other samples, K > 1.

    Returns:
        Nats per datapoint, ``[...]``; float32 for half types.

    q's own gradient *inside* the signal, the expectation of whose score is 0, is left out. A second
    derivative holds the signal constant, so it is not that of the bound, and forward mode raises.

    A datapoint that is -inf or NaN has such a bound and such a gradient of q, where a gradient
    scaler sees it; no other has, neither a learned baseline nor the state of ``MovingAverage``
    learns from it, and if it is left out of the loss (``bound[bound.isfinite()]``) it sends none.

    Raises:
        TypeError: if ``log_p``, ``log_q``, ``baseline`` or what ``control`` returns is not a
            floating-point tensor.
        ValueError: if there is no sample, shapes or devices differ, ``baseline`` is neither of
            ``[...]`` nor of ``[K, ...]``, or ``control`` changes the shape.

    Papers: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", 1992; Ranganath, Gerrish & Blei, "Black Box Variational Inference",
    AISTATS 2014; Mnih & Gregor, "Neural Variational Inference and Learning in Belief Networks",
    ICML 2014; Kool, van Hoof & Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.

    >>> logits = torch.zeros(16, 8, requires_grad=True)
    >>> with torch.no_grad():
    ...     z = torch.bernoulli(torch.sigmoid(logits).expand(5, 16, 8))
    >>> log_q = fastvae.bernoulli_log_prob(z, logits)
    >>> log_p = fastvae.bernoulli_log_prob(z, torch.ones(8))  # and log p(x|z)
    >>> bound = fastvae.score_function_bound(log_p, log_q, control=fastvae.leave_one_out)
    >>> (-bound.mean()).backward()
    """
    name = "score_function_bound"
    _check_log_probs(name, log_p, log_q)
    if log_q.shape != log_p.shape:
        raise ValueError(
            f"fastvae::{name}: log_q must have the shape of log_p, got {list(log_q.shape)} and"
            f" {list(log_p.shape)}"
        )
    log_w = wide(log_p) - wide(log_q.detach())
    shapes = (log_w.shape, log_w.shape[1:])
    signal, learnt = _centre(name, log_w.detach(), baseline, shapes, control)
    return _with_score(log_w.mean(0), signal, log_q, learnt)


def rao_blackwell_bound(
    log_p: Tensor,
    log_q: Tensor,
    p_depends: Tensor,
    q_depends: Tensor,
    baseline: Tensor | float | None = None,
    *,
    control: Control | None = None,
) -> Tensor:
    r"""As :func:`score_function_bound`, each factor of q with the terms that depend on it alone.

    .. math::
        \hat g = \frac1K \sum_k \nabla \log p(x, z_k) + \sum_f s_{kf}\, \nabla \log q_f(z_k|x),
        \qquad s_{kf} = \sum_{t \in p(f)} \log p_t(x, z_k) - \sum_{g \in q(f)} \log q_g(z_k|x)

    What does not depend on factor f, given what was drawn before it, meets its score for nothing:
    the expectation is 0, and the variance is not. Centre what is left, by a baseline or a control:
    fewer terms of one sign may be further from 0 than all of them.

    Args:
        log_p: log p(x, z_k) term by term, ``[K, ..., T]``: their sum is the joint.
        log_q: log q(z_k | x) factor by factor, ``[K, ..., F]``, as in
            :func:`score_function_bound`.
        p_depends: bool, ``[F, T]``: whether term t of ``log_p`` depends on the variables that
            factor f draws, *directly or through others drawn from them*. If q is mean-field, that
            is the Markov blanket of f: the terms in which its variables occur.
        q_depends: bool, ``[F, F]``: whether factor g of ``log_q`` does, likewise. A factor always
            depends on itself; where q is mean-field, on no other: ``torch.eye(F).bool()``.
        baseline: ``[..., F]``, ``[K, ..., F]``, either with 1 for F, or one number. That of factor
            f may depend on what was drawn before it.
        control: as there, of a signal ``[K, ..., F]``: ``MovingAverage(shape=(F,))`` has one
            average per factor.

    A dependence too many costs variance; one too few makes the gradient biased. If all depend on
    all, it is the gradient of :func:`score_function_bound`.

    Returns:
        The bound over all terms and factors, ``[...]``; float32 for half types. A term that is -inf
        or NaN shows in the factors that meet it. Sums over terms are taken in float64: autocast and
        TF32 round none.

    Raises:
        As :func:`score_function_bound`; and TypeError if ``p_depends`` or ``q_depends`` is not a
        bool tensor, ValueError if they are not ``[F, T]`` and ``[F, F]``.

    Papers: Ranganath, Gerrish & Blei, "Black Box Variational Inference", AISTATS 2014;
    for q that are not mean-field: Schulman et al., "Gradient Estimation Using Stochastic
    Computation Graphs", NeurIPS 2015; Mnih & Gregor, "Neural Variational Inference and Learning in
    Belief Networks", ICML 2014, section 2.3 (local learning signals).

    >>> logits = torch.zeros(16, 8, requires_grad=True)  # 8 independent bits, each with a prior
    >>> with torch.no_grad():
    ...     z = torch.bernoulli(torch.sigmoid(logits).expand(5, 16, 8))
    >>> log_q = fastvae.bernoulli_log_prob(z.unsqueeze(-1), logits.unsqueeze(-1))
    >>> log_pz = fastvae.bernoulli_log_prob(z.unsqueeze(-1), torch.ones(8, 1))
    >>> log_px = z.sum(-1, keepdim=True)  # of some likelihood, which depends on all bits
    >>> own = torch.eye(8).bool()
    >>> p_depends = torch.cat([own, torch.ones(8, 1).bool()], 1)
    >>> bound = fastvae.rao_blackwell_bound(torch.cat([log_pz, log_px], -1), log_q, p_depends, own)
    >>> (-bound.mean()).backward()
    """
    name = "rao_blackwell_bound"
    _check_log_probs(name, log_p, log_q)
    _check_dependences(name, log_p, log_q, p_depends, q_depends)
    value = wide(log_p).sum(-1) - wide(log_q.detach()).sum(-1)
    own = torch.eye(log_q.shape[-1], dtype=torch.bool, device=log_q.device)
    local = _meet(log_p, p_depends) - _meet(log_q, q_depends | own)
    each = local.to(value.dtype)
    one = (*each.shape[:-1], 1)
    shapes = (each.shape, each.shape[1:], one, one[1:])
    signal, learnt = _centre(name, each, baseline, shapes, control)
    return _with_score(value.mean(0).unsqueeze(-1), signal, log_q, learnt).squeeze(-1)


def _meet(terms: Tensor, depends: Tensor) -> Tensor:
    """``[..., T]``, summed over those of each factor, ``[..., F]``: float64.

    In float64 nothing rounds the product for speed. What is infinite is counted on its own, for
    0 * inf would show it to every factor.
    """
    terms = terms.detach().double()
    low, high, nan = terms == -math.inf, terms == math.inf, terms.isnan()
    clean = terms.masked_fill(low | high | nan, 0.0)
    stacked = torch.stack((clean, low.double(), high.double(), nan.double()))
    total, lows, highs, nans = (stacked @ depends.T.double()).unbind(0)
    total = total.masked_fill(lows > 0, -math.inf).masked_fill(highs > 0, math.inf)
    return total.masked_fill((nans > 0) | ((lows > 0) & (highs > 0)), math.nan)


def _centre(
    name: str,
    signal: Tensor,
    baseline: Tensor | float | None,
    shapes: tuple[Any, ...],
    control: Control | None,
) -> tuple[Tensor, Tensor | None]:
    """The signal as it meets the score, detached; and the baseline, if it is to learn."""
    learnt = None
    if isinstance(baseline, Tensor):
        check_floating(name, "baseline", baseline)
        if baseline.dim() and baseline.shape not in shapes:
            wanted = " or ".join(str(list(s)) for s in dict.fromkeys(map(tuple, shapes)))
            raise ValueError(
                f"fastvae::{name}: baseline must be {wanted}, got {list(baseline.shape)}"
            )
        if baseline.dim():
            check_same_device(name, "baseline", baseline, "log_p", signal)
        learnt = baseline.expand(signal.shape) if baseline.requires_grad else None
        baseline = wide(baseline.detach())
    elif baseline is not None and not isinstance(baseline, (int, float)):
        kind = type(baseline).__name__
        raise TypeError(f"fastvae::{name}: baseline must be a tensor or a number, got {kind}")
    dtype = signal.dtype
    if baseline is not None:
        signal = signal - baseline
    if control is None:
        return signal.to(dtype), learnt
    if isinstance(control, Tensor) or not callable(control):
        kind = type(control).__name__
        raise TypeError(f"fastvae::{name}: control must be a function of the signal, got {kind}")
    controlled = control(signal)
    if not isinstance(controlled, Tensor) or not controlled.is_floating_point():
        kind = controlled.dtype if isinstance(controlled, Tensor) else type(controlled).__name__
        raise TypeError(f"fastvae::{name}: control must return a floating-point tensor, got {kind}")
    if controlled.shape != signal.shape:
        raise ValueError(
            f"fastvae::{name}: control must keep the shape of the signal, got"
            f" {list(controlled.shape)} and {list(signal.shape)}"
        )
    return controlled.detach().to(dtype), learnt


def _with_score(bound: Tensor, signal: Tensor, log_q: Tensor, learnt: Tensor | None) -> Tensor:
    coefficient = signal / len(signal)  # of a mean over samples
    bound = AddGradient.apply(bound, coefficient, log_q)  # type: ignore[no-untyped-call]
    if learnt is not None:
        finite = coefficient.masked_fill(~coefficient.isfinite(), 0.0)
        bound = AddGradient.apply(bound, finite, learnt)  # type: ignore[no-untyped-call]
    return bound


# --- checks ---------------------------------------------------------------------------------------


def _check_log_probs(name: str, log_p: Any, log_q: Any) -> None:
    for what, x in (("log_p", log_p), ("log_q", log_q)):
        check_floating(name, what, x)
    if log_p.dim() == 0 or len(log_p) == 0:
        raise ValueError(
            f"fastvae::{name}: log_p must have at least one sample, got {list(log_p.shape)}"
        )
    check_same_device(name, "log_q", log_q, "log_p", log_p)


def _check_dependences(
    name: str, log_p: Tensor, log_q: Tensor, p_depends: Any, q_depends: Any
) -> None:
    if log_p.dim() < 2 or log_q.shape[:-1] != log_p.shape[:-1]:
        raise ValueError(
            f"fastvae::{name}: log_p and log_q must be [K, ..., T] and [K, ..., F], got"
            f" {list(log_p.shape)} and {list(log_q.shape)}"
        )
    factors = log_q.shape[-1]
    given = (("p_depends", p_depends, log_p.shape[-1]), ("q_depends", q_depends, factors))
    for what, mask, columns in given:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"fastvae::{name}: {what} must be a bool tensor, got {kind}")
        if mask.shape != (factors, columns):
            raise ValueError(
                f"fastvae::{name}: {what} must be [{factors}, {columns}], got {list(mask.shape)}"
            )
        check_same_device(name, what, mask, "log_p", log_p)
