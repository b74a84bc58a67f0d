"""What a trained model is worth, beyond its bound: how much of log p(x) it loses, and where.

Of any :class:`fastvae.models.LatentVector`, of reals or of bits, and images ``[B, D]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from . import random
from .data import Dataset, balanced_labels
from .estimators import (
    AnnealedWeights,
    annealed_importance_sampling,
    streaming_log_mean_exp,
)
from .estimators.evidence import standard_log_prob
from .extras import require
from .functional import log_mean_exp
from .models import LatentVector
from .models.base import check_positive
from .models.local import refine
from .models.posterior import Dense, Gaussian, LogProb

__all__ = [
    "Bracket",
    "InferenceGaps",
    "active_units",
    "annealed_log_likelihood",
    "bidirectional",
    "calibration",
    "few_label_error",
    "inference_gaps",
    "posterior_means",
    "traversals",
]


Array = npt.NDArray[Any]
CLASSIFIERS = ("linear", "svm", "spread")


class InferenceGaps(NamedTuple):
    """Mean nats per image: what q loses of log p(x), and why."""

    amortized: float  # the bound of what the encoder says
    local: float  # the bound of the best Gaussian of each image's own
    log_px: float  # importance-sampled, with the latter for a proposal

    @property
    def amortization_gap(self) -> float:
        """What is lost as one network infers all images."""
        return self.local - self.amortized

    @property
    def family_gap(self) -> float:
        """What is lost as q is a diagonal Gaussian; log p(x) is estimated from below."""
        return self.log_px - self.local

    def __str__(self) -> str:
        return (
            f"amortised bound      {self.amortized:9.2f} nats\n"
            f"each image's own     {self.local:9.2f} nats   "
            f"amortisation gap {self.amortization_gap:.2f}\n"
            f"log-likelihood       {self.log_px:9.2f} nats   family gap {self.family_gap:.2f}"
        )


@torch.no_grad()
def inference_gaps(
    model: LatentVector,
    x: Tensor,
    steps: int = 100,
    num_samples: int = 1000,
    *,
    generator: Generator | None = None,
) -> InferenceGaps:
    r"""Divides what the bound of a VAE with a Gaussian posterior loses.

    .. math::
        \log p(x) - \mathcal L(q_{\mathrm{encoder}})
        = \underbrace{\log p(x) - \mathcal L(q^*)}_{\text{of the family}}
        + \underbrace{\mathcal L(q^*) - \mathcal L(q_{\mathrm{encoder}})}_{\text{of amortisation}}

    Args:
        x: images, ``[B, D]``.
        steps: of :func:`fastvae.models.local.refine`, from the encoder's q.
        num_samples: for both bounds and for log p(x).

    Raises:
        ValueError: if the posterior is none that :func:`refine` can take, or ``num_samples`` is not
            positive.

    Paper: Cremer, Li & Duvenaud, "Inference Suboptimality in Variational Autoencoders", ICML 2018.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12).bernoulli()
    >>> gaps = fastvae.evaluation.inference_gaps(model, x, steps=5, num_samples=10)
    >>> gaps.amortization_gap > 0
    True
    """
    check_positive("inference_gaps", num_samples=num_samples)
    q = model.posterior(x)
    if not isinstance(q, Gaussian):
        kind = model.config.get("posterior", type(q).__name__.lower())
        raise ValueError(f"inference_gaps: model must have a gaussian posterior, got {kind!r}")
    key = random.from_generator(generator, x.device)
    own = refine(model, x, q, steps, key=random.fold_in(key, 0))
    again, log_joint = random.fold_in(key, 1), model.log_joint(x)
    first, second = (
        torch.cat([*each.log_weights(log_joint, num_samples, 16, key=again)]) for each in (q, own)
    )
    log_px = log_mean_exp(second.movedim(0, -1))
    return InferenceGaps(*(float(w.double().mean()) for w in (first, second, log_px)))


class Bracket(NamedTuple):
    """Mean nats per image: bounds of log p(x), in expectation, from below and from above."""

    lower: float
    upper: float


@torch.no_grad()
def annealed_log_likelihood(
    model: LatentVector,
    x: Tensor,
    steps: int = 300,
    chains: int = 8,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """log p(x) by annealed importance sampling, in nats, ``[B]``.

    From the best Gaussian of each image's own, where the posterior is Gaussian; from the posterior,
    where its density is known; else from the prior. See
    :func:`fastvae.annealed_importance_sampling`.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12).bernoulli()
    >>> fastvae.evaluation.annealed_log_likelihood(model, x, steps=5).shape
    torch.Size([5])
    """
    anneal, z = _chains(model, x, steps, chains, generator)
    return streaming_log_mean_exp([anneal(z).log_w])


@torch.no_grad()
def bidirectional(
    model: LatentVector,
    n: int = 100,
    steps: int = 300,
    chains: int = 8,
    *,
    generator: Generator | None = None,
) -> Bracket:
    """How far annealing can be wrong: log p(x) of ``n`` images of the model's own, enclosed.

    Their z is known, and a draw of the posterior, from which chains can go backwards.

    Paper: Wu et al., "On the Quantitative Analysis of Decoder-Based Generative Models", ICLR 2017.

    >>> model = fastvae.models.VAE(12, latent_dim=3)
    >>> lower, upper = fastvae.evaluation.bidirectional(model, 5, steps=20)
    """
    check_positive("bidirectional", n=n)
    z = model.sample_prior(n, generator=generator)
    x = model.draw_given(z, generator=generator)
    anneal, start = _chains(model, x, steps, chains, generator)
    forward = anneal(start)
    known = z.expand(chains, *z.shape)
    backward = anneal(known, step_size=forward.step_size, reverse=True)
    lower = streaming_log_mean_exp([forward.log_w])
    upper = -streaming_log_mean_exp([-backward.log_w])
    return Bracket(float(lower.double().mean()), float(upper.double().mean()))


def _chains(
    model: LatentVector, x: Tensor, steps: int, chains: int, generator: Generator | None
) -> tuple[Callable[..., AnnealedWeights], Tensor]:
    """Annealing to the posteriors of ``x``, and where its chains begin, ``[K, B, L]``."""
    key = random.from_generator(generator, x.device)
    q, log_joint = model.posterior(x), model.log_joint(x)
    if isinstance(q, Gaussian):
        q = refine(model, x, q, 100, key=random.fold_in(key, 0))
    if isinstance(q, Dense):
        log_start: LogProb = q.log_prob
        z = q.sample(chains, key=random.fold_in(key, 2))
        some = q.sample(64, key=random.fold_in(key, 1))
    else:
        log_start = model.log_prior or standard_log_prob
        z = model.sample_prior(chains * len(x), generator=generator).unflatten(0, (chains, -1))
        some, _ = q.draw(64, key=random.fold_in(key, 1))
    anneal = functools.partial(
        annealed_importance_sampling,
        lambda z: torch.add(*log_joint(z)),
        log_start,
        num_steps=steps,
        bits=model.bits,
        scale=None if model.bits else some.std(0),
        generator=generator,
    )
    return anneal, z


@torch.no_grad()
def posterior_means(model: LatentVector, x: Tensor) -> Tensor:
    """E_q[z | x] of many images, ``[B, L]``: what :func:`active_units`, :func:`traversals` and
    classifiers of latents take. Of a flow, and of layers of bits, what stands for it.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12).bernoulli()
    >>> fastvae.evaluation.posterior_means(model, x).shape
    torch.Size([5, 3])
    """
    dtype = next(model.parameters()).dtype
    return torch.cat([model.posterior(part.to(dtype)).mean for part in x.split(1000)])


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Which dimensions of z say something of x, bool, ``[L]``, by :func:`posterior_means`.

    .. math:: \mathrm{Var}_x(E_q[z_d | x]) > 0.01

    Paper: Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016.

    >>> fastvae.evaluation.active_units(torch.tensor([[0.0, 1.0], [0.01, -1.0]])).tolist()
    [False, True]
    """
    return means.var(0) > threshold


