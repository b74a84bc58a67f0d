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
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from .. import random
from ..data import Dataset, balanced_labels
from ..estimators import Elbo
from ..estimators.evidence import standard_log_prob
from ..functional import categorical_kl
from .base import LIKELIHOODS, Batch, Model, check_option, configured
from .networks import ACTIVATIONS, LabelledPerceptron, mlp
from .posterior import Gaussian
from .styles import Styled

__all__ = ["M2"]


class M2(Styled):
    """A VAE of images whose classes are known of a few.

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
        prune: in a step of training, classes of less than this q(y|x) are left out of U(x). That is
            the bound of the q that has none there, and a step costs what the others do.

    >>> model = fastvae.models.M2(12, dataset_size=100, num_labels=20, hidden=(8,), latent_dim=2)
    >>> model.elbo(torch.rand(5, 12)).elbo.shape, model.classify(torch.rand(5, 12)).shape
    (torch.Size([5]), torch.Size([5, 10]))
    """

    of_data = (*Model.of_data, "dataset_size")
    rows: Tensor
    y: Tensor

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
        prune: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_option(name, "likelihood", likelihood, LIKELIHOODS)
        check_option(name, "activation", activation, ACTIVATIONS)
        numbers = data_dim, dataset_size, num_labels, classes, latent_dim, labelled_batch, *hidden
        if min(numbers) < 1 or not hidden or not alpha >= 0.0:
            raise ValueError(
                f"{name}: sizes must be positive, and alpha not negative, got {list(numbers)}, "
                f"{alpha}"
            )
        if num_labels % classes or num_labels > dataset_size:
            raise ValueError(
                f"{name}: num_labels must be as many of each class, and at most dataset_size, got "
                f"{num_labels}, {classes} and {dataset_size}"
            )
        if not 0.0 <= prune * classes < 1.0:  # so that one class is always left
            raise ValueError(f"{name}: prune must be in [0, 1 / {classes}), got {prune}")
        self.latent_dim = self.style_dim = latent_dim
        self.classes, self.likelihood = classes, LIKELIHOODS[likelihood]
        self.alpha, self.labelled_batch, self.dataset_size = alpha, labelled_batch, dataset_size
        self.prune = prune
        none = torch.full((num_labels,), -1)
        self.register_buffer("rows", none)  # of the training set, which have a label
        self.register_buffer("y", none.clone())
        self.register_buffer("every", torch.arange(classes).unsqueeze(-1), persistent=False)
        self.classifier = mlp([data_dim, *hidden, classes], activation)
        self.encoder = LabelledPerceptron(data_dim, classes, hidden, 2 * latent_dim, activation)
        outputs = self.likelihood.heads * data_dim
        self.decoder = LabelledPerceptron(latent_dim, classes, hidden[::-1], outputs, activation)

    def prepare(self, data: Dataset, generator: Generator) -> None:
        """Draws the images that have a label, as many of each class."""
        rows, y = balanced_labels(data, len(self.y), generator=generator)
        if int(y.max()) >= self.classes:
            raise ValueError(
                f"{type(self).__name__}: classes must be those of {data.name}, got {self.classes} "
                f"and labels up to {int(y.max())}"
            )
        self.rows.copy_(rows)
        self.y.copy_(y)

    def features(self, x: Tensor, rows: Tensor, *, key: Tensor) -> Tensor:
        """What the classes and styles are of ``rows`` of the training images, which are x: x."""
        return x

    def likely_features(self, x: Tensor) -> Tensor:
        """Those that are classified: x."""
        return x

    def infer(self, f: Tensor, y: Tensor, rows: Tensor | None = None) -> Gaussian:
        """q(z | x, y), of features ``[B, F]`` and classes ``[B]``, or ``[C, 1]`` for all.

        Or ``[N]``, of the features of ``rows``.
        """
        return Gaussian(*self.encoder(f, y, rows).chunk(2, -1))

    def decode(self, z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The parameters of p(x | y, z)."""
        return self.likelihood.link(*self.decoder(z, y).chunk(self.likelihood.heads, -1))

    def class_bound(self, f: Tensor, y: Tensor, rows: Tensor | None = None, *, key: Tensor) -> Elbo:
        """Of log p(x, y) - log p(y), for each class of ``y``, as of :meth:`infer`."""
        z, kl = self.infer(f, y, rows).draw_kl(None, key=key)
        recon = self.likelihood.log_prob(f if rows is None else f[rows], *self.decode(z, y))
        return Elbo(recon - kl, recon, kl)

    def unlabelled(self, f: Tensor, *, key: Tensor, prune: float = 0.0) -> Elbo:
        """U(x): the bound summed over the classes by q(y | x), ``[B]``."""
        logits = self.classifier(f)
        if prune:
            likely = logits.softmax(-1) >= prune
            logits = logits.masked_fill(~likely, -torch.inf)
            rows, y = some = likely.nonzero(as_tuple=True)
            terms = self.class_bound(f, y, rows, key=key)[1:]
            each = [t.new_zeros(likely.shape).index_put(some, t) for t in terms]
        else:
            each = [t.mT for t in self.class_bound(f, self.every, key=key)[1:]]
        q = logits.softmax(-1)
        recon, kl = ((q * t).sum(-1) for t in each)
        kl = kl + categorical_kl(logits)
        return Elbo(recon - kl, recon, kl)

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """A bound of log p(x), the class unknown, ``[B]``."""
        return self.unlabelled(x, key=random.from_generator(generator, x.device))

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        r"""J / N, of a minibatch of all images, as if without labels, and one of those with them.

        ``[B]``.

        Raises:
            RuntimeError: before :meth:`prepare`, which draws the images that have a label.
        """
        assert batch.images is not None
        device = batch.x.device
        keys = [random.from_generator(generator, device) for _ in range(4)]
        size = (self.labelled_batch,)
        pick = torch.randint(len(self.y), size, generator=generator, device=device)
        y, rows = self.y[pick], self.rows[pick]
        name = type(self).__name__
        torch._assert_async((y >= 0).all(), f"{name}: prepare must come before the objective")
        f = self.features(batch.x, batch.rows, key=keys[0])
        known = self.features(batch.images(rows), rows, key=keys[1])
        other = self.unlabelled(f, key=keys[2], prune=self.prune).weighted(kl_weight)
        bound = self.class_bound(known, y, key=keys[3]).weighted(kl_weight)
        log_q = self.classifier(known).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
        share = len(self.y) / self.dataset_size
        known_elbo = bound.elbo.mean() - math.log(self.classes)
        value = (1.0 - share) * other.elbo + share * known_elbo + self.alpha * log_q
        return Elbo(value, other.recon, other.kl)

    def classify(self, x: Tensor) -> Tensor:
        """Logits of q(y | x), ``[B, C]``."""
        return self.classifier(self.likely_features(x))

    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        """log p(x, y, z) - log q(z | x, y) + log C of ``num_samples`` for every class."""
        for _ in range(num_samples):
            yield self._class_weights(x, key=random.from_generator(generator, x.device))

    def _class_weights(self, f: Tensor, *, key: Tensor) -> Tensor:
        z, log_q = self.infer(f, self.every).draw(key=key)
        log_p = self.likelihood.log_prob(f, *self.decode(z, self.every))
        return log_p + standard_log_prob(z) - log_q
