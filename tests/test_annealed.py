"""Annealed importance sampling: unbiased whatever the chains do, and sharp when they do well."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, MultivariateNormal

import fastvae

B, D, L = 3, 5, 2


pytestmark = pytest.mark.usefixtures("double")


class Linear:
    """x = W z + e: the density and the posterior are known."""

    bits, steps = False, (20, 1000)

    def __init__(self) -> None:
        self.w = torch.randn(D, L)
        self.x = torch.randn(B, D)
        covariance = self.w @ self.w.T + 0.3 * torch.eye(D)
        self.log_px = MultivariateNormal(torch.zeros(D), covariance).log_prob(self.x)
        precision = torch.eye(L) + self.w.T @ self.w / 0.3
        mean = torch.linalg.solve(precision, (self.x @ self.w / 0.3).T).T
        self.posterior = MultivariateNormal(mean, precision_matrix=precision)

    def log_joint(self, z: Tensor) -> Tensor:
        noise = torch.tensor(0.3).log().expand(1)
        return start(z) + fastvae.gaussian_log_prob(self.x, z @ self.w.T, noise)

    def begin(self, chains: int, reverse: bool):
        """Where chains begin, the density at their start, and a scale of steps.

        Backwards to a density that is narrower than the posterior, lest 1 / w have no variance.
        """
        if not reverse:
            return torch.randn(chains, B, L), start, None
        p = self.posterior
        narrow = MultivariateNormal(p.mean + 0.1, 0.5 * p.covariance_matrix)
        return p.sample((chains,)), narrow.log_prob, p.variance.sqrt()


class Bits:
    """x = W z + e of bits z: sums over all of them."""

    bits, steps = True, (3, 300)

    def __init__(self) -> None:
        self.w = torch.randn(D, 6)
        self.x = torch.randn(B, D)
        self.every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).unsqueeze(1)
        self.log_p = self.log_joint(self.every)
        self.log_px = self.log_p.logsumexp(0)

    def log_start(self, z: Tensor) -> Tensor:
        return fastvae.bernoulli_log_prob(z, torch.full((1,), -0.3))

    def log_joint(self, z: Tensor) -> Tensor:
        return self.log_start(z) + fastvae.gaussian_log_prob(
            self.x, z @ self.w.T, torch.tensor(3.0).log().expand(1)
        )

    def begin(self, chains: int, reverse: bool):
        if reverse:
            drawn = torch.multinomial(self.log_p.exp().T, chains, replacement=True).T
            return self.every[drawn].squeeze(2), self.log_start, None
        z = Bernoulli(logits=torch.full((chains, B, 6), -0.3)).sample()
        return z, self.log_start, None


MODELS = pytest.mark.parametrize("kind", [Linear, Bits])


def start(z: Tensor) -> Tensor:
    return fastvae.gaussian_log_prob(z, torch.zeros(1), torch.zeros(1))


def mean_exp(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of w, and five times its standard error."""
    w = log_w.exp()
    return w.mean(0), 5 * w.std(0) / math.sqrt(len(w))


@MODELS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("steps", "epsilon"), [(1, 0.3), (3, 0.1), (6, 0.7)])
def test_weights_are_unbiased_however_few_and_bad_the_steps(kind, reverse, steps, epsilon):
    model = kind()
    z, log_q, scale = model.begin(40_000, reverse)
    log_w, acceptance, _ = fastvae.annealed_importance_sampling(
        model.log_joint, log_q, z, steps, 3, step_size=torch.full((steps, B), epsilon),
        reverse=reverse, scale=scale, bits=model.bits,
    )  # fmt: skip
    assert acceptance.min() > 0.02
    assert acceptance.max() < 1.0
    sign = -1 if reverse else 1  # 1 / w backwards
    mean, error = mean_exp(sign * (log_w - model.log_px))
    assert ((mean - 1).abs() <= error).all()
    assert (error < 0.5).all()
    assert (log_w.std(0) > 0.1).all()


