"""Posteriors, priors and objectives of the VAE, each against what it is by definition."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import fastvae
from fastvae import models
from fastvae.estimators.evidence import standard_log_prob

B, D, L = 3, 12, 4
POSTERIORS = ("gaussian", "full", "low-rank", "mixture", "planar", "realnvp")
DENSE = POSTERIORS[:3]


pytestmark = pytest.mark.usefixtures("double")


def key(seed: int = 0) -> Tensor:
    return fastvae.random.key(seed)


def vae(**options) -> models.VAE:
    model = models.VAE(D, L, hidden=(16, 9), **options)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and the identity
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(n: int = B) -> Tensor:
    return torch.rand(n, D).bernoulli()


def reference(q) -> torch.distributions.Distribution:
    """The same distribution by torch, of its parameters' meaning."""
    if isinstance(q, models.posterior.Gaussian):
        return Independent(Normal(q.mu, (0.5 * q.log_var).exp()), 1)
    if isinstance(q, models.posterior.Full):
        triangle = q.scale_tril.tril(-1) + q.scale_tril.diagonal(0, 1, 2).exp().diag_embed()
        return MultivariateNormal(q.mu, scale_tril=triangle)
    if isinstance(q, models.posterior.LowRank):
        return LowRankMultivariateNormal(q.mu, q.factor, q.log_var.exp())
    parts = Independent(Normal(q.mu.movedim(0, 1), (0.5 * q.log_var).exp().movedim(0, 1)), 1)
    return MixtureSameFamily(Categorical(logits=q.log_pi.mT), parts)


@pytest.mark.parametrize("posterior", [*DENSE, "mixture"])
@pytest.mark.parametrize("num_samples", [None, 1, 7])
def test_draws_come_with_their_density(posterior, num_samples):
    q = vae(posterior=posterior).posterior(images())
    z, log_q = q.draw(num_samples, key=key())
    if posterior != "mixture" or num_samples is None:
        assert z.shape == (B, L) if num_samples is None else (num_samples, B, L)
        torch.testing.assert_close(log_q, reference(q).log_prob(z))
        return
    components = len(q.mu)
    rounds = math.ceil(num_samples / components)
    assert z.shape == (rounds * components, B, L)
    torch.testing.assert_close(q.log_prob(z), reference(q).log_prob(z))
    correction = (q.log_pi + math.log(components)).repeat(rounds, 1)
    torch.testing.assert_close(log_q, reference(q).log_prob(z) - correction)
    torch.testing.assert_close(q.mean, reference(q).mean)


