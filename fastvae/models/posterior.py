r"""Posteriors beyond the diagonal Gaussian: samples of one, moved by transforms given a context.

.. math::
    z_0 \sim N(\mu(x), \mathrm{diag}\,\sigma^2(x)), \quad z = f_h(z_0), \qquad
    \log q(z|x) = \log q_0(z_0|x) - \log\Big|\det \frac{\partial f_h}{\partial z_0}\Big|

The context h is the last hidden layer of the encoder, of which each transform makes its parameters
(Rezende & Mohamed, "Variational Inference with Normalizing Flows", ICML 2015, section 4.2; Kingma
et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .. import flows

__all__ = ["POSTERIORS", "Posterior"]


class Posterior(NamedTuple):
    """What makes transforms that a context conditions, and their length if nobody says."""

    make: Callable[[int, int, int], list[flows.Transform]]  # of dim, length, context_dim
    length: int


def _iaf(dim: int, length: int, context_dim: int) -> list[flows.Transform]:
    return list(flows.iaf_posterior(dim, context_dim, length).transforms)[1:]  # type: ignore[return-value]


def _couplings(coupling: Callable[..., flows.Coupling]) -> Callable[..., list[flows.Transform]]:
    return lambda dim, length, context_dim: [
        coupling(dim, flip=k % 2 == 1, context_dim=context_dim) for k in range(length)
    ]


POSTERIORS = {
    "planar": Posterior(lambda d, k, c: [flows.Planar(d, k, c)], 16),
    "radial": Posterior(lambda d, k, c: [flows.Radial(d, k, c)], 16),
    "householder": Posterior(lambda d, k, c: [flows.Householder(d, k, c)], 4),
    "sylvester": Posterior(lambda d, k, c: [flows.Sylvester(d, k, min(d, 16), context_dim=c)], 4),
    "iaf": Posterior(_iaf, 4),
    "realnvp": Posterior(_couplings(flows.AffineCoupling), 4),
    "nsf": Posterior(_couplings(partial(flows.SplineCoupling, bound=5.0)), 2),
}
