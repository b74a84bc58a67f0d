"""Normalizing flows as modules: invertible transforms, and a density made of them.

A transform goes from noise to data: :meth:`~Transform.forward_and_log_det` makes x of z, and
:meth:`~Transform.inverse_and_log_det` z of x. :class:`Flow` joins a base density and transforms.
The kernels under them are functions of :mod:`fastvae.functional`, for use in modules of your own.
"""

from .autoregressive import MADE, AffineAutoregressive, Autoregressive, SplineAutoregressive
from .coupling import AffineCoupling, Conditional, Coupling, SplineCoupling
from .element import Affine, Element, Spline
from .elementwise import ActNorm, BatchNorm, Permutation
from .flow import Flow, StandardNormal
from .image import Multiscale
from .linear import Linear
from .networks import conv_net, mlp
from .recipes import glow_like, iaf_posterior, maf, nsf, planar_posterior, realnvp
from .residual import Householder, Planar, Radial, Sylvester
from .transform import Transform

__all__ = [
    "MADE",
    "ActNorm",
    "Affine",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "BatchNorm",
    "Conditional",
    "Coupling",
    "Element",
    "Flow",
    "Householder",
    "Linear",
    "Multiscale",
    "Permutation",
    "Planar",
    "Radial",
    "Spline",
    "SplineAutoregressive",
    "SplineCoupling",
    "StandardNormal",
    "Sylvester",
    "Transform",
    "conv_net",
    "glow_like",
    "iaf_posterior",
    "maf",
    "mlp",
    "nsf",
    "planar_posterior",
    "realnvp",
]
