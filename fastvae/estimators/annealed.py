"""log p(x) by annealed importance sampling: many small steps from a known density to the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .evidence import LogProb, rows_of
from .surrogate import check_floating

__all__ = ["AnnealedWeights", "annealed_importance_sampling"]

_NAME = "annealed_importance_sampling"
_TARGET = 0.65  # of proposals accepted: Neal (2011), section 5.4.4.3


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
    scale: Tensor | None = None,
    step_size: Tensor | None = None,
    reverse: bool = False,
    generator: Generator | None = None,
) -> AnnealedWeights:
    r"""Importance weights of chains that are led from a start, whose density is known, to p(x, z).

    .. math::
        f_t(z) = q(z)^{1 - \beta_t}\, p(x, z)^{\beta_t}, \qquad
        \log w = \sum_{t=1}^T \log f_t(z_{t-1}) - \log f_{t-1}(z_{t-1}), \qquad
        z_t \sim \mathrm{HMC}_{f_t}(z_{t-1})

    :math:`E[w] = p(x)` whatever the chains do, so :math:`\log \frac1K \sum_k w_k` is a lower bound
    in expectation, and a much tighter one than that of importance sampling where q is not the
    posterior. Backwards, from a draw of the posterior, :math:`E[1/w] = 1/p(x)`, an upper bound: on
    data that the model made itself, where such a draw is at hand, the two enclose the truth.

    Args:
        log_joint: z of ``[K, ..., D]`` to log p(x, z), one number per row of z.
        log_start: z to log q(z), normalised: of the prior, or of what an encoder says.
        z: draws of q, ``[K, ..., D]``; with ``reverse`` of the posterior p(z | x).
        num_steps: T temperatures.
        leapfrog_steps: of each Hamiltonian proposal.
        scale: about the deviations of the posterior, broadcast with ``z``, in which steps are
            measured; default: 1.
        step_size: ``[T, ...]``, of another run; default: a first run from ``z``, whose weights are
            not used, finds those that accept 65 %. Chains whose steps depend on their own past have
            no right weights: strictly, the other run must have had other draws of ``z`` too.
        reverse: go from the posterior to q.
        generator: of the noise; default: torch's own.

    Returns:
        ``(log_w, acceptance, step_size)``, without gradient. A proposal that is infinite or NaN is
        not accepted.

    Raises:
        TypeError: if ``z`` is not a floating-point tensor, or a function returns none.
        ValueError: if a number of steps is not positive, ``z`` is not ``[K, ..., D]``,
            ``step_size`` does not begin with T, or a function does not return one number per row.

    Papers: Neal, "Annealed Importance Sampling", 2001; Grosse, Ghahramani & Adams, "Sandwiching the
    Marginal Likelihood Using Bidirectional Monte Carlo", 2015; Wu et al., "On the Quantitative
    Analysis of Decoder-Based Generative Models", ICLR 2017.

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
    chain = _Chain(log_joint, log_start, torch.ones(()).to(z) if scale is None else scale)
    z = z.detach()
    if step_size is None:
        step_size = chain.run(z, num_steps, leapfrog_steps, None, reverse, generator).step_size
    return chain.run(z, num_steps, leapfrog_steps, step_size, reverse, generator)


class _Chain(NamedTuple):
    log_joint: LogProb
    log_start: LogProb
    scale: Tensor

    def at(self, z: Tensor) -> tuple[Tensor, ...]:
        """log q(z), log p(x, z), and their gradients."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            values = [
                rows_of(_NAME, name, f, z)
                for name, f in (("log_start", self.log_start), ("log_joint", self.log_joint))
            ]
            slopes = [torch.autograd.grad(v.sum(), z)[0] for v in values]
        return values[0].detach(), values[1].detach(), slopes[0], slopes[1]

    @torch.no_grad()
    def run(
        self,
        z: Tensor,
        steps: int,
        leapfrogs: int,
        step_size: Tensor | None,
        reverse: bool,
        generator: Generator | None,
    ) -> AnnealedWeights:
        betas = _betas(steps, z).tolist()
        state = self.at(z)
        log_w, accepted = torch.zeros_like(state[0]), torch.zeros_like(state[0])
        own = torch.full(z.shape[1:-1], 0.3, dtype=z.dtype, device=z.device)
        taken = []
        for t in range(steps, 0, -1) if reverse else range(1, steps + 1):
            rise = betas[t] - betas[t - 1]
            if not reverse:
                log_w += rise * (state[1] - state[0])
            epsilon = own if step_size is None else step_size[t - 1]
            z, state, accept = self.move(z, state, betas[t], epsilon, leapfrogs, generator)
            if reverse:
                log_w += rise * (state[1] - state[0])
            accepted += accept
            taken.append(epsilon)
            own = own * torch.exp(0.2 * (accept.mean(0) - _TARGET))
        if reverse:
            taken.reverse()
        return AnnealedWeights(log_w, accepted.mean(0) / steps, torch.stack(taken))

    def move(
        self,
        z: Tensor,
        state: tuple[Tensor, ...],
        beta: float,
        epsilon: Tensor,
        leapfrogs: int,
        generator: Generator | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """One Hamiltonian proposal at temperature ``beta``, accepted or not."""

        def energy(state: tuple[Tensor, ...], p: Tensor) -> Tensor:
            return 0.5 * p.square().sum(-1) - (1 - beta) * state[0] - beta * state[1]

        def kick(state: tuple[Tensor, ...], step: Tensor) -> Tensor:
            return step * ((1 - beta) * state[2] + beta * state[3])

        step = epsilon.unsqueeze(-1) * self.scale
        p = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        before, new_z, new = energy(state, p), z, state
        for _ in range(leapfrogs):
            p = p + 0.5 * kick(new, step)
            new_z = new_z + step * p
            new = self.at(new_z)
            p = p + 0.5 * kick(new, step)
        u = torch.rand(before.shape, generator=generator, dtype=z.dtype, device=z.device)
        accept = torch.log(u) < before - energy(new, p)  # false for NaN
        chosen = [
            torch.where(accept.reshape(*accept.shape, *[1] * (b.dim() - accept.dim())), b, a)
            for a, b in zip((z, *state), (new_z, *new), strict=True)
        ]
        return chosen[0], tuple(chosen[1:]), accept.to(before.dtype)
