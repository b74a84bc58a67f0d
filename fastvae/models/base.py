"""What every model of fastvae offers to training, evaluation and pictures."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .. import random
from ..estimators import Elbo, streaming_log_mean_exp
from ..estimators.evidence import standard_log_prob
from ..estimators.surrogate import bernoulli_sample
from ..functional import bernoulli_log_prob, gaussian_log_prob, reparameterize

if TYPE_CHECKING:
    from ..data import Dataset
    from .posterior import Posterior

__all__ = ["LIKELIHOODS", "Batch", "Elbo", "LatentVector", "Likelihood", "Model"]


class Batch(NamedTuple):
    """What one step of training sees."""

    x: Tensor  # images, [B, D]
    rows: Tensor  # which of the training set they are, [B]
    images: Callable[[Tensor], Tensor] | None = None  # other rows of it to images


class Likelihood(NamedTuple):
    """A family p(x | z) of x in [0, 1], whose parameters are made of a decoder's outputs."""

    heads: int  # outputs per pixel
    link: Callable[..., tuple[Tensor, ...]]  # (*outputs) -> parameters
    log_prob: Callable[..., Tensor]  # (x, *parameters) -> nats per row
    mean: Callable[..., Tensor]  # (*parameters) -> E[x | z]
    sample: Callable[..., Tensor]  # (*parameters, generator=) -> x


def _bernoulli_link(logits: Tensor) -> tuple[Tensor]:
    return (logits,)


