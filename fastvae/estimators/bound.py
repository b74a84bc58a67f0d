"""Bounds on log p(x) from K weighted samples, each with the right gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import log_mean_exp
from .surrogate import HALF, AddGradient, wide

__all__ = ["importance_weighted_bound"]

_NAME = "fastvae::importance_weighted_bound"
ESTIMATORS = ("elbo", "iwae", "stl", "dreg", "miwae", "ciwae", "piwae", "rws", "vimco")
_SEPARATE = ("dreg", "piwae")  # z gets another gradient than the model: log_w is a function of z
_SCORE = ("rws", "vimco")
_GROUPS = ("miwae", "piwae")


class _Gate(torch.autograd.Function):
    """``(z, token)``: backward multiplies the gradient of z by that of the token, elementwise.

    So what is known only once the weights are, which is after z was used, still reaches z: the
    token is handed to :class:`_Send`, whose backward comes first. Data flow alone, no hooks and no
    state: torch.compile sees through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if z.dtype in HALF else z.dtype
        return z.view_as(z), torch.zeros((), dtype=dtype, device=z.device).expand(z.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, factor: Tensor) -> Tensor:
        return (grad * factor).to(ctx.dtype)


class _Send(torch.autograd.Function):
    """``bound``; backward sends ``factor`` to the token, whatever the gradient of the bound."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bound: Tensor, factor: Tensor, token: Tensor) -> Tensor:
        return bound.view_as(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, factor, token = inputs
        ctx.save_for_backward(factor)
        ctx.shape, ctx.dtype = token.shape, token.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (factor,) = ctx.saved_tensors
        more = len(ctx.shape) - factor.dim()  # of a sample, beyond the dimensions of log_w
        factor = factor.reshape(*factor.shape, *[1] * more).to(ctx.dtype)
        return grad, None, factor.expand(ctx.shape)


def _over_samples(log_w: Tensor, dim: int = 0) -> Tensor:
    return log_mean_exp(log_w.movedim(dim, -1))


def _weights(log_w: Tensor, dim: int = 0) -> Tensor:
    """Normalised and detached; where all are 0, zero."""
    log_w = wide(log_w.detach())
    nothing = log_w.amax(dim, keepdim=True) == -math.inf
    return torch.softmax(torch.where(nothing, 0.0, log_w), dim).masked_fill(nothing, 0.0)


def _vimco_signal(log_w: Tensor) -> Tensor:
    r"""L - L_{-k} per sample, detached; L_{-k} has the geometric mean of the others for w_k.

    With e_k = w_k / max w, g_k the geometric mean and S = sum e, it is -log(1 + (g_k - e_k) / S),
    which keeps its digits for many samples, but for the largest: it may be all of S, and its signal
    is taken relative to the second largest.
    """
    log_w = wide(log_w.detach())
    samples = log_w.shape[0]
    first, at = log_w.max(0, keepdim=True)
    none = first == -math.inf
    first = first.masked_fill(none, 0.0)
    is_first = torch.zeros_like(log_w, dtype=torch.bool).scatter(0, at, True)
    others = log_w.masked_fill(is_first, -math.inf)
    second = others.amax(0, keepdim=True)
    second = torch.where(second == -math.inf, first, second)

    # Mean of the others' logarithms, relative to the largest; one weight of 0 makes it -inf.
    zero = log_w == -math.inf
    relative = (log_w - first).masked_fill(zero, 0.0)
    zeros = zero.sum(0, keepdim=True) - zero.to(torch.int64)  # among the others
    log_g = (relative.sum(0, keepdim=True) - relative) / (samples - 1)
    log_g = log_g.masked_fill(zeros > 0, -math.inf)

    e = torch.exp(log_w - first)
    total = e.sum(0, keepdim=True)
    signal = -torch.log1p((torch.exp(log_g) - e) / total)
    # The first: log(1 + (e^gap - g) / rest) relative to the second; by parts, were e^gap infinite.
    gap = first - second
    g = torch.exp(log_g + gap)
    rest = torch.exp(others - second).sum(0, keepdim=True) + g
    near = torch.log1p((torch.exp(gap.clamp(max=20.0)) - g) / rest)
    of_first = torch.where(gap < 20.0, near, gap + torch.log(total) - torch.log(rest))
    return torch.where(is_first, of_first, signal).masked_fill(none, 0.0)


def importance_weighted_bound(
    log_w: Tensor | Callable[..., Tensor],
    estimator: str = "iwae",
    *,
    z: Tensor | tuple[Tensor, ...] | None = None,
    log_q: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    r"""Lower bound on log p(x) from K samples of q, to be maximised.

    .. math::
        L_K = \log \frac1K \sum_k w_k, \qquad
        \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad \hat w_k = w_k / \sum_j w_j

    Args:
        log_w: ``[K, ...]`` nats, the samples leading, as ``num_samples=K`` puts them;
            ``[M, K, ...]`` for miwae and piwae. For dreg and piwae a function that computes it from
            ``z``.
        estimator: what is maximised, and by which gradient.

            - ``elbo``: the mean over K, and its gradient.
            - ``iwae``: :math:`L_K`, and its gradient: the weights :math:`\hat w_k`.
            - ``stl``: as iwae, for a ``log_w`` without q's score (below).
            - ``dreg``: :math:`L_K`; the model gets :math:`\hat w_k`, the path through z
              :math:`\hat w_k^2`.
            - ``miwae``: the mean over M of :math:`L_K`, and its gradient.
            - ``ciwae``: :math:`\beta` elbo + :math:`(1 - \beta) L_K`, and its gradient.
            - ``piwae``: :math:`L_{MK}`; the model gets its gradient, the inference network miwae's.
            - ``rws``: :math:`L_K`; the model gets its gradient, q
              :math:`\sum_k \hat w_k \nabla \log q(z_k \mid x)` (wake-phase phi).
            - ``vimco``: :math:`L_K`, its gradient, and the score function's with the signal
              :math:`L_K - L_{-k}`: in :math:`L_{-k}` the geometric mean of the others stands for
              :math:`w_k`.

        z: for dreg the sample, ``[K, ..., D]``; for piwae all that the inference network gives to
            ``log_w``, a tuple of tensors that begin with the dimensions of ``log_w``.
        log_q: for rws and vimco :math:`\log q(z_k \mid x)`, ``[K, ...]``: the very term of
            ``log_w``, which keeps it, not detached; ``z`` itself is drawn without gradient.
        beta: of ciwae, in [0, 1]; default 0.5.

    Returns:
        Nats per datapoint, ``[...]``; float32 for half types. If all weights of a datapoint are 0,
        -inf, and no gradient.

    stl and dreg ask for :math:`\log q` with *detached variational parameters* inside ``log_w``:
    q's parameters then get a gradient through the sample alone, of zero variance where q is the
    posterior. dreg is unbiased for them, stl biased for K > 1.

    For dreg and piwae ``log_w`` is called once, with tensors equal to those of ``z``. Through these
    goes the inference network's gradient; what the function closes over counts as the model. So
    dreg has ``lambda z: log_p(x, z) - log_q(z, mu.detach(), log_var.detach())`` and ``z=z``, and
    piwae ``lambda z, log_q: log_p(x, z) - log_q`` and ``z=(z, log_q)``. Sample k may depend on
    entry k of ``z`` only (no batch normalisation over samples), and piwae asks for activations with
    float32's range of exponents.

    The gradients of dreg, piwae, rws and vimco are not those of the value: a second derivative
    holds their weights constant, and forward mode raises.

    Raises:
        TypeError: if ``log_w`` is not floating, or not what the estimator takes.
        ValueError: if the estimator is unknown, an argument is missing or not its own, ``log_w``
            has no sample (vimco: fewer than two), or ``log_q`` or ``z`` do not fit its shape.

    Papers: Burda et al., "Importance Weighted Autoencoders", ICLR 2016; Roeder et al., "Sticking
    the Landing", NeurIPS 2017; Tucker et al., "Doubly Reparameterized Gradient Estimators for Monte
    Carlo Objectives", ICLR 2019; Rainforth et al., "Tighter Variational Bounds are Not Necessarily
    Better", ICML 2018; Bornschein & Bengio, "Reweighted Wake-Sleep", ICLR 2015; Mnih & Rezende,
    "Variational Inference for Monte Carlo Objectives", ICML 2016.

    >>> log_w = torch.tensor([[0.25], [0.75]]).log()
    >>> fastvae.importance_weighted_bound(log_w)
    tensor([-0.6931])
    >>> mu, z = torch.ones(3, requires_grad=True), torch.randn(8, 3)
    >>> def log_joint_ratio(z):
    ...     q = fastvae.gaussian_log_prob(z, mu.detach(), torch.zeros(3))
    ...     return fastvae.gaussian_log_prob(z, torch.zeros(3), torch.zeros(3)) - q
    >>> fastvae.importance_weighted_bound(log_joint_ratio, "dreg", z=mu + z).shape
    torch.Size([])
    """
    _check_arguments(log_w, estimator, z, log_q, beta)
    tokens: list[Tensor] = []
    if not isinstance(log_w, Tensor):
        gated = [_Gate.apply(x) for x in ((z,) if isinstance(z, Tensor) else z or ())]  # type: ignore[no-untyped-call]
        tokens = [token for _, token in gated]
        log_w = log_w(*(x for x, _ in gated))
        if not isinstance(log_w, Tensor):
            raise TypeError(f"{_NAME}: log_w must return a tensor, got {type(log_w).__name__}")
    _check_shapes(log_w, estimator, tokens, log_q)

    if estimator == "elbo":
        return wide(log_w).mean(0)
    if estimator == "miwae":
        return _over_samples(log_w, 1).mean(0)
    if estimator == "ciwae":
        beta = 0.5 if beta is None else beta
        if beta in (0, 1):  # not 0 * inf
            return wide(log_w).mean(0) if beta else _over_samples(log_w)
        return beta * wide(log_w).mean(0) + (1 - beta) * _over_samples(log_w)
    if estimator == "piwae":
        return _piwae(log_w, tokens)

    bound = _over_samples(log_w)
    if estimator == "dreg":
        factor = _weights(log_w)
        for token in tokens:
            bound = _Send.apply(bound, factor, token)  # type: ignore[no-untyped-call]
    elif estimator == "rws":  # through log_w, log q gets -w_k: once to cancel that, once to be
        bound = AddGradient.apply(bound, 2 * _weights(log_w), log_q)  # type: ignore[no-untyped-call]
    elif estimator == "vimco":
        bound = AddGradient.apply(bound, _vimco_signal(log_w), log_q)  # type: ignore[no-untyped-call]
    return bound


def _piwae(log_w: Tensor, tokens: list[Tensor]) -> Tensor:
    """The gate turns the weights w over all M K samples, sent to the model, into miwae's v.

    v / w is no number where w underflows, so every sample is sent 2^-60 more, which changes no
    digit of the model's gradient, and the gate takes it out again.
    """
    flat = log_w.flatten(0, 1)
    possible = wide(flat.detach()) != -math.inf
    extra = torch.where(possible, 2.0**-60, 0.0)
    bound = AddGradient.apply(_over_samples(flat), extra, flat)  # type: ignore[no-untyped-call]
    sent = (_weights(flat) + extra).view(log_w.shape)
    inference = _weights(log_w, 1) / log_w.shape[0]
    factor = torch.where(sent == 0.0, 0.0, inference / sent)
    for token in tokens:
        bound = _Send.apply(bound, factor, token)  # type: ignore[no-untyped-call]
    return bound


# --- checks ---------------------------------------------------------------------------------------


def _check_arguments(log_w: Any, estimator: str, z: Any, log_q: Any, beta: float | None) -> None:
    if estimator not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise ValueError(f"{_NAME}: estimator must be one of {known}, got {estimator!r}")
    given = (("z", z, _SEPARATE), ("log_q", log_q, _SCORE), ("beta", beta, ("ciwae",)))
    for name, value, owners in given:
        if (value is None) == (estimator not in owners):
            continue
        if value is not None:
            owner = " and ".join(owners)
            raise ValueError(f"{_NAME}: {name} must go with {owner} only, got it with {estimator}")
        if name != "beta":
            raise ValueError(f"{_NAME}: {name} must be given for {estimator}, got None")
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"{_NAME}: beta must be in [0, 1], got {beta}")
    if estimator in _SEPARATE:
        if isinstance(log_w, Tensor) or not callable(log_w):
            kind = type(log_w).__name__
            raise TypeError(f"{_NAME}: log_w must be a function of z for {estimator}, got {kind}")
    elif not isinstance(log_w, Tensor):
        kind = type(log_w).__name__
        raise TypeError(f"{_NAME}: log_w must be a tensor for {estimator}, got {kind}")


def _check_shapes(
    log_w: Tensor, estimator: str, tokens: list[Tensor], log_q: Tensor | None
) -> None:
    shape, leading = log_w.shape, 2 if estimator in _GROUPS else 1
    if not log_w.is_floating_point():
        raise TypeError(f"{_NAME}: log_w must be floating-point, got {log_w.dtype}")
    if len(shape) < leading:
        what = "[M, K, ...]" if leading == 2 else "[K, ...]"
        raise ValueError(f"{_NAME}: log_w must be {what} for {estimator}, got {list(shape)}")
    if 0 in shape[:leading]:
        raise ValueError(f"{_NAME}: log_w must have at least one sample, got {list(shape)}")
    if estimator == "vimco" and shape[0] < 2:
        raise ValueError(
            f"{_NAME}: log_w must have at least two samples for vimco, got {list(shape)}"
        )
    if log_q is not None and log_q.shape != shape:
        raise ValueError(
            f"{_NAME}: log_q must have the shape of log_w, got {list(log_q.shape)} and"
            f" {list(shape)}"
        )
    for token in tokens:
        if token.shape[: len(shape)] != shape:
            raise ValueError(
                f"{_NAME}: z must begin with the shape of log_w, got {list(token.shape)} and"
                f" {list(shape)}"
            )
