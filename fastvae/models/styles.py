r"""A model of classes and styles, however its parts are learnt: as one of z alone, its classes
summed over, and what it draws (Kingma et al., 2014, figure 1).

.. math::
    q(z|x) = \sum_y q(y|x)\, q(z|x, y), \qquad p(x|z) = \frac{1}{C} \sum_y p(x|y, z)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from ..functional import log_mean_exp
from .base import LatentVector, Likelihood
from .posterior import Gaussian, Mixture, Posterior

__all__ = ["Styled"]


class Styled(LatentVector):
    """A model of x by a class y and a style z.

    Attributes:
        classes: C.
        style_dim: the size of a style.
        every: all classes, ``[C, 1]``.
        likelihood: of the features.
        classifier: logits of q(y | x), of features.
    """

    classes: int
    style_dim: int
    every: Tensor
    likelihood: Likelihood
    classifier: nn.Module

    @abstractmethod
    def likely_features(self, x: Tensor) -> Tensor:
        """Those of x that are classified."""

    @abstractmethod
    def infer(self, f: Tensor, y: Tensor) -> Gaussian:
        """q(z | x, y), of features ``[B, F]`` and classes ``[B]``, or ``[C, 1]`` for all."""

    @abstractmethod
    def decode(self, z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | y, z)."""

    # z alone

    def infer_all(self, f: Tensor) -> Mixture:
        """The sum over y of q(y | x) q(z | x, y)."""
        q = self.infer(f, self.every)
        return Mixture(q.mu, q.log_var, self.classifier(f).log_softmax(-1).mT)

    def decode_all(self, z: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | y, z) of every class, ``[C, ..., F]``."""
        return self.decode(z, self.every.reshape(-1, *[1] * (z.dim() - 1)))

    def posterior(self, x: Tensor) -> Posterior:
        return self.infer_all(x)

    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        def log_prob(z: Tensor) -> Tensor:
            each = self.likelihood.log_prob(x, *self.decode_all(z))
            return log_mean_exp(each.movedim(0, -1))

        return log_prob

    def mean_given(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(*self.decode_all(z)).mean(0)

    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        y = torch.randint(self.classes, z.shape[:-1], generator=generator, device=z.device)
        return self.likelihood.sample(*self.decode(z, y), generator=generator)

    # what is drawn

    @torch.no_grad()
    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean images of styles ``[..., L]`` and classes ``[...]``."""
        return self.likelihood.mean(*self.decode(z, y))

    @torch.no_grad()
    def infer_style(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of q(z | x, y), ``[B, L]``, at the likeliest y, ``[B]``."""
        f = self.likely_features(x)
        y = self.classifier(f).argmax(-1)
        return self.infer(f, y).mu, y

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

        Raises:
            ValueError: if z is of other dimensions, or there is no such class.
        """
        if self.style_dim != 2:
            raise ValueError(
                f"{type(self).__name__}: latent_dim must be 2 for styles, got {self.style_dim}"
            )
        if not 0 <= y < self.classes:
            raise ValueError(
                f"{type(self).__name__}: y must be a class, 0 to {self.classes - 1}, got {y}"
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
