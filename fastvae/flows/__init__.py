"""Normalizing flows as modules: invertible transforms, and a density made of them.

A transform goes from noise to data: :meth:`~Transform.forward_and_log_det` makes x of z, and
:meth:`~Transform.inverse_and_log_det` z of x. :class:`Flow` joins a base density and transforms.
The kernels under them are functions of :mod:`fastvae.functional`, for use in modules of your own.
"""

from .coupling import AffineCoupling, Coupling, SplineCoupling, mlp
from .elementwise import ActNorm, Permutation
from .flow import Flow, StandardNormal
from .recipes import nsf, realnvp
from .residual import Planar, Radial
from .transform import Transform

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Coupling",
    "Flow",
    "Permutation",
    "Planar",
    "Radial",
    "SplineCoupling",
    "StandardNormal",
    "Transform",
    "mlp",
    "nsf",
    "realnvp",
]
