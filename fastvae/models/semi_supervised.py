r"""Classes of which few are known: Kingma et al., "Semi-Supervised Learning with Deep Generative
Models", NeurIPS 2014.

M2 generates x of a class y and a style z; q(y|x) is the classifier:

.. math::
    p(y) = 1/C, \quad p(z) = N(0, I), \quad p(x|y, z); \qquad
    q(y|x) = \mathrm{softmax}, \quad q(z|x, y) = N(\mu, \sigma^2)

.. math::
    \mathcal L(x, y) = E_q[\log p(x|y, z)] + \log p(y) - \mathrm{KL}(q(z|x, y) \,\|\, p(z)), \qquad
    \mathcal U(x) = \sum_y q(y|x)\, \mathcal L(x, y) + H[q(y|x)]

.. math::
    \mathcal J = \sum_{\text{labelled}} \mathcal L(x, y) + \sum_{\text{others}} \mathcal U(x)
    + 0.1 N\, E_{\text{labelled}}[\log q(y|x)]

M1+M2 is M2 of what the encoder of a VAE, M1, says of x: a sample of q(z_1 | x), drawn anew each
time, with a Gaussian p(z_1 | y, z_2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .. import random
from ..data import Dataset, balanced_labels
from ..estimators import Elbo, streaming_log_mean_exp
from ..estimators.evidence import standard_log_prob
from ..functional import categorical_kl, gaussian_log_prob, reparameterize
from .base import LIKELIHOODS, Batch, Likelihood, Model, check_option, configured
from .networks import ACTIVATIONS, mlp
from .posterior import Gaussian
from .vae import VAE

__all__ = ["M2"]

# of latents, which have no bounds
_FEATURES = Likelihood(
    2, lambda mu, log_var: (mu, log_var), gaussian_log_prob, lambda mu, _: mu, reparameterize
)


class _OfClass(nn.Module):
    """A perceptron of ``(x, y)`` whose first layer adds a row of the class to a product with x.

    So for all classes, y of ``[C, 1]`` and x of ``[B, D]``, the product is computed once, and the
    rest for ``[C, B]``.
    """

    def __init__(
        self, inputs: int, classes: int, hidden: Sequence[int], outputs: int, activation: str
    ) -> None:
        super().__init__()
        make = ACTIVATIONS[activation]
        width = make.inputs * hidden[0]
        self.of_x = nn.Linear(inputs, width)
        self.of_y = nn.Embedding(classes, width)
        self.rest = nn.Sequential(make.make(), *mlp([*hidden, outputs], activation))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rest(self.of_x(x) + self.of_y(y))


class M2(Model):
    """A VAE of images, or of another VAE's latents, whose classes are known of a few.

    Args:
        data_dim: D.
        dataset_size: N, the training images.
        num_labels: how many of them have a label, as many of each class.
        classes: C.
        latent_dim: of z.
        hidden: of all networks.
        likelihood: of x.
        activation: of all networks.
        alpha: 0.1 above, of how much the classifier's own likelihood counts.
        labelled_batch: labelled images a step, drawn at random, beside the unlabelled ones.
        base: M1: the config of a VAE, whose encoder this is a model of. Its weights are not learnt
            here.

    >>> model = fastvae.models.M2(12, dataset_size=100, num_labels=20, hidden=(8,), latent_dim=2)
    >>> model.elbo(torch.rand(5, 12)).elbo.shape, model.classify(torch.rand(5, 12)).shape
    (torch.Size([5]), torch.Size([5, 10]))
    """

    of_data = (*Model.of_data, "dataset_size")
    rows: Tensor
    y: Tensor
    every: Tensor

    @configured
    def __init__(
        self,
        data_dim: int,
        dataset_size: int,
        num_labels: int = 100,
        classes: int = 10,
        latent_dim: int = 50,
        hidden: Sequence[int] = (500,),
        likelihood: str = "bernoulli",
        activation: str = "softplus",
        alpha: float = 0.1,
        labelled_batch: int = 100,
        base: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_option("M2", "likelihood", likelihood, LIKELIHOODS)
        check_option("M2", "activation", activation, ACTIVATIONS)
        numbers = data_dim, dataset_size, num_labels, classes, latent_dim, labelled_batch, *hidden
        if min(numbers) < 1 or not hidden or not alpha >= 0.0:
            raise ValueError(
                f"M2: sizes must be positive, and alpha not negative, got {list(numbers)}, {alpha}"
            )
        if num_labels % classes or num_labels > dataset_size:
            raise ValueError(
                "M2: num_labels must be as many of each class, and at most dataset_size, got "
                f"{num_labels}, {classes} and {dataset_size}"
            )
        self.latent_dim, self.classes = latent_dim, classes
        self.alpha, self.labelled_batch, self.dataset_size = alpha, labelled_batch, dataset_size
        none = torch.zeros(num_labels, dtype=torch.int64)
        self.register_buffer("rows", none)  # of the training set, which have a label
        self.register_buffer("y", none.clone())
        self.register_buffer("every", torch.arange(classes).unsqueeze(-1), persistent=False)
        self.base: VAE | None = None
        features, self.likelihood = data_dim, LIKELIHOODS[likelihood]
        if base is not None:
            self.base = VAE(**base).requires_grad_(False)
            features, self.likelihood = self.base.latent_dim, _FEATURES
        sizes = hidden, 2 * latent_dim, activation
        self.classifier = mlp([features, *hidden, classes], activation)
        self.encoder = _OfClass(features, classes, *sizes)
        outputs = self.likelihood.heads * features
        self.decoder = _OfClass(latent_dim, classes, hidden[::-1], outputs, activation)

    def prepare(self, data: Dataset, generator: Generator) -> None:
        """Draws the images that have a label, as many of each class."""
        rows, y = balanced_labels(data, len(self.y), generator=generator)
        self.rows.copy_(rows)
        self.y.copy_(y)

    def features(self, x: Tensor, *, key: Tensor) -> tuple[Tensor, Tensor]:
        """What M2 is a model of: x, or z_1 of M1; and log p(x | z_1) - log q(z_1 | x), ``[B]``."""
        if self.base is None:
            return x, x.new_zeros(x.shape[:-1])
        z, log_q = self.base.posterior(x).draw(key=key)
        return z, self.base.log_p_x_given(x)(z) - log_q

    def infer(self, f: Tensor, y: Tensor) -> Gaussian:
        """q(z | x, y), of features ``[B, F]`` and classes ``[B]``, or ``[C, 1]`` for all."""
        return Gaussian(*self.encoder(f, y).chunk(2, -1))

    def decode(self, z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | y, z)."""
        return self.likelihood.link(*self.decoder(z, y).chunk(self.likelihood.heads, -1))

    def bound(self, f: Tensor, y: Tensor, *, key: Tensor) -> Elbo:
        """Of log p(x, y) - log p(y), for each class of ``y``: ``[B]``, or ``[C, B]``."""
        z, kl = self.infer(f, y).draw_kl(None, key=key)
        recon = self.likelihood.log_prob(f, *self.decode(z, y))
        return Elbo(recon - kl, recon, kl)

    def unlabelled(self, f: Tensor, *, key: Tensor) -> Elbo:
        """U(x): the bound summed over all classes by q(y | x), ``[B]``."""
        logits = self.classifier(f)
        _, recon, kl = self.bound(f, self.every, key=key)
        q = logits.softmax(-1).mT
        recon, kl = (q * recon).sum(0), (q * kl).sum(0) + categorical_kl(logits)
        return Elbo(recon - kl, recon, kl)

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """A bound of log p(x), the class unknown, ``[B]``."""
        key = random.from_generator(generator, x.device)
        f, log_ratio = self.features(x, key=random.fold_in(key, 0))
        _, recon, kl = self.unlabelled(f, key=key)
        if self.base is None:
            return Elbo(recon - kl, recon, kl)
        own = self.base.log_p_x_given(x)(f)
        return Elbo(recon - kl + log_ratio, own, own - (recon - kl + log_ratio))

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        r"""J / N, of a minibatch of images without labels and one of those with them, ``[B]``."""
        assert batch.images is not None
        device = batch.x.device
        keys = [random.from_generator(generator, device) for _ in range(4)]
        size = (self.labelled_batch,)
        pick = torch.randint(len(self.y), size, generator=generator, device=device)
        y, labelled = self.y[pick], batch.images(self.rows[pick])
        f, _ = self.features(batch.x, key=keys[0])
        known, _ = self.features(labelled, key=keys[1])
        _, recon, kl = self.unlabelled(f, key=keys[2])
        _, recon_known, kl_known = self.bound(known, y, key=keys[3])
        log_q = self.classifier(known).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
        share = len(self.y) / self.dataset_size
        value = (1.0 - share) * (recon - kl_weight * kl)
        value = value + share * (recon_known - kl_weight * kl_known).mean() + self.alpha * log_q
        return Elbo(value, recon, kl)

    def classify(self, x: Tensor) -> Tensor:
        """Logits of q(y | x), ``[B, C]``; of M1's mean."""
        return self.classifier(x if self.base is None else self.base.posterior(x).mean)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 128,
        chunk: int = 16,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Importance-sampled log p(x), in nats, ``[B]``: ``num_samples`` of z for every class."""

        def log_weights() -> Iterator[Tensor]:
            for _ in range(num_samples):
                one, two = (random.from_generator(generator, x.device) for _ in range(2))
                f, log_ratio = self.features(x, key=one)
                z, log_q = self.infer(f, self.every).draw(key=two)
                log_p = self.likelihood.log_prob(f, *self.decode(z, self.every))
                yield log_p + standard_log_prob(z) - log_q + log_ratio  # [C, B], of 1/C each

        return streaming_log_mean_exp(log_weights())

    @torch.no_grad()
    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean images of styles ``[..., L]`` and classes ``[...]``."""
        made = self.likelihood.mean(*self.decode(z, y))
        return made if self.base is None else self.base.likelihood.mean(*self.base.decode(made))

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Images of all classes by turns, ``[n, D]``."""
        y = torch.arange(n, device=self.every.device) % self.classes
        return self.generate(self.sample_prior(n, generator=generator), y)

    def _style(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = x if self.base is None else self.base.posterior(x).mean
        y = self.classifier(f).argmax(-1)
        return self.infer(f, y).mu, y

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean image of the likeliest class and the mean of q(z | x, y), ``[B, D]``."""
        return self.generate(*self._style(x))

    @torch.no_grad()
    def analogies(self, x: Tensor) -> Tensor:
        """Each image, and its style in every class, ``[B, 1 + C, D]``."""
        z, _ = self._style(x)
        made = self.generate(z.expand(self.classes, *z.shape), self.every.expand(-1, len(x)))
        return torch.cat([x.unsqueeze(1), made.movedim(0, 1)], 1)

    def panels(self, x: Tensor, generator: Generator | None = None) -> list[tuple[str, Tensor]]:
        """Samples, analogies, and, if z has 2 dimensions, styles; of rows as long as there are
        classes."""
        side = self.classes
        panels = [
            ("samples, a class a column", self.sample(len(x), generator=generator)),
            ("the first column's styles, in all classes", self.analogies(x[::side])[:, 1:]),
        ]
        if self.latent_dim == 2:
            panels.append(("a class in all styles", self.styles(2 % side, side)))
        return [(caption, images.reshape(-1, x.shape[-1])) for caption, images in panels]

    @torch.no_grad()
    def styles(self, y: int, side: int = 10) -> Tensor:
        """Images of a class over a grid of z, which must be of 2 dimensions, ``[side^2, D]``.

        At the quantiles of p(z), as in the paper's figure 1.
        """
        if self.latent_dim != 2:
            raise ValueError(f"M2: latent_dim must be 2 for styles, got {self.latent_dim}")
        like = next(self.parameters())
        along = torch.linspace(0.05, 0.95, side, dtype=like.dtype, device=like.device)
        z = torch.cartesian_prod(*[torch.special.ndtri(along)] * 2)
        return self.generate(z, torch.full((len(z),), y, device=like.device))
