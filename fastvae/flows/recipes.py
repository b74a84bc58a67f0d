"""Flows that have names, as their papers put them together."""

from __future__ import annotations

from collections.abc import Sequence

from .coupling import AffineCoupling, SplineCoupling, mlp
from .elementwise import ActNorm, Permutation
from .flow import Flow, StandardNormal
from .transform import Transform

__all__ = ["nsf", "realnvp"]


def realnvp(
    dim: int, length: int = 8, hidden: Sequence[int] = (64, 64), context_dim: int = 0
) -> Flow:
    """RealNVP for rows: affine couplings of alternating halves, each after an ActNorm.

    Args:
        dim: D.
        length: how many couplings.
        hidden: widths of the networks' hidden layers.
        context_dim: C of ``context``, of a conditional density; default: none.

    Paper: Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real NVP", ICLR 2017.

    >>> fastvae.flows.realnvp(3, length=2).log_prob(torch.randn(5, 3)).shape
    torch.Size([5])
    """
    transforms: list[Transform] = []
    for k in range(length):
        transforms.append(
            AffineCoupling(dim, flip=k % 2 == 1, context_dim=context_dim, conditioner=mlp(hidden))
        )
        transforms.append(ActNorm(dim))
    return Flow(StandardNormal(dim), transforms)


def nsf(
    dim: int,
    length: int = 4,
    hidden: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 3.0,
    context_dim: int = 0,
) -> Flow:
    """A neural spline flow: spline couplings, the columns shuffled between them.

    Args:
        dim: D.
        length: how many couplings.
        hidden: widths of the networks' hidden layers.
        bins, bound: of the splines, see :func:`fastvae.rational_quadratic_spline`.
        context_dim: C of ``context``, of a conditional density; default: none.

    Paper: Durkan, Bekasov, Murray & Papamakarios, "Neural Spline Flows", NeurIPS 2019.

    >>> fastvae.flows.nsf(3, length=2).log_prob(torch.randn(5, 3)).shape
    torch.Size([5])
    """
    transforms: list[Transform] = []
    for k in range(length):
        if k > 0:
            transforms.append(Permutation(dim, random=dim > 2))
        transforms.append(
            SplineCoupling(dim, bins, bound, context_dim=context_dim, conditioner=mlp(hidden))
        )
    return Flow(StandardNormal(dim), transforms)