@pytest.mark.parametrize("posterior", [*DENSE, "mixture"])
def test_draws_have_the_moments(posterior):
    q = vae(posterior=posterior).posterior(images())
    with torch.no_grad():
        z, log_q = q.draw(200_000, key=key())
        weight = (reference(q).log_prob(z) - log_q).exp()  # 1, but for the mixture
        mean = (weight.unsqueeze(-1) * z).mean(0)
        exact = reference(q)
        torch.testing.assert_close(mean, exact.mean, rtol=0, atol=0.02)
        square = (weight.unsqueeze(-1) * (z - mean).square()).mean(0)
        torch.testing.assert_close(square, exact.variance, rtol=0.03, atol=0.01)
        z = q.sample(200_000, key=key())  # each counts alike
        torch.testing.assert_close(z.mean(0), exact.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(z.var(0), exact.variance, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("posterior", DENSE)
def test_divergence_and_entropy_are_exact(posterior):
    model, x = vae(posterior=posterior), images()
    q = model.posterior(x)
    _, kl = q.draw_kl(None, key=key())
    exact = reference(q)
    dense = MultivariateNormal(
        exact.mean, getattr(exact, "covariance_matrix", exact.variance.diag_embed())
    )
    standard = MultivariateNormal(torch.zeros(L), torch.eye(L))
    torch.testing.assert_close(kl, kl_divergence(dense, standard))
    torch.testing.assert_close(q.entropy(), dense.entropy())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_what_is_integrated_and_what_is_sampled_agree(posterior):
    """Of a prior given by name and the same one as a function; and of draws by their weights."""
    q = vae(posterior=posterior).posterior(images().repeat(20_000, 1))
    by_name, by_function, by_draw = torch.zeros(3, B), torch.zeros(3, B), torch.zeros(3, B)
    with torch.no_grad():

        def mean(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, B)).mean(0)

        by_name = mean(q.average(q.draw_kl(None, key=key(1))[1]))
        by_function = mean(q.average(q.draw_kl(standard_log_prob, key=key(2))[1]))
        z, log_q = q.draw(q.together, key=key(3))
        if posterior == "mixture":  # draws weigh M pi_m
            ratio = q.log_prob(z) - standard_log_prob(z)
            by_draw = mean(((q.log_prob(z) - log_q).exp() * ratio).mean(0))
        else:
            by_draw = mean((log_q - standard_log_prob(z)).mean(0))
    torch.testing.assert_close(by_name, by_function, rtol=0.02, atol=0.05)
    torch.testing.assert_close(by_name, by_draw, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("posterior", [*DENSE, "mixture"])
def test_importance_weights_say_what_those_of_a_gaussian_say(posterior):
    model, x = vae(posterior=posterior), images()
    exact = vae()
    exact.decoder.load_state_dict(model.decoder.state_dict())
    found, known = (
        m.log_likelihood(x, 50_000, 5_000, generator=torch.Generator().manual_seed(0))
        for m in (model, exact)
    )
    torch.testing.assert_close(found, known, rtol=0, atol=0.03)


@pytest.mark.parametrize("posterior", [*DENSE, "mixture", "planar"])
def test_the_gradient_of_the_bound_is_that_of_its_expectation(posterior):
    """Also of the mixture's weights: by finite differences of the exact divergence's estimate."""
    torch.manual_seed(1)
    model, x = vae(posterior=posterior), images(1).repeat(100_000, 1)

    def bound() -> Tensor:
        return model.bound(x, model.posterior(x[:1].expand(len(x), D)), key=key()).elbo.mean()

    last = model.encoder[-1].bias
    gradient = torch.autograd.grad(bound(), last)[0]
    direction, h = torch.randn_like(last), 1e-4
    with torch.no_grad():
        last += h * direction
        above = bound()
        last -= 2 * h * direction
        below = bound()
    torch.testing.assert_close(
        (above - below) / (2 * h), gradient @ direction, rtol=1e-5, atol=1e-6
    )


# --- priors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", list(models.PRIORS))
def test_a_prior_is_a_density_and_its_samples_are_of_it(prior):
    torch.manual_seed(0)
    model = models.VAE(D, 2, hidden=(16, 9), prior=prior, prior_size=3)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter += (0.05 if prior == "flow" else 0.3) * torch.randn_like(parameter)
        side = torch.linspace(-8, 8, 641)
        grid = torch.cartesian_prod(side, side)
        mass = model.log_prior(grid).exp() * (side[1] - side[0]) ** 2
        assert mass.sum().item() == pytest.approx(1.0, abs=1e-3)
        z = model.sample_prior(100_000, generator=torch.Generator().manual_seed(0))
        mean = (mass.unsqueeze(-1) * grid).sum(0)
        torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.02)
        second = (mass.unsqueeze(-1) * (grid - mean).square()).sum(0)
        torch.testing.assert_close(z.var(0), second, rtol=0.05, atol=0.01)


def test_the_vamp_prior_is_the_mean_posterior_of_its_pseudo_inputs():
    model = vae(prior="vamp", prior_size=5)
    z = torch.randn(7, L)
    pseudo = model.prior.pseudo_logits.sigmoid()
    mu, log_var = model.encode(pseudo)
    each = Independent(Normal(mu, (0.5 * log_var).exp()), 1).log_prob(z.unsqueeze(1))
    torch.testing.assert_close(model.log_prior(z), each.logsumexp(1) - math.log(5))


@pytest.mark.parametrize("prior", ["standard", *models.PRIORS])
@pytest.mark.parametrize("posterior", ["gaussian", "full", "mixture", "planar"])
def test_bounds_are_in_order_for_any_prior_and_posterior(prior, posterior):
    if (prior, posterior) in (("vamp", "full"), ("vamp", "mixture")):
        pytest.skip("the VampPrior is made of Gaussians")
    size = {} if prior == "standard" else {"prior_size": 3}
    model, x = vae(prior=prior, posterior=posterior, **size), images()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("prior."):  # not so wide that the weights have no variance
                parameter *= 0.3
        elbo = model.elbo(x.repeat(5000, 1)).elbo.unflatten(0, (-1, B)).mean(0)
    exact = [model.log_likelihood(x, 20_000, 2_000) for _ in range(2)]
    torch.testing.assert_close(*exact, rtol=0, atol=0.1)
    assert bool((elbo < exact[0]).all())
    loss = -model.elbo(x).elbo.mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(4).shape == (4, D)


def test_a_copy_of_a_vamp_prior_has_the_encoder_of_the_copy():
    model = vae(prior="vamp", prior_size=5)
    z = torch.randn(7, L)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.log_prior(z), model.log_prior(z))
        with torch.no_grad():
            other.encoder[-1].bias += 1.0
        assert not torch.allclose(other.log_prior(z), model.log_prior(z))


# --- objectives -----------------------------------------------------------------------------------


def objective(model: models.VAE, x: Tensor, kl_weight: float = 1.0):
    g = torch.Generator().manual_seed(0)
    batch = models.Batch(x, torch.arange(len(x)))
    return model.objective(batch, kl_weight=kl_weight, generator=g)


