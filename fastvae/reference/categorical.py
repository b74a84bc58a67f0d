"""Categorical distributions in plain PyTorch; see :mod:`fastvae.functional.categorical`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import random
from .gaussian import _compute
from .scale import _expm1_minus

__all__ = ["categorical_kl", "categorical_log_prob", "gumbel_softmax"]


def gumbel_softmax(logits: Tensor, key: Tensor, temperature: float, hard: bool = False) -> Tensor:
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"fastvae::gumbel_softmax: temperature must be a positive number, got {temperature:g}"
        )
    (x,) = _compute(logits)
    scores = x + random.gumbel(key, x.shape, x.dtype)
    # Relative to the largest first: no temperature is so low that it makes inf - inf of it.
    top = scores.detach().amax(-1, keepdim=True) if x.shape[-1] > 0 else 0.0
    y = torch.softmax((scores - top) * min(1 / temperature, torch.finfo(x.dtype).max), -1)
    if hard and x.shape[-1] > 0:
        one_hot = torch.zeros_like(y).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        # NaN where there is no largest; y - y is 0, and its gradient that of y
        y = torch.where(y.detach().isnan(), math.nan, one_hot.detach()) + (y - y.detach())
    return y.to(logits.dtype)


def categorical_kl(logits_q: Tensor, logits_p: Tensor | None = None) -> Tensor:
    if logits_q.shape[-1] == 0:
        return _compute(logits_q)[0].sum(-1)
    log_q = torch.log_softmax(_compute(logits_q)[0], -1)
    if logits_p is None:
        log_p = torch.full_like(log_q, -math.log(log_q.shape[-1]))
    else:
        log_p = torch.log_softmax(_compute(logits_p)[0], -1)
    q, p = log_q.exp(), log_p.exp()
    # q (e^d - 1 - d) of d = log p - log q; what q excludes adds p, what only p excludes +inf
    excluded = q == 0.0
    d = torch.where(excluded, 0.0, log_p) - torch.where(excluded, 0.0, log_q)
    near = d < 1.0
    close = q * _expm1_minus(torch.where(near, d, 0.0))
    far = p - q * (1.0 + torch.where(near, 0.0, d))
    return torch.where(excluded, p, torch.where(near, close, far)).sum(-1)


def categorical_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    (scores,) = _compute(logits)
    classes = logits.shape[-1]
    shape = torch.broadcast_shapes(x.shape, scores.shape[:-1])
    nearest = x.detach().double().round()
    exists = (nearest >= 0) & (nearest < classes)
    value = torch.where(exists, 1.0, math.nan).to(
        scores.dtype
    )  # no such class: NaN, and its gradient
    if classes > 0:
        index = torch.where(exists, nearest, 0.0).long().expand(shape).unsqueeze(-1)
        log_p = torch.log_softmax(scores, -1).expand(*shape, classes)
        value = value * log_p.gather(-1, index).squeeze(-1)
    if x.is_floating_point():
        value = value + 0.0 * _compute(x)[0]  # flat between the classes
    return value.expand(shape).sum(-1)