def _gaussian_link(logits: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    # Means confined to (0, 1), as in Kingma & Welling, keep samples away from z of the data sane.
    return torch.sigmoid(logits), log_var


def _gaussian_mean(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu


LIKELIHOODS = {
    "bernoulli": Likelihood(
        1, _bernoulli_link, bernoulli_log_prob, torch.sigmoid, bernoulli_sample
    ),
    "gaussian": Likelihood(2, _gaussian_link, gaussian_log_prob, _gaussian_mean, reparameterize),
}


def configured(init: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` whose arguments, as JSON can hold them, are the model's ``config``.

    Of a subclass that calls another, what the subclass was given.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def with_config(self: Model, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        config: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                config |= value
            else:
                config[name] = value
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        self.config = config | self.__dict__.get("config", {})
        init(self, *args, **kwargs)

    return with_config


class Model(nn.Module, ABC):
    """A model of images ``[B, D]`` with latent variables.

    Attributes:
        config: the arguments that build it again, as JSON can hold them.
        exact: whether :meth:`log_likelihood` is no estimate.
        weighs_kl: whether :meth:`objective` minds ``kl_weight``.
        latent_dim: the size of z.
        of_data: which of its arguments a data set decides.
    """

    config: dict[str, Any]
    exact = False
    weighs_kl = True
    of_data: ClassVar[tuple[str, ...]] = ("data_dim", "likelihood")
    latent_dim: int

    def prepare(self, data: Dataset, generator: Generator) -> None:
        """What a model wants of its data before training: nothing, mostly."""

    def before_steps(self, data: Dataset) -> None:
        """What it makes of them once its weights, new or resumed, are in place: nothing, mostly."""

    def classify(self, x: Tensor) -> Tensor | None:
        """Logits of the classes of x, ``[B, C]``, if the model has learnt any."""
        return None

    def panels(self, x: Tensor, generator: Generator | None = None) -> list[tuple[str, Tensor]]:
        """What a picture shows beside the images ``x``, ``[N, D]``: captions, and N images each."""
        return [
            ("their reconstructions", self.reconstruct(x)),
            ("samples from the model", self.sample(len(x), generator=generator)),
        ]

    @abstractmethod
    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """A one-sample estimate of the evidence lower bound of each row of ``x``."""

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """What training maximises, and its terms: the bound, or what stands for it, ``[B]``.

        Args:
            kl_weight: of the divergence, which training may raise slowly to 1 (warm-up).
        """
        return self.elbo(batch.x, generator=generator).weighted(kl_weight)

    @abstractmethod
    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        """log p(x, z) - log q(z | x) of draws of q, ``[K, B]`` in parts of ``chunk``."""

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 128,
        chunk: int = 16,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Importance-sampled log p(x), in nats, ``[B]``, or log p(x) itself of an exact model.

        ``chunk`` samples of all rows of x, ``[B, D]``, are held at a time.

        >>> model = fastvae.models.VAE(784)
        >>> model.log_likelihood(torch.rand(16, 784), num_samples=64).shape
        torch.Size([16])
        """
        check_positive(type(self).__name__, num_samples=num_samples, chunk=chunk)
        weights = self.log_weights(x, num_samples, chunk, generator=generator)
        return streaming_log_mean_exp(weights)

    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` draws of z from N(0, I), where and as the parameters are, ``[n, latent_dim]``."""
        like = next(self.parameters())
        return torch.randn(
            n, self.latent_dim, generator=generator, dtype=like.dtype, device=like.device
        )

    @abstractmethod
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` images from the model, ``[n, D]``."""

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """Each image decoded again from what the model keeps of it, ``[B, D]``."""


class LatentVector(Model):
    """A model whose z is a vector, with a density p(x, z) that has a slope in z.

    Attributes:
        bits: whether z is of zeros and ones.
        decoded_dim: p(x | z) is of so many of its dimensions, the first; all of them, mostly.
    """

    bits: ClassVar[bool] = False

    @property
    def decoded_dim(self) -> int:
        return self.latent_dim

    @abstractmethod
    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of images ``[B, D]``."""

    @abstractmethod
    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z to log p(x | z), one number per row of z."""

    @abstractmethod
    def mean_given(self, z: Tensor) -> Tensor:
        """The mean of p(x | z), ``[..., D]``."""

    @abstractmethod
    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        """x of p(x | z), ``[..., D]``."""

    @property
    def log_prior(self) -> Callable[[Tensor], Tensor] | None:
        """z to log p(z); None if that is N(0, I)."""
        return None

    def log_joint(self, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """z to log p(x | z) and log p(z)."""
        log_p_x, log_prior = self.log_p_x_given(x), self.log_prior or standard_log_prob
        return lambda z: (log_p_x(z), log_prior(z))

    def bound(self, x: Tensor, q: Posterior, *, key: Tensor) -> Elbo:
        """The evidence lower bound of any q, and its terms, in nats, each ``[B]``."""
        z, kl = q.draw_kl(self.log_prior, key=key)
        recon, kl = q.average(self.log_p_x_given(x)(z)), q.average(kl)
        return Elbo(recon - kl, recon, kl)

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound and its terms, in nats, each ``[B]``, from one sample of z per row.

        Of bits there is no path from the sample to q: its gradient is that of :meth:`objective`.
        """
        key = random.from_generator(generator, x.device)
        return self.bound(x, self.posterior(x), key=key)

    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        key = random.from_generator(generator, x.device)
        return self.posterior(x).log_weights(self.log_joint(x), num_samples, chunk, key=key)

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from p(z), ``[n, D]``.

        >>> model = fastvae.models.VAE(784)
        >>> model.sample(9).shape
        torch.Size([9, 784])
        """
        return self.mean_given(self.sample_prior(n, generator=generator))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The means of p(x | z) at the mean of q(z | x), ``[B, D]``; the mean moved, of a flow."""
        return self.mean_given(self.posterior(x).mean)


# --- checks ---------------------------------------------------------------------------------------


def check_option(model: str, name: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        rule = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
        raise ValueError(f"{model}: {name} must be {rule}, got {value!r}")


def check_positive(who: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{who}: {name} must be positive, got {value}")


def owned(model: str, name: str, value: Any, owner: str, defaults: Mapping[str, Any]) -> Any:
    """The value of an option that goes with some owners only; if nobody says, the owner's own.

    What has None for a default is no owner.
    """
    defaults = {key: default for key, default in defaults.items() if default is not None}
    if value is None:
        return defaults.get(owner)
    if owner not in defaults:
        owners = ", ".join(defaults)
        raise ValueError(f"{model}: {name} must go with one of {owners}, got {value} and {owner!r}")
    whole = isinstance(defaults[owner], int)
    if not value > 0 or (whole and not isinstance(value, int)):
        rule = "a positive integer" if whole else "positive"
        raise ValueError(f"{model}: {name} must be {rule}, got {value}")
    return value