@MODELS
def test_both_directions_enclose_the_truth_and_close_on_it(kind):
    model = kind()
    (z, log_start, _), (exact, _, _) = model.begin(64, False), model.begin(64, True)
    widths = []
    for steps in model.steps:
        forward, _, epsilon = fastvae.annealed_importance_sampling(
            model.log_joint, log_start, z, steps, bits=model.bits
        )
        backward, acceptance, _ = fastvae.annealed_importance_sampling(
            model.log_joint, log_start, exact, steps, step_size=epsilon, reverse=True,
            bits=model.bits,
        )  # fmt: skip
        error = 4 * torch.maximum(forward.std(0), backward.std(0)) / 8  # of 64 chains
        assert (forward.mean(0) < model.log_px + error).all()
        assert (backward.mean(0) > model.log_px - error).all()
        widths.append(backward.mean(0) - forward.mean(0))
    assert ((acceptance > 0.5) & (acceptance < 0.85)).all()
    assert (widths[0] > 1.0).all()
    assert (widths[1] < 0.2 * widths[0]).all()
    close = fastvae.log_mean_exp(forward.T.contiguous())
    torch.testing.assert_close(close, model.log_px, rtol=0, atol=0.1)


def test_a_start_that_is_the_posterior_has_weights_without_variance():
    model = Linear()
    log_w, acceptance, epsilon = fastvae.annealed_importance_sampling(
        model.log_joint,
        lambda z: model.posterior.log_prob(z),
        model.posterior.sample((4,)),
        10,
        scale=model.posterior.variance.sqrt(),
    )
    torch.testing.assert_close(log_w, model.log_px.expand(4, B))
    assert epsilon.shape == (10, B)
    assert acceptance.shape == (B,)
    assert not log_w.requires_grad


def test_a_generator_replays_it():
    model, z = Linear(), torch.randn(4, B, L)
    one, two = (
        fastvae.annealed_importance_sampling(
            model.log_joint, start, z, 5, generator=torch.Generator().manual_seed(3)
        ).log_w
        for _ in range(2)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_a_proposal_that_is_nan_or_infinite_is_not_accepted(beyond):
    def log_joint(z: Tensor) -> Tensor:  # nothing beyond 1
        return torch.where(z[..., 0] < 1.0, start(z), beyond)

    z = torch.randn(100, 1, L)
    z[..., 0].clamp_(max=0.9)
    found = fastvae.annealed_importance_sampling(log_joint, start, z, 4, step_size=torch.ones(4, 1))
    assert found.log_w.isfinite().all()
    assert found.acceptance < 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"z": torch.zeros(3, dtype=torch.int64)}, TypeError, "z must be floating-point"),
        ({"z": torch.zeros(3)}, ValueError, r"z must be \[K, ..., D\], got \[3\]"),
        ({"num_steps": 0}, ValueError, "num_steps must be positive, got 0"),
        ({"leapfrog_steps": 0}, ValueError, "leapfrog_steps must be positive, got 0"),
        ({"step_size": torch.ones(3)}, ValueError, r"step_size must be \[2, 5\], got \[3\]"),
        ({"log_joint": lambda z: z}, ValueError, "log_joint must return one number per row"),
        ({"bits": True, "z": torch.full((4, 5, 2), 0.5)}, ValueError, "z must be 0 or 1 with bits"),
        ({"log_start": lambda z: 1.0}, TypeError, "log_start must return a tensor"),
    ],
)
def test_wrong_arguments_raise(arguments, error, message):
    good = {"log_joint": start, "log_start": start, "z": torch.zeros(4, 5, 2), "num_steps": 2}
    with pytest.raises(error, match=message):
        fastvae.annealed_importance_sampling(**{**good, **arguments})


def test_inference_mode_is_refused_as_slopes_are_taken():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode must be off"):
        fastvae.annealed_importance_sampling(start, start, torch.zeros(4, 5, 2), 2)