@torch.no_grad()
def calibration(
    model: LatentVector,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    n: int = 1000,
    num_samples: int = 200,
    *,
    generator: Generator | None = None,
) -> dict[float, float]:
    """How often q's central intervals of each level hold the z that made an image.

    Of ``n`` images of the model's own. If q is the posterior, as often as the level says; if it is
    too narrow, less often. The end of an interval that falls on a value which q takes with some
    probability, as of bits, holds it as often as makes the level right.

    Paper: Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration", 2018.

    >>> model = fastvae.models.VAE(12, latent_dim=3)
    >>> list(fastvae.evaluation.calibration(model, n=10, num_samples=20))
    [0.5, 0.8, 0.95]
    """
    check_positive("calibration", n=n, num_samples=num_samples)
    if not all(0.0 < level < 1.0 for level in levels):
        raise ValueError(f"calibration: levels must be in (0, 1), got {list(levels)}")
    z = model.sample_prior(n, generator=generator)
    x = model.draw_given(z, generator=generator)
    key = random.from_generator(generator, x.device)
    q, log_prior = model.posterior(x), model.log_prior
    u = torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    below = u / (num_samples + 1)  # z is one of so many draws: with u its rank is uniform
    for k in range(num_samples):
        draw, _ = q.draw_kl(log_prior, key=random.fold_in(key, k))
        ties = u * (draw == z)  # each counts by chance, for all draws alike
        below += q.average((draw < z) + ties) / (num_samples + 1)
    return {level: float(((2 * below - 1).abs() < level).double().mean()) for level in levels}


