"""What the fused ops save in a real training step, measured against eager PyTorch.

Both are timed in one process, in turns, so that a busy machine slows both; what is reported is the
median of the ratios of neighbours.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .functional import bernoulli_log_prob, reparameterize_kl
from .models import VAE

__all__ = [
    "Comparison",
    "compare",
    "compare_elbo_terms",
    "compare_training_step",
    "eager_elbo",
    "stepper",
]

M = TypeVar("M", bound=torch.nn.Module)

_ROUNDS = 31
_SECONDS = 0.1  # per round and contestant


def eager_reparameterize_kl(mu: Tensor, log_var: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The sample and the divergence as everybody writes them."""
    z = mu + eps * torch.exp(0.5 * log_var)
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(-1)
    return z, kl


def eager_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """The Bernoulli likelihood as everybody writes it."""
    nats = functional.binary_cross_entropy_with_logits(
        logits, x.expand_as(logits), reduction="none"
    )
    return -nats.sum(-1)


def eager_elbo(model: VAE, x: Tensor) -> Tensor:
    """:meth:`VAE.elbo` of a Bernoulli model without any op of fastvae, ``[B]``."""
    mu, log_var = model.encode(x)
    z, kl = eager_reparameterize_kl(mu, log_var, torch.randn_like(mu))
    return eager_bernoulli_log_prob(x, *model.decode(z)) - kl


@dataclass(frozen=True)
class Comparison:
    """Median seconds of one call each, and the quartiles of their ratio."""

    what: str
    fastvae: float
    eager: float
    ratio: float
    low: float
    high: float
    rival: str = "eager"

    def __str__(self) -> str:
        return (
            f"{self.what:<38} {1e3 * self.fastvae:7.3f} ms   "
            f"{self.rival} {1e3 * self.eager:7.3f} ms   "
            f"{self.ratio:.2f}x  ({self.low:.2f} to {self.high:.2f})"
        )


def compare(
    what: str,
    fused: Callable[[], object],
    eager: Callable[[], object],
    rival: str = "eager",
) -> Comparison:
    """Times both in turns."""

    def seconds_per_call(function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a kernel's launch is not its end
        return (time.perf_counter() - start) / calls

    for function in (fused, eager):
        seconds_per_call(function, 5)
    calls = max(1, round(_SECONDS / seconds_per_call(eager, 5)))
    pairs = [
        (seconds_per_call(fused, calls), seconds_per_call(eager, calls)) for _ in range(_ROUNDS)
    ]
    low, ratio, high = statistics.quantiles([e / f for f, e in pairs], n=4)
    times = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Comparison(what, times[0], times[1], ratio, low, high, rival)


def stepper(model: M, elbo: Callable[[M, Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A call of it trains a copy of the model on ``x``, ``[B, D]``: forward, backward and Adam."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.Adam(own.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(-elbo(own, x).mean())
        optimizer.step()

    return step


def compare_training_step(model: VAE, x: Tensor) -> Comparison:
    """Forward, backward and Adam on one minibatch ``x``, ``[B, D]``."""
    fused = stepper(model, lambda own, x: own.elbo(x).elbo, x)
    return compare(f"training step, batch of {len(x)}", fused, stepper(model, eager_elbo, x))


def compare_elbo_terms(model: VAE, x: Tensor) -> Comparison:
    """Forward and backward of what fastvae fuses, without the layers of the network."""
    with torch.no_grad():
        mu, log_var = (t.clone().requires_grad_() for t in model.encode(x))
        logits = model.decode(mu)[0].clone().requires_grad_()

    def fused() -> object:
        z, kl = reparameterize_kl(mu, log_var)
        loss = kl.mean() - bernoulli_log_prob(x, logits).mean() + z.mean()
        return torch.autograd.grad(loss, (mu, log_var, logits))

    def eager() -> object:
        z, kl = eager_reparameterize_kl(mu, log_var, torch.randn_like(mu))
        loss = kl.mean() - eager_bernoulli_log_prob(x, logits).mean() + z.mean()
        return torch.autograd.grad(loss, (mu, log_var, logits))

    return compare("  of it the ELBO's own terms", fused, eager)
