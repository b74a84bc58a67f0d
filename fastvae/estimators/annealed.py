"""log p(x) by annealed importance sampling: many small steps from a known density to the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..functional import bernoulli_log_prob
from .evidence import LogProb, rows_of
from .surrogate import bernoulli_sample, check_floating, check_no_inference_mode, wide

__all__ = ["AnnealedWeights", "annealed_importance_sampling"]

_NAME = "annealed_importance_sampling"


class AnnealedWeights(NamedTuple):
    """What chains end with: ``log_w``, ``[K, ...]``, in nats; and how they moved."""

    log_w: Tensor
    acceptance: Tensor  # the mean over chains and steps, [...]
    step_size: Tensor  # of each temperature, [T, ...]


def _betas(steps: int, like: Tensor) -> Tensor:
    """From 0 to 1, slowly at both ends, where the densities change most (Wu et al.)."""
    t = torch.sigmoid(torch.linspace(-4.0, 4.0, steps + 1, dtype=torch.float64))
    return ((t - t[0]) / (t[-1] - t[0])).to(like)


def annealed_importance_sampling(
    log_joint: LogProb,
    log_start: LogProb,
    z: Tensor,
    num_steps: int = 500,
    leapfrog_steps: int = 5,
    *,
    bits: bool = False,
    scale: Tensor | None = None,
    step_size: Tensor | None = None,
    reverse: bool = False,
    generator: Generator | None = None,
) -> AnnealedWeights:
    r"""Importance weights of chains that are led from a start, whose density is known, to p(x, z).

    .. math::
        f_t(z) = q(z)^{1 - \beta_t}\, p(x, z)^{\beta_t}, \qquad
        \log w = \sum_{t=1}^T \log f_t(z_{t-1}) - \log f_{t-1}(z_{t-1}), \qquad
        z_t \sim T_{f_t}(\cdot \,|\, z_{t-1})

    T is a step of Hamiltonian Monte Carlo; of bits, a proposal that flips each on its own by the
    slope at z, accepted by Metropolis and Hastings:

    .. math::
        \mathrm{logit}\, P(\text{flip } i)
        = \tfrac12 \partial_i \log f_t(z)\, (1 - 2 z_i) - \tfrac{1}{2 \epsilon}

    :math:`E[w] = p(x)` whatever the chains do, so :math:`\log \frac1K \sum_k w_k` is a lower bound
    in expectation, and a much tighter one than that of importance sampling where q is not the
    posterior. Backwards, from a draw of the posterior, :math:`E[1/w] = 1/p(x)`, an upper bound: on
    data that the model made itself, where such a draw is at hand, the two enclose the truth.

    Args:
        log_joint: z of ``[K, ..., D]`` to log p(x, z), one number per row of z.
        log_start: z to log q(z), normalised: of the prior, or of what an encoder says.
        z: draws of q, ``[K, ..., D]``; with ``reverse`` of the posterior p(z | x).
        num_steps: T temperatures.
        leapfrog_steps: of each Hamiltonian proposal; flips have none.
        bits: whether z is of zeros and ones. The functions must have a slope in z there.
        scale: about the deviations of the posterior, broadcast with ``z``, in which Hamiltonian
            steps are measured; default: 1.
        step_size: ``[T, ...]``, of another run; default: a first run from ``z``, whose weights are
            not used, finds those that accept 65 %, of flips 57 %. Chains whose steps depend on
            their own past have no right weights: strictly, the other run must have had other draws
            of ``z`` too.
        reverse: go from the posterior to q.
        generator: of the noise; default: torch's own.

    Returns:
        ``(log_w, acceptance, step_size)``, without gradient. A proposal that is infinite or NaN is
        not accepted.

    Raises:
        RuntimeError: under ``torch.inference_mode``.
        TypeError: if ``z`` is not a floating-point tensor, or a function returns none.
        ValueError: if a number of steps is not positive, ``z`` is not ``[K, ..., D]``, or not of
            bits though ``bits`` says so, ``step_size`` does not begin with T, or a function does
            not return one number per row.

    Papers: Neal, "Annealed Importance Sampling", 2001; Grosse, Ghahramani & Adams, "Sandwiching the
    Marginal Likelihood Using Bidirectional Monte Carlo", 2015; Wu et al., "On the Quantitative
    Analysis of Decoder-Based Generative Models", ICLR 2017; of flips: Zhang, Liu & Liu, "A
    Langevin-like Sampler for Discrete Distributions", ICML 2022.

    >>> standard = fastvae.flows.StandardNormal(2).log_prob
    >>> x = torch.ones(3, 2)
    >>> def log_joint(z):  # x = z + noise: p(x) = N(0, 2 I)
    ...     return standard(z) + fastvae.gaussian_log_prob(x, z, torch.zeros(1))
    >>> log_w, _, _ = fastvae.annealed_importance_sampling(
    ...     log_joint, standard, torch.randn(16, 3, 2), num_steps=50
    ... )
    >>> fastvae.log_mean_exp(log_w.T.contiguous())  # doctest: +SKIP
    tensor([-3.0310, -3.0310, -3.0310])
    """
    check_floating(_NAME, "z", z)
    check_no_inference_mode(_NAME)
    if z.dim() < 2:
        raise ValueError(f"fastvae::{_NAME}: z must be [K, ..., D], got {list(z.shape)}")
    for name, value in (("num_steps", num_steps), ("leapfrog_steps", leapfrog_steps)):
        if value < 1:
            raise ValueError(f"fastvae::{_NAME}: {name} must be positive, got {value}")
    if step_size is not None and step_size.shape != (num_steps, *z.shape[1:-1]):
        raise ValueError(
            f"fastvae::{_NAME}: step_size must be {[num_steps, *z.shape[1:-1]]}, got "
            f"{list(step_size.shape)}"
        )
    chain: _Chain
    if bits:
        if bool(((z != 0) & (z != 1)).any()):
            raise ValueError(f"fastvae::{_NAME}: z must be 0 or 1 with bits, got other values")
        chain = _Flips(log_joint, log_start, generator)
    else:
        width = torch.ones(()).to(z) if scale is None else scale
        chain = _Hamiltonian(log_joint, log_start, generator, width, leapfrog_steps)
    z = z.detach()
    if step_size is None:
        step_size = chain.run(z, num_steps, None, reverse).step_size
    return chain.run(z, num_steps, step_size, reverse)


class _State(NamedTuple):
    """Of chains at z."""

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor
    slope_p: Tensor

    def log_f(self, beta: float) -> Tensor:
        return (1 - beta) * self.log_q + beta * self.log_p

    def slope(self, beta: float) -> Tensor:
        return (1 - beta) * self.slope_q + beta * self.slope_p


@dataclass
class _Chain(ABC):
    log_joint: LogProb
    log_start: LogProb
    generator: Generator | None

    target = 0.65  # of proposals accepted: Neal (2011), section 5.4.4.3
    largest = math.inf  # step

    @abstractmethod
    def propose(self, state: _State, beta: float, epsilon: Tensor) -> tuple[_State, Tensor]:
        """A move with steps ``epsilon``, and the logarithm of what it is to be accepted with."""

    def at(self, z: Tensor) -> _State:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            values = [
                rows_of(_NAME, name, f, z)
                for name, f in (("log_start", self.log_start), ("log_joint", self.log_joint))
            ]
            slopes = [torch.autograd.grad(v.sum(), z)[0] for v in values]
        return _State(z.detach(), values[0].detach(), values[1].detach(), slopes[0], slopes[1])

    @torch.no_grad()
    def run(
        self,
        z: Tensor,
        steps: int,
        step_size: Tensor | None,
        reverse: bool,
    ) -> AnnealedWeights:
        betas = _betas(steps, z).tolist()
        state = self.at(z)
        log_w, accepted = torch.zeros_like(state.log_q), torch.zeros_like(state.log_q)
        own = torch.full(z.shape[1:-1], 0.3, dtype=z.dtype, device=z.device)
        taken = []
        for t in range(steps, 0, -1) if reverse else range(1, steps + 1):
            rise = betas[t] - betas[t - 1]
            if not reverse:
                log_w += rise * (state.log_p - state.log_q)
            epsilon = own if step_size is None else step_size[t - 1]
            state, accept = self.move(state, betas[t], epsilon)
            if reverse:
                log_w += rise * (state.log_p - state.log_q)
            accepted += accept
            taken.append(epsilon)
            own = (own * torch.exp(0.2 * (accept.mean(0) - self.target))).clamp(max=self.largest)
        if reverse:
            taken.reverse()
        return AnnealedWeights(log_w, accepted.mean(0) / steps, torch.stack(taken))

    def move(self, state: _State, beta: float, epsilon: Tensor) -> tuple[_State, Tensor]:
        """A proposal, accepted or not, and which were."""
        new, log_ratio = self.propose(state, beta, epsilon)
        accept = torch.log(self.noise(torch.rand, wide(log_ratio))) < log_ratio  # false for NaN
        accept &= new.log_f(beta) < math.inf
        chosen = _State(
            *(
                torch.where(accept.reshape(*accept.shape, *[1] * (b.dim() - accept.dim())), b, a)
                for a, b in zip(state, new, strict=True)
            )
        )
        return chosen, accept.to(log_ratio.dtype)

    def noise(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        return draw(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)


@dataclass
class _Hamiltonian(_Chain):
    scale: Tensor
    leapfrogs: int

    def propose(self, state: _State, beta: float, epsilon: Tensor) -> tuple[_State, Tensor]:
        step = epsilon.unsqueeze(-1) * self.scale
        start = p = self.noise(torch.randn, state.z)
        new = state
        for _ in range(self.leapfrogs):
            p = p + 0.5 * step * new.slope(beta)
            new = self.at(new.z + step * p)
            p = p + 0.5 * step * new.slope(beta)
        kinetic = 0.5 * (start.square() - p.square()).sum(-1)
        return new, new.log_f(beta) - state.log_f(beta) + kinetic


@dataclass
class _Flips(_Chain):
    target = 0.574  # Zhang et al., as of Langevin steps
    largest = 3.0  # beyond, 1 / (2 epsilon) hardly says anything, and there would be no way back

    def propose(self, state: _State, beta: float, epsilon: Tensor) -> tuple[_State, Tensor]:
        def logits(at: _State) -> Tensor:
            return 0.5 * at.slope(beta) * (1 - 2 * at.z) - 0.5 / epsilon.unsqueeze(-1)

        there = logits(state)
        flips = bernoulli_sample(there, generator=self.generator)
        new = self.at((state.z - flips).abs())
        back = bernoulli_log_prob(flips, logits(new)) - bernoulli_log_prob(flips, there)
        return new, new.log_f(beta) - state.log_f(beta) + back