def pieces(model: models.VAE, x: Tensor, num_samples: int | None = None):
    """Of the same noise, by hand: mu, log_var, z, log p(x | z)."""
    first = fastvae.random.from_generator(torch.Generator().manual_seed(0))
    mu, log_var = model.encode(x)
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    z = mu + (0.5 * log_var).exp() * fastvae.random.normal(first, shape, mu.dtype)
    (logits,) = model.decode(z)
    log_px = torch.distributions.Bernoulli(logits=logits).log_prob(x.expand_as(logits)).sum(-1)
    return mu, log_var, z, log_px


def normal_log_prob(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    return Normal(mu, (0.5 * log_var).exp()).log_prob(z)


def kl_by_hand(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.square() + log_var.exp() - 1.0 - log_var)


def beta_by_hand(model, x, weight):
    mu, log_var, _, log_px = pieces(model, x)
    return log_px - weight * 3.0 * kl_by_hand(mu, log_var).sum(-1)


def free_bits_by_hand(model, x, weight):
    mu, log_var, _, log_px = pieces(model, x)
    kl = kl_by_hand(mu, log_var).mean(0)
    assert 0 < int((kl < 0.3).sum()) < L  # both sides of the maximum
    return log_px - weight * kl.clamp(min=0.3).sum()


def tc_by_hand(model, x, weight):
    mu, log_var, z, log_px = pieces(model, x)
    pairs = normal_log_prob(z.unsqueeze(1), mu, log_var)  # [B, B, L]
    log_qz = pairs.sum(-1).logsumexp(1) - math.log(len(x))
    log_prod = (pairs.logsumexp(1) - math.log(len(x))).sum(-1)
    kl = kl_by_hand(mu, log_var).sum(-1)
    return log_px - weight * (kl + 2.0 * (log_qz - log_prod))


def iwae_by_hand(model, x, weight):
    mu, log_var, z, log_px = pieces(model, x, 6)
    zero = torch.zeros(())
    ratio = (normal_log_prob(z, zero, zero) - normal_log_prob(z, mu, log_var)).sum(-1)
    return (log_px + weight * ratio).logsumexp(0) - math.log(6)


@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"objective": "beta", "beta": 3.0}, beta_by_hand),
        ({"objective": "free-bits", "free_bits": 0.3}, free_bits_by_hand),
        ({"objective": "tc", "beta": 3.0}, tc_by_hand),
        ({"objective": "iwae", "num_samples": 6}, iwae_by_hand),
    ],
    ids=lambda x: x["objective"] if isinstance(x, dict) else "",
)
def test_an_objective_is_its_formula(options, by_hand, kl_weight):
    model, x = vae(**options), images(16)
    if options["objective"] == "free-bits":
        with torch.no_grad():
            model.encoder[-1].bias[:2] += 1.5
    found = objective(model, x, kl_weight)
    expected = by_hand(model, x, kl_weight)
    torch.testing.assert_close(found.elbo, expected)
    gradients = [
        torch.autograd.grad(value.mean(), list(model.parameters()))
        for value in (found.elbo, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("posterior", DENSE)
def test_dreg_is_iwae_with_another_gradient_of_q(posterior):
    """The decoder's is the same; the encoder's has the same mean, and less variance."""
    x, gradients = images(1).expand(4000, D), {}
    for name in ("iwae", "dreg"):
        torch.manual_seed(0)
        model = vae(objective=name, num_samples=4, posterior=posterior)
        bound = objective(model, x)
        h = model.context(x).detach()
        bias = model.encoder[-1].bias
        each = h.new_zeros(len(x), len(bias)).requires_grad_()
        model.encoder[-1].register_forward_hook(lambda _, args, out, each=each: out + each)
        bound = objective(model, x)
        parameters = [each, *model.decoder.parameters()]
        per_datum, *decoder = torch.autograd.grad(bound.elbo.sum(), parameters)
        gradients[name] = bound.elbo, per_datum, decoder
    (value, of_q, of_p), (value_2, of_q_2, of_p_2) = gradients["iwae"], gradients["dreg"]
    torch.testing.assert_close(value, value_2)
    torch.testing.assert_close(of_p, of_p_2)
    error = 5 * (of_q - of_q_2).std(0) / math.sqrt(len(x))
    assert bool(((of_q - of_q_2).mean(0).abs() <= error).all())
    assert of_q_2.var(0).sum() < of_q.var(0).sum()


@pytest.mark.parametrize("kl_weight", [0.02, 0.5])
def test_dreg_is_iwae_while_it_warms_up(kl_weight):
    """The identity behind its squared weights is of a weight of 1."""
    x, found = images(), {}
    for name in ("iwae", "dreg"):
        torch.manual_seed(0)
        model = vae(objective=name, num_samples=4)
        bound = objective(model, x, kl_weight)
        gradients = torch.autograd.grad(bound.elbo.sum(), list(model.parameters()))
        found[name] = [*bound, *gradients]
    assert all(map(torch.equal, found["iwae"], found["dreg"]))


@pytest.mark.parametrize("name", ["elbo", "beta", "free-bits", "iwae"])
@pytest.mark.parametrize("posterior", ["full", "mixture", "planar"])
def test_other_posteriors_and_priors_have_these_objectives_too(name, posterior):
    prior = "vamp" if posterior == "planar" else "mixture"
    model = vae(objective=name, posterior=posterior, prior=prior, prior_size=3)
    bound = objective(model, images())
    assert bound.elbo.shape == bound.recon.shape == bound.kl.shape == (B,)
    (-bound.elbo.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"posterior": "low-rank", "posterior_size": 2, "activation": "maxout"},
        {"posterior": "mixture", "prior": "mixture", "prior_size": 5, "activation": "gated"},
        {"prior": "vamp", "prior_size": 5, "objective": "dreg", "num_samples": 3},
        {"prior": "flow", "objective": "tc", "beta": 2.0, "activation": "softplus"},
        {"objective": "free-bits", "free_bits": 0.5, "activation": "relu"},
    ],
)
@pytest.mark.parametrize("name", ["vae", "dlgm"])
def test_a_config_builds_the_same_model_again(name, options):
    more = {"layers": 3} if name == "dlgm" else {}
    model = models.build(name, {"data_dim": D, "latent_dim": L, "hidden": (8,), **options, **more})
    again = models.build(name, model.config)
    again.load_state_dict(model.state_dict())
    x = images()
    torch.testing.assert_close(objective(again, x), objective(model, x))
    assert again.config == model.config
    assert {**again.config, **options} == again.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "laplace"}, "prior must be one of standard, mixture, .* got 'laplace'"),
        ({"objective": "elbow"}, "objective must be one of elbo, .* got 'elbow'"),
        ({"activation": "sine"}, "activation must be one of tanh, .* got 'sine'"),
        ({"prior_size": 3}, "prior_size must go with one of mixture, .* got 3 and 'standard'"),
        ({"prior": "vamp", "prior_size": 0}, "prior_size must be a positive integer, got 0"),
        ({"beta": 2.0}, "beta must go with one of beta, tc, got 2.0 and 'elbo'"),
        ({"objective": "beta", "beta": math.nan}, "beta must be positive, got nan"),
        ({"objective": "iwae", "num_samples": 2.5}, "must be a positive integer, got 2.5"),
        ({"objective": "tc", "posterior": "full"}, "posterior of tc must be gaussian"),
        ({"objective": "dreg", "posterior": "planar"}, "posterior of dreg must be one of"),
        ({"prior": "vamp", "posterior": "full"}, "posterior of vamp must be gaussian or a flow"),
        ({"posterior": "full", "posterior_size": 2}, "posterior_size must go with one of"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        models.VAE(D, L, **options)
    with pytest.raises(ValueError, match=message):
        models.DLGM(D, L, **options)


# --- deep latent Gaussian models ------------------------------------------------------------------


def test_a_dlgm_adds_noise_at_every_layer():
    model = models.DLGM(D, 2, hidden=(5,), layers=3)
    z = torch.randn(4, 6)
    one, two, three = z.split(2, -1)
    g, t = model.decoder.noise, model.decoder.maps
    h = g[2](three)
    h = t[2](h) + g[1](two)
    h = t[1](h) + g[0](one)
    torch.testing.assert_close(model.decode(z)[0], t[0](h))
    assert model.latent_dim == 6
    assert model.config["latent_dim"] == 2
    model.decode(z)[0].sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_a_dlgm_of_one_layer_and_one_map_is_linear_in_its_noise():
    """x = W G xi + b + e is factor analysis: the density is known."""
    model = models.DLGM(D, 2, hidden=(), layers=1, posterior="full", likelihood="gaussian")
    with torch.no_grad():
        weight = model.decoder.maps[0][0].weight @ model.decoder.noise[0].weight
        bias = model.decoder.maps[0][0].bias
    model.likelihood = models.Likelihood(  # of a mean that is free and a variance that is known
        2, lambda mu, _: (mu, torch.full_like(mu, -1.0)), fastvae.gaussian_log_prob, None, None
    )
    loading, offset = weight[:D], bias[:D]
    exact = MultivariateNormal(offset, loading @ loading.T + math.exp(-1.0) * torch.eye(D))
    x = torch.randn(5, D)
    found = model.log_likelihood(x, 200_000, 20_000)
    torch.testing.assert_close(found, exact.log_prob(x), rtol=0, atol=0.05)


def test_layers_must_be_positive():
    with pytest.raises(ValueError, match="layers must be positive, got 0"):
        models.DLGM(D, layers=0)
