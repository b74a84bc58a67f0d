"""Flows that have names, as their papers put them together."""

from __future__ import annotations

from collections.abc import Sequence

from .autoregressive import AffineAutoregressive, SplineAutoregressive
from .coupling import AffineCoupling, Conditional, SplineCoupling
from .elementwise import ActNorm, BatchNorm, Permutation
from .flow import Flow, StandardNormal
from .image import Multiscale
from .linear import Linear
from .networks import conv_net, mlp
from .residual import Planar
from .transform import Transform

__all__ = ["glow_like", "iaf_posterior", "maf", "nsf", "planar_posterior", "realnvp"]


def planar_posterior(dim: int, context_dim: int, length: int = 16) -> Flow:
    r"""q(z | x) of a VAE: a diagonal Gaussian moved by planar steps, all of it made of a context.

    :math:`z_0 = \mu + e^s \epsilon`; linear layers make :math:`\mu, s` and each row's own steps of
    the context, the last hidden layer of an encoder.

    Args:
        dim: D of z.
        context_dim: C.
        length: K steps.

    Paper: Rezende & Mohamed, "Variational Inference with Normalizing Flows", ICML 2015.

    >>> posterior = fastvae.flows.planar_posterior(dim=2, context_dim=3, length=4)
    >>> z, log_q = posterior.rsample_and_log_prob(context=torch.randn(5, 3))
    >>> z.shape, log_q.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    steps = Planar(dim, length, context_dim=context_dim)
    return Flow(StandardNormal(dim), [Conditional(dim, context_dim), steps])


def iaf_posterior(
    dim: int, context_dim: int, length: int = 4, hidden: Sequence[int] = (64,)
) -> Flow:
    r"""q(z | x) of a VAE: a diagonal Gaussian moved by inverse autoregressive flows.

    :math:`z_0 = \mu + e^s \epsilon`, :math:`z_k = \sigma_k z_{k-1} + (1 - \sigma_k) m_k`, where
    networks see the columns before and the context, and the order turns round between them.

    Args:
        dim: D of z.
        context_dim: C.
        length: how many flows.
        hidden: widths of the networks' hidden layers.

    Paper: Kingma et al., "Improved variational inference with inverse autoregressive flow",
    NeurIPS 2016.

    >>> posterior = fastvae.flows.iaf_posterior(dim=2, context_dim=3)
    >>> z, log_q = posterior.rsample_and_log_prob(context=torch.randn(5, 3))
    >>> z.shape, log_q.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    transforms: list[Transform] = [Conditional(dim, context_dim)]
    for k in range(length):
        if k > 0:
            transforms.append(Permutation(dim))
        transforms.append(
            AffineAutoregressive(
                dim, "gated", given="noise", hidden=hidden, context_dim=context_dim
            )
        )
    return Flow(StandardNormal(dim), transforms)


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


def glow_like(
    shape: tuple[int, int, int],
    levels: int = 2,
    length: int = 4,
    hidden: Sequence[int] = (64, 64),
) -> Flow:
    """Glow: images by ActNorm, invertible 1x1 convolutions and couplings, at several scales.

    Densities are of pixels as they are given: dequantise them first, and count the change of units.

    Args:
        shape: ``(C, H, W)``, H and W multiples of 2 to the levels.
        levels: how many scales.
        length: how many steps at each.
        hidden: channels of the networks' hidden layers.

    Paper: Kingma & Dhariwal, "Glow", NeurIPS 2018. Convolutions begin as random permutations.

    >>> glow = fastvae.flows.glow_like((1, 8, 8), length=2, hidden=(8,))
    >>> glow.log_prob(torch.rand(5, 1, 8, 8)).shape, glow.sample(3).shape
    (torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """
    scales: list[list[Transform]] = []
    for channels in Multiscale.channels(shape, levels):
        scale: list[Transform] = []
        for _ in range(length):
            scale.append(AffineCoupling(channels, "sigmoid", conditioner=conv_net(hidden)))
            scale += [Permutation(channels, random=True), Linear(channels), ActNorm(channels)]
        scales.append(scale)
    channels, height, width = shape
    return Flow(StandardNormal(channels * height * width), [Multiscale(shape, scales)])


def maf(
    dim: int,
    length: int = 5,
    hidden: Sequence[int] = (64, 64),
    bins: int | None = None,
    bound: float = 3.0,
    batch_norm: bool = False,
    context_dim: int = 0,
) -> Flow:
    """A masked autoregressive flow, affine or of splines; the order turns round between layers.

    Args:
        dim: D.
        length: how many autoregressive layers.
        hidden: widths of the networks' hidden layers.
        bins: of splines; default: none, and the layers are affine.
        bound: of splines, see :func:`fastvae.rational_quadratic_spline`.
        batch_norm: a :class:`BatchNorm` after each layer, as the paper has it.
        context_dim: C of ``context``, of a conditional density; default: none.

    Paper: Papamakarios, Pavlakou & Murray, "Masked autoregressive flow for density estimation",
    NeurIPS 2017.

    >>> fastvae.flows.maf(3, length=2).log_prob(torch.randn(5, 3)).shape
    torch.Size([5])
    """
    transforms: list[Transform] = []
    for k in range(length):
        if k > 0:
            transforms.append(Permutation(dim))
        if bins is None:
            transforms.append(AffineAutoregressive(dim, hidden=hidden, context_dim=context_dim))
        else:
            transforms.append(
                SplineAutoregressive(dim, bins, bound, hidden=hidden, context_dim=context_dim)
            )
        if batch_norm:
            transforms.append(BatchNorm(dim))
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
