r"""Latent-class naive Bayes: a mixture of Bernoullis, whose posterior a linear softmax can be.

.. math::
    p(y) = \pi_y, \qquad p(x|y) = \prod_d \mathrm{Bernoulli}(x_d;\, \sigma(\eta_{yd})), \qquad
    \log p(x, y) = \eta_y^\top x + \log \pi_y - \sum_d \log(1 + e^{\eta_{yd}})

So p(y|x) is the softmax of an affine function of x, and with q(y|x) = softmax(W x + b) the bound
can be log p(x) itself:

.. math::
    \mathcal L = \sum_y q(y|x) \log p(x|y) - \mathrm{KL}(q(y|x) \,\|\, \pi) \le \log p(x)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear, one_hot, softplus

from ..estimators import Elbo, leave_one_out, score_function_bound
from ..functional import categorical_kl, gumbel_softmax
from .base import Batch, Model, check_option, configured, owned

__all__ = ["NaiveBayes"]

OBJECTIVES = {"elbo": None, "score": 8, "gumbel": 8}  # and samples, if nobody says


class NaiveBayes(Model):
    """Classes y that nobody has seen, given which the pixels are independent.

    Args:
        data_dim: D.
        latent_dim: K, the number of classes.
        likelihood: ``"bernoulli"``; there is no other.
        objective: what trains q: ``"elbo"``, the sum over all classes; ``"score"``, the score
            function of samples, each less the mean of the others; ``"gumbel"``, the
            straight-through Gumbel-softmax, which is biased.
        num_samples: of y, for ``"score"`` and ``"gumbel"``; default: 8.
        temperature: of ``"gumbel"``; default: 0.5.

    >>> model = fastvae.models.NaiveBayes(6, latent_dim=3)
    >>> x = torch.bernoulli(torch.full((5, 6), 0.5))
    >>> bool((model.elbo(x).elbo <= model.log_likelihood(x)).all())
    True
    """

    exact = True

    @configured
    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 10,
        likelihood: str = "bernoulli",
        objective: str = "elbo",
        num_samples: int | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        check_option("NaiveBayes", "likelihood", likelihood, ("bernoulli",))
        check_option("NaiveBayes", "objective", objective, OBJECTIVES)
        if min(data_dim, latent_dim) < 1:
            raise ValueError(f"NaiveBayes: sizes must be positive, got {data_dim} and {latent_dim}")
        num_samples = owned("NaiveBayes", "num_samples", num_samples, objective, OBJECTIVES)
        temperature = owned("NaiveBayes", "temperature", temperature, objective, {"gumbel": 0.5})
        if objective == "score" and num_samples == 1:
            raise ValueError("NaiveBayes: num_samples of score must be at least 2, got 1")
        self.config |= {"num_samples": num_samples, "temperature": temperature}
        self.latent_dim, self.num_samples = latent_dim, num_samples
        self.objective_name, self.temperature = objective, temperature
        self.weighs_kl = objective != "score"
        self.class_logits = nn.Parameter(torch.zeros(latent_dim))
        self.pixel_logits = nn.Parameter(torch.randn(latent_dim, data_dim))
        self.recognition = nn.Linear(data_dim, latent_dim)

    def log_p_x_given_y(self, x: Tensor) -> Tensor:
        """log p(x | y) for every class, ``[B, K]``: nothing of size B K D."""
        return linear(x, self.pixel_logits, -softplus(self.pixel_logits).sum(-1))

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) for every class, ``[B, K]``."""
        return self.log_p_x_given_y(x) + self.class_logits.log_softmax(-1)

    def elbo(self, x: Tensor, *, generator: Generator | None = None) -> Elbo:
        """The bound and its terms, exact: a sum over the classes, ``[B]``."""
        logits = self.recognition(x)
        recon = (logits.softmax(-1) * self.log_p_x_given_y(x)).sum(-1)
        kl = categorical_kl(logits, self.class_logits)
        return Elbo(recon - kl, recon, kl)

    def objective(
        self, batch: Batch, *, kl_weight: float = 1.0, generator: Generator | None = None
    ) -> Elbo:
        """The bound with the gradient that ``objective`` names, ``[B]``."""
        if self.objective_name == "elbo":
            return super().objective(batch, kl_weight=kl_weight, generator=generator)
        logits = self.recognition(batch.x)
        score = self.objective_name == "score"
        draw = logits.detach() if score else logits
        tau = self.temperature or 1.0  # the score function sees but the class
        y = gumbel_softmax(draw, tau, self.num_samples, hard=True, generator=generator)
        recon = (y * self.log_p_x_given_y(batch.x)).sum(-1)  # of the class drawn, [S, B]
        if not score:
            kl = categorical_kl(logits, self.class_logits)
            return Elbo((recon := recon.mean(0)) - kl_weight * kl, recon, kl)
        log_p_y = (y * self.class_logits.log_softmax(-1)).sum(-1)
        log_q = (y * logits.log_softmax(-1)).sum(-1)
        bound = score_function_bound(recon + log_p_y, log_q, control=leave_one_out)
        return Elbo(bound, (recon := recon.mean(0)), recon - bound)

    @torch.no_grad()
    def em_step(self, x: Tensor) -> Tensor:
        r"""One step of expectation maximisation on all of ``x``; returns log p(x) before it.

        .. math:: r = p(y|x), \quad \pi_y = \overline{r_y}, \quad
            \sigma(\eta_y) = r_y^\top x / \textstyle\sum r_y

        Coordinate ascent on the bound, each coordinate in closed form. A probability of 0 or 1 is
        moved by the resolution of its dtype, so that its logit is finite.
        """
        log_joint = self.log_joint(x)
        r = log_joint.softmax(-1)
        resolution = torch.finfo(r.dtype)
        counts = r.sum(0).clamp(min=resolution.tiny)
        self.class_logits.copy_(counts.log())
        self.pixel_logits.copy_((r.mT @ x / counts.unsqueeze(-1)).logit(eps=resolution.eps))
        return log_joint.logsumexp(-1)

    def log_weights(
        self, x: Tensor, num_samples: int, chunk: int, *, generator: Generator | None = None
    ) -> Iterator[Tensor]:
        """log p(x) itself: the sum over all classes, ``[1, B]``."""
        yield self.log_joint(x).logsumexp(-1, keepdim=True).mT

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """``n`` draws of y, one-hot, ``[n, K]``."""
        y = torch.multinomial(self.class_logits.softmax(-1), n, True, generator=generator)
        return one_hot(y, self.latent_dim).to(self.class_logits.dtype)

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """The pixels' means, for ``n`` draws of y, ``[n, D]``."""
        return self.sample_prior(n, generator=generator) @ self.pixel_logits.sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The pixels' means under q(y | x), ``[B, D]``."""
        return self.recognition(x).softmax(-1) @ self.pixel_logits.sigmoid()
