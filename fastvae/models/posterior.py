r"""Posteriors beyond the diagonal Gaussian: samples of one, moved by a normalizing flow.

.. math::
    z_0 \sim N(\mu(x), \mathrm{diag}\,\sigma^2(x)), \quad z = f_x(z_0), \qquad
    \log q(z|x) = \log q_0(z_0|x) - \log\Big|\det \frac{\partial f_x}{\partial z_0}\Big|

The encoder gives the flow's parameters too: they are each row's own (Rezende & Mohamed,
"Variational Inference with Normalizing Flows", ICML 2015, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import planar_flow, radial_flow

__all__ = ["FLOWS", "FlowFamily"]


class FlowFamily(NamedTuple):
    """A stack of steps whose parameters are made of an encoder's outputs."""

    flow: Callable[..., tuple[Tensor, Tensor]]  # (z, *parameters) -> z, log_det
    vectors: int  # of a step, each of the size of z
    numbers: int
    identity: Callable[[int, int], Tensor]  # (steps, size of z) -> the outputs that move nothing

    def outputs(self, latent_dim: int) -> int:
        """How many of the encoder's outputs a step takes."""
        return self.vectors * latent_dim + self.numbers

    def __call__(self, z: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """``(z, log_det)`` of ``z``, ``[..., L]``, and ``steps``, ``[..., K, outputs]``."""
        size = z.shape[-1]
        vectors = steps[..., : self.vectors * size].split(size, dim=-1)
        numbers = steps[..., self.vectors * size :].unbind(-1)
        return self.flow(z, *vectors, *numbers)


def _planar_identity(steps: int, size: int) -> Tensor:
    """Each along a direction of its own, w; u is what the constraint takes away again."""
    w = torch.nn.functional.normalize(torch.randn(steps, size), dim=-1)
    return torch.cat([math.log(math.e - 1.0) * w, w, torch.zeros(steps, 1)], -1)


def _radial_identity(steps: int, size: int) -> Tensor:
    return torch.zeros(steps, size + 2)


FLOWS = {
    "planar": FlowFamily(planar_flow, 2, 1, _planar_identity),
    "radial": FlowFamily(radial_flow, 1, 2, _radial_identity),
}
