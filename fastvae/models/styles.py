"""What a model of classes and styles draws: Kingma et al. (2014), figure 1."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Generator, Tensor

from .base import LatentVector

__all__ = ["Styled"]


class Styled(LatentVector):
    """A model of x by a class y and a style z.

    Attributes:
        classes: C.
        style_dim: the size of a style.
        every: all classes, ``[C, 1]``.
    """

    classes: int
    style_dim: int
    every: Tensor

    @abstractmethod
    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean images of styles ``[..., L]`` and classes ``[...]``."""

    @abstractmethod
    def infer_style(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of q(z | x, y), ``[B, L]``, at the likeliest y, ``[B]``."""

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Images of all classes by turns, ``[n, D]``."""
        y = torch.arange(n, device=self.every.device) % self.classes
        z = self.sample_prior(n, generator=generator)
        return self.generate(z[:, -self.style_dim :], y)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean image of the likeliest class and its style, ``[B, D]``."""
        return self.generate(*self.infer_style(x))

    @torch.no_grad()
    def analogies(self, x: Tensor) -> Tensor:
        """Each image, and its style in every class, ``[B, 1 + C, D]``."""
        z, _ = self.infer_style(x)
        made = self.generate(z.expand(self.classes, *z.shape), self.every.expand(-1, len(x)))
        return torch.cat([x.unsqueeze(1), made.movedim(0, 1)], 1)

    @torch.no_grad()
    def styles(self, y: int, side: int = 10) -> Tensor:
        """Images of a class over a grid of z, which must be of 2 dimensions, ``[side^2, D]``.

        At the quantiles of p(z), as in the paper.
        """
        if self.style_dim != 2:
            raise ValueError(
                f"{type(self).__name__}: latent_dim must be 2 for styles, got {self.style_dim}"
            )
        like = next(self.parameters())
        along = torch.linspace(0.05, 0.95, side, dtype=like.dtype, device=like.device)
        z = torch.cartesian_prod(*[torch.special.ndtri(along)] * 2)
        return self.generate(z, torch.full((len(z),), y, device=like.device))

    def panels(self, x: Tensor, generator: Generator | None = None) -> list[tuple[str, Tensor]]:
        """Samples, analogies, and, if z has 2 dimensions, styles; of rows as long as there are
        classes."""
        side = self.classes
        panels = [
            ("samples, a class a column", self.sample(len(x), generator=generator)),
            ("the first column's styles, in all classes", self.analogies(x[::side])[:, 1:]),
        ]
        if self.style_dim == 2:
            panels.append(("a class in all styles", self.styles(2 % side, side)))
        return [(caption, images.reshape(-1, x.shape[-1])) for caption, images in panels]