@torch.no_grad()
def traversals(model: LatentVector, means: Tensor, count: int = 10, points: int = 10) -> Tensor:
    """Images along the dimensions of z that vary most: ``[count * points, D]``, one row for each.

    Of those that p(x | z) is of. Around the first of :func:`posterior_means`, from -2.5 to 2.5, or
    from 0 to 1 of bits; of the others the variance is taken.

    >>> model, x = fastvae.models.VAE(12, latent_dim=3), torch.rand(5, 12).bernoulli()
    >>> means = fastvae.evaluation.posterior_means(model, x)
    >>> fastvae.evaluation.traversals(model, means, count=2, points=4).shape
    torch.Size([8, 12])
    """
    most = means[:, : model.decoded_dim].var(0).argsort(descending=True)[:count]
    z = means[0].repeat(len(most), points, 1)
    along = torch.linspace(*((0.0, 1.0) if model.bits else (-2.5, 2.5)), points).to(z)
    for row, d in enumerate(most.tolist()):
        z[row, :, d] = along
    return model.mean_given(z.flatten(0, 1))


@torch.no_grad()
def few_label_error(
    model: LatentVector, data: Dataset, num_labels: int, classifier: str = "svm", *, seed: int = 0
) -> float:
    """M1: the share of test images that a classifier of q's means, of few labels, gets wrong.

    Args:
        data: of which the training labels are taken, as many of each class, by ``seed``.
        classifier: ``"linear"``, logistic regression; ``"svm"``, of Gaussian kernels; or
            ``"spread"``, an SVM that is transductive: the labels spread to all training images
            over the graph of their 10 nearest neighbours (Zhou et al. 2004), and 10,000 of these
            count each a tenth of one whose label was known. All are scikit-learn's, and none sees
            a test image.

    Raises:
        ValueError: if the data have no labels, or too few of a class.

    Papers: Kingma et al., "Semi-Supervised Learning with Deep Generative Models", NeurIPS 2014;
    Zhou et al., "Learning with Local and Global Consistency", NeurIPS 2003.

    >>> data = fastvae.data.load("digits")
    >>> model = fastvae.models.VAE(64, latent_dim=8)
    >>> 0 < fastvae.evaluation.few_label_error(model, data, 100) < 1
    True
    """
    if classifier not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise ValueError(f"few_label_error: classifier must be one of {known}, got {classifier!r}")
    generator = Generator(data.train.device).manual_seed(seed)
    rows, y = balanced_labels(data, num_labels, generator=generator)
    train, test = (posterior_means(model, x).cpu().numpy() for x in (data.train, data.test))
    assert data.labels is not None
    images, labels, weights = rows.cpu().numpy(), y.cpu().numpy(), np.ones(len(rows))
    if classifier == "spread":
        guessed = _spread(train, images, labels)
        some = np.random.default_rng(seed).permutation(len(train))[:10_000]
        some = np.setdiff1d(some, images)
        images = np.concatenate([images, some])
        labels = np.concatenate([labels, guessed[some]])
        weights = np.concatenate([10.0 * weights, np.ones(len(some))])
    if classifier == "linear":
        found = require("sklearn.linear_model").LogisticRegression(max_iter=1000)
    else:
        found = require("sklearn.svm").SVC(C=3.0)
    found.fit(train[images], labels, weights)
    return 1.0 - float(found.score(test, data.labels[2].cpu().numpy()))


def _spread(z: Array, known: Array, labels: Array) -> Array:
    """A label for each row of ``z``, of the few that are known."""
    graph = require("sklearn.neighbors").kneighbors_graph(z, min(10, len(z) - 1))
    graph = graph.maximum(graph.T)
    start = np.full(len(z), -1)
    start[known] = labels
    spread = require("sklearn.semi_supervised").LabelSpreading(
        kernel=lambda *_: graph, alpha=0.99, max_iter=1000
    )
    return spread.fit(z, start).transduction_  # type: ignore[no-any-return]
