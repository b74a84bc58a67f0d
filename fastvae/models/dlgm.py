r"""Deep latent Gaussian models: Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and
Approximate Inference in Deep Generative Models", ICML 2014.

.. math::
    \xi_l \sim N(0, I), \qquad h_L = G_L \xi_L, \qquad h_l = T_l(h_{l+1}) + G_l \xi_l, \qquad
    x \sim p(x \mid T_0(h_1))

All randomness is in z = (xi_1, ..., xi_L), so this is a VAE whose decoder has noise at every layer,
and q(z | x), of whichever kind, is over all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import configured
from .networks import mlp
from .vae import VAE

__all__ = ["DLGM"]


class _Decoder(nn.Module):
    def __init__(
        self, layers: int, dim: int, hidden: Sequence[int], outputs: int, activation: str
    ) -> None:
        super().__init__()
        self.dim = dim
        self.noise = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))  # G
        between = [mlp([dim, *hidden, dim], activation) for _ in range(layers - 1)]
        self.maps = nn.ModuleList([mlp([dim, *hidden, outputs], activation), *between])  # T

    def forward(self, z: Tensor) -> Tensor:
        xi = z.split(self.dim, -1)
        h = self.noise[-1](xi[-1])
        for layer in reversed(range(len(xi) - 1)):
            h = self.maps[layer + 1](h) + self.noise[layer](xi[layer])
        return self.maps[0](h)


class DLGM(VAE):
    """A VAE with Gaussian noise at each of L layers.

    Args:
        layers: L.
        latent_dim: of the noise of one layer; z has L times as much.
        hidden: of the encoder, and, in reverse, of each T_l.
        others: of :class:`VAE`.

    >>> model = fastvae.models.DLGM(784, layers=2, latent_dim=20)
    >>> model.elbo(torch.rand(16, 784)).elbo.shape
    torch.Size([16])
    """

    @configured
    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        layers: int = 2,
        **others: Any,
    ) -> None:
        if layers < 1:
            raise ValueError(f"DLGM: layers must be positive, got {layers}")
        self.layers = layers
        super().__init__(data_dim, layers * latent_dim, hidden, **others)

    def make_decoder(self, hidden: Sequence[int], activation: str) -> nn.Module:
        outputs = self.likelihood.heads * self.config["data_dim"]
        dim = self.latent_dim // self.layers
        return _Decoder(self.layers, dim, list(reversed(hidden)), outputs, activation)
