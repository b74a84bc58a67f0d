r"""Four densities that a Gaussian cannot be, and flows fitted to them.

:math:`p(z) \propto e^{-U(z)}` in two dimensions, with the energies U1 to U4 of Rezende & Mohamed,
"Variational Inference with Normalizing Flows", ICML 2015, table 1. Three of them go on for ever
along z1: like the paper's figures, they end where :math:`|z| > 4`, here at a steep wall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .flows import ActNorm, Flow, Planar, StandardNormal, nsf

__all__ = ["ENERGIES", "FLOWS", "Fit", "divergence", "energy", "fit", "images", "log_density"]

EDGE = 4.0  # of the square where the densities live


def _valley(z1: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * z1)


def _bump(x: Tensor, center: float, width: float) -> Tensor:
    return -0.5 * ((x - center) / width).square()


def _either(a: Tensor, b: Tensor) -> Tensor:
    return -torch.logaddexp(a, b)


def _ring(z1: Tensor, z2: Tensor) -> Tensor:
    radius = torch.hypot(z1, z2)
    return -_bump(radius, 2.0, 0.4) + _either(_bump(z1, 2.0, 0.6), _bump(z1, -2.0, 0.6))


def _wave(z1: Tensor, z2: Tensor) -> Tensor:
    return -_bump(z2 - _valley(z1), 0.0, 0.4)


def _fork(z1: Tensor, z2: Tensor) -> Tensor:
    off = z2 - _valley(z1)
    away = 3.0 * torch.exp(_bump(z1, 1.0, 0.6))
    return _either(_bump(off, 0.0, 0.35), _bump(off + away, 0.0, 0.35))


def _split(z1: Tensor, z2: Tensor) -> Tensor:
    off = z2 - _valley(z1)
    away = 3.0 * torch.sigmoid((z1 - 1.0) / 0.3)
    return _either(_bump(off, 0.0, 0.4), _bump(off + away, 0.0, 0.35))


ENERGIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "U1": _ring,
    "U2": _wave,
    "U3": _fork,
    "U4": _split,
}


def energy(name: str, z: Tensor) -> Tensor:
    """U of ``z``, ``[..., 2]``, with the wall."""
    wall = (z.abs() - EDGE).clamp(min=0.0).square().sum(-1)
    return ENERGIES[name](z[..., 0], z[..., 1]) + 50.0 * wall


def _planar(length: int) -> Flow:
    return Flow(StandardNormal(2), [ActNorm(2), Planar(2, length)])


FLOWS: dict[str, Callable[[], Flow]] = {
    "planar, K = 2": lambda: _planar(2),
    "planar, K = 8": lambda: _planar(8),
    "planar, K = 32": lambda: _planar(32),
    "splines": lambda: Flow(
        StandardNormal(2), [*nsf(2, length=4, hidden=(64,), bins=12, bound=EDGE + 1.0).transforms]
    ),
}


def grid(points: int, edge: float = EDGE + 0.5) -> tuple[Tensor, float]:
    """Points of a square, ``[points, points, 2]``, from the top left, and the area of each."""
    line = torch.linspace(-edge, edge, points)
    z2, z1 = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([z1, z2], -1), float(line[1] - line[0]) ** 2


def log_density(name: str, z: Tensor) -> Tensor:
    """log p of ``z``, ``[..., 2]``, normalised by a sum over a fine grid."""
    points, area = grid(800)
    log_normaliser = torch.logsumexp(-energy(name, points).flatten(), 0) + math.log(area)
    return -energy(name, z) - log_normaliser


def images(name: str, flows: Sequence[Flow], points: int = 200) -> Tensor:
    """p, and q of each flow, over the square, ``[1 + flows, points * points]``: 1 is p's most."""
    z, _ = grid(points)
    with torch.no_grad():
        all_of_them = [log_density(name, z).exp(), *(flow.log_prob(z).exp() for flow in flows)]
    whole = torch.stack(all_of_them).flatten(1)
    return (whole / whole[0].max()).clamp(max=1.0)


def divergence(name: str, flow: Flow, samples: int = 20_000) -> float:
    """KL(q || p) of a flow in nats, by samples of it."""
    with torch.no_grad():
        x, log_q = flow.rsample_and_log_prob(samples)
        return float((log_q - log_density(name, x)).mean())


@dataclass(frozen=True)
class Fit:
    """A flow after its training, and how far it is from the density that it was fitted to."""

    flow: Flow
    divergence: float


def fit(
    name: str,
    make: Callable[[], Flow],
    steps: int = 3000,
    batch: int = 256,
    lr: float = 5e-3,
    seeds: Sequence[int] = (0, 1),
) -> Fit:
    r"""Minimises KL(q || p), of each seed anew, and keeps the nearest.

    The energy counts by 0.1 at first and by 1 from the middle on (the paper's annealing), lest q
    settles on the first mode that it meets.
    """
    fits = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = make()
            optimizer = torch.optim.Adam(flow.parameters(), lr)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                x, log_q = flow.rsample_and_log_prob(batch)
                warmth = min(1.0, 0.1 + 1.8 * step / steps)
                loss = (log_q + warmth * energy(name, x)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
            flow.eval()
            fits.append(Fit(flow, divergence(name, flow)))
    return min(fits, key=lambda one: (math.isnan(one.divergence), one.divergence))
