r"""M1+M2: M2 of the latents of a VAE, M1: Kingma et al., "Semi-Supervised Learning with Deep
Generative Models", NeurIPS 2014.

.. math::
    p(x, y, z_1, z_2) = p(y)\, p(z_2)\, p(z_1 | y, z_2)\, p(x | z_1), \qquad
    q(z_1, y, z_2 | x) = q(z_1 | x)\, q(y | z_1)\, q(z_2 | z_1, y)

.. math::
    \log p(x) \ge E_{q(z_1|x)}[\log p(x|z_1) - \log q(z_1|x) + \mathcal U(z_1)]

p(x | z_1) and q(z_1 | x) are M1's, and stay as they are; p(z_1 | y, z_2) is Gaussian; U is M2's
bound. Every step draws z_1 anew, of a q(z_1 | x) that is computed once where x is always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .. import random
from ..data import Dataset
from ..estimators import Elbo
from ..estimators.evidence import standard_log_prob
from ..functional import gaussian_log_prob, log_mean_exp, reparameterize
from .base import Likelihood, configured
from .m2 import M2
from .posterior import Gaussian, LogProb, Mixture, Posterior
from .vae import VAE

__all__ = ["M1M2"]

# of latents, which have no bounds
_LATENTS = Likelihood(
    2, lambda mu, log_var: (mu, log_var), gaussian_log_prob, lambda mu, _: mu, reparameterize
)


@dataclass(frozen=True)
class _Stacked(Posterior):
    """(z_1, z_2) of q(z_1 | x) and the sum over y of q(y | z_1) q(z_2 | z_1, y).

    The class is drawn, so that q(y | z_1) gets no gradient here: :meth:`M1M2.elbo` sums over all.
    """

    first: Posterior
    second: Callable[[Tensor], Mixture]  # of z_1, [N, F]

    def draw(self, num_samples: int | None = None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z_1, log_q = self.first.draw(num_samples, key=random.fold_in(key, 0))
        flat = z_1.flatten(0, -2)
        z_2, log_q_2 = self.second(flat).draw(key=random.fold_in(key, 1))
        return (
            torch.cat([z_1, z_2.unflatten(0, z_1.shape[:-1])], -1),
            log_q + log_q_2.unflatten(0, z_1.shape[:-1]),
        )

    def draw_kl(self, log_prior: LogProb | None, *, key: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = self.draw(key=key)
        return z, log_q - (log_prior or standard_log_prob)(z)


class M1M2(M2):
    """M2 of a sample of q(z_1 | x), drawn anew each time; z is ``(z_1, z_2)``.

    Args:
        data_dim, likelihood: of x, as the base has them.
        dataset_size: N, the training images.
        base: M1: the config of a :class:`VAE`. Its weights are not learnt here.
        others: of :class:`M2`; ``latent_dim`` is of z_2.

    Raises:
        ValueError: as :class:`M2`; if the base is of other images.

    >>> m1 = fastvae.models.VAE(12, latent_dim=3)
    >>> model = fastvae.models.M1M2(12, 100, m1.config, num_labels=20, latent_dim=2)
    >>> model.base.load_state_dict(m1.state_dict())
    <All keys matched successfully>
    >>> model.elbo(torch.rand(5, 12)).elbo.shape, model.sample_prior(7).shape
    (torch.Size([5]), torch.Size([7, 5]))
    """

    @configured
    def __init__(
        self,
        data_dim: int,
        dataset_size: int,
        base: dict[str, Any],
        likelihood: str = "bernoulli",
        **others: Any,
    ) -> None:
        m1 = VAE(**base)
        for name, value in (("data_dim", data_dim), ("likelihood", likelihood)):
            if value != m1.config[name]:
                raise ValueError(
                    f"M1M2: base must have the {name} of the data, got {m1.config[name]!r} and "
                    f"{value!r}"
                )
        super().__init__(m1.latent_dim, dataset_size, likelihood="gaussian", **others)
        self.base = m1.requires_grad_(False)
        self.likelihood = _LATENTS
        self.encoded: Gaussian | None = None  # all training images, if that is once for all
        self.latent_dim = m1.latent_dim + self.style_dim

    def is_made_on(self, m1: VAE) -> bool:
        """Whether M1 has the config and the weights of this one."""
        own, given = self.base.state_dict(), m1.state_dict()
        return self.base.config == m1.config and all(
            torch.equal(own[name].cpu(), given[name].cpu()) for name in given
        )

    @property
    def decoded_dim(self) -> int:
        return self.base.latent_dim

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_1, z_2 = z.tensor_split([self.base.latent_dim], -1)
        return z_1, z_2

    @torch.no_grad()
    def before_steps(self, data: Dataset) -> None:
        """Encodes images that are always the same once for all, where q(z_1 | x) is Gaussian."""
        if data.noise == "none" and self.base.config["posterior"] == "gaussian":
            dtype = next(self.base.parameters()).dtype
            parts = [self.base.encode(x.to(dtype)) for x in data.train.split(1000)]
            self.encoded = Gaussian(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def features(self, x: Tensor, rows: Tensor, *, key: Tensor) -> Tensor:
        """A sample of q(z_1 | x)."""
        if self.encoded is None:
            return self.base.posterior(x).draw(key=key)[0]
        return self.encoded.map(lambda t: t[rows]).draw(key=key)[0]

    def likely_features(self, x: Tensor) -> Tensor:
        """The mean of q(z_1 | x)."""
        return self.base.posterior(x).mean

    def _first(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_1, log p(x | z_1) and log q(z_1 | x)."""
        z_1, log_q = self.base.posterior(x).draw(key=random.fold_in(key, 0))
        return z_1, self.base.log_p_x_given(x)(z_1), log_q

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """A bound of log p(x), the class unknown, ``[B]``."""
        key = random.from_generator(generator, x.device)
        z_1, recon, log_q = self._first(x, key)
        kl = log_q - self.unlabelled(z_1, key=key).elbo
        return Elbo(recon - kl, recon, kl)

    def _class_weights(self, x: Tensor, *, key: Tensor) -> Tensor:
        z_1, recon, log_q = self._first(x, key)
        return super()._class_weights(z_1, key=key) + recon - log_q

    def posterior(self, x: Tensor) -> Posterior:
        q = self.base.posterior(x)
        mean = torch.cat([q.mean, self.infer_all(q.mean).mean], -1)
        return _Stacked(mean, q, self.infer_all)

    @property
    def log_prior(self) -> Callable[[Tensor], Tensor]:
        def log_prob(z: Tensor) -> Tensor:
            z_1, z_2 = self._split(z)
            each = self.likelihood.log_prob(z_1, *self.decode_all(z_2))
            return log_mean_exp(each.movedim(0, -1)) + standard_log_prob(z_2)

        return log_prob

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        z_2 = self._split(super().sample_prior(n, generator=generator))[1]
        z_1 = super().draw_given(z_2, generator=generator)
        return torch.cat([z_1, z_2], -1)

    def log_p_x_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        log_p_x = self.base.log_p_x_given(x)
        return lambda z: log_p_x(self._split(z)[0])

    def mean_given(self, z: Tensor) -> Tensor:
        return self.base.mean_given(self._split(z)[0])

    def draw_given(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.base.draw_given(self._split(z)[0], generator=generator)

    @torch.no_grad()
    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        return self.base.mean_given(super().generate(z, y))
