"""Factor analysis, where everything is known: the density, the posterior, the gap, the optimum."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import decomposition
from torch.distributions import MultivariateNormal, kl_divergence

import fastvae
from fastvae import cli, models

D, FACTORS = 6, 2


pytestmark = pytest.mark.usefixtures("double")


def stirred(**options) -> models.FactorAnalysis:
    model = models.FactorAnalysis(D, FACTORS, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


def fit(model: models.FactorAnalysis, x: torch.Tensor, steps: int = 400) -> None:
    """All images at once: the bound is a function, not an estimate."""
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad],
        max_iter=steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = -model.elbo(x).elbo.mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_the_density_is_the_formula_and_the_posterior_bayes():
    model, x, z = stirred(), torch.randn(4, D), torch.randn(4, FACTORS)
    offset, loading, log_var = model.decode(model.theta)
    covariance = loading @ loading.mT + log_var.exp().diag()
    exact = MultivariateNormal(offset, covariance).log_prob(x)
    torch.testing.assert_close(model.log_likelihood(x), exact.detach())
    noise = log_var.exp().diag().expand(4, D, D)
    joint = MultivariateNormal(torch.zeros(FACTORS), torch.eye(FACTORS)).log_prob(z)
    joint = joint + MultivariateNormal(offset + z @ loading.mT, noise).log_prob(x)
    torch.testing.assert_close(model.exact_posterior(x).log_prob(z), joint - exact)


@pytest.mark.parametrize("posterior", ["full", "diagonal"])
def test_the_bound_is_below_by_the_divergence_from_the_posterior(posterior):
    model, x = stirred(posterior=posterior), torch.randn(50, D)
    bound = model.elbo(x)
    mu, scale_tril = model.encode(x)
    gap = kl_divergence(MultivariateNormal(mu, scale_tril=scale_tril), model.exact_posterior(x))
    assert (gap > 1e-3).all()
    torch.testing.assert_close(bound.elbo + gap, model.log_likelihood(x))
    torch.testing.assert_close(bound.elbo, bound.recon - bound.kl)


def test_the_expectation_is_that_of_samples():
    model, x = stirred(), torch.randn(3, D)
    offset, loading, log_var = model.decode(model.theta)
    z = fastvae.reparameterize_tril(*model.encode(x), num_samples=200_000)
    log_p = fastvae.gaussian_log_prob(x, offset + z @ loading.mT, log_var)
    error = 5 * log_p.std(0) / math.sqrt(len(z))
    assert ((log_p.mean(0) - model.elbo(x).recon).abs() <= error).all()


def test_a_full_posterior_makes_the_bound_exact_and_mean_field_does_not():
    """At the same theta. The best diagonal posterior has the precision's diagonal."""
    x = torch.randn(200, D)
    full = stirred()
    theta = full.theta.detach() + 0.5  # so that the factors are alike
    for posterior in ("full", "diagonal"):
        model = models.FactorAnalysis(D, FACTORS, posterior=posterior)
        with torch.no_grad():
            model.theta.copy_(theta)
        model.theta.requires_grad_(False)
        fit(model, x)
        gap = model.log_likelihood(x) - model.elbo(x).elbo
        precision = model.exact_posterior(x[0]).precision_matrix
        mean_field = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
        assert mean_field > 0.05
        expected = mean_field if posterior == "diagonal" else torch.zeros(())
        assert (gap - expected).abs().max() < 1e-6


def test_the_optimum_is_that_of_scikit_learn():
    """Held-out, of data that has the structure."""
    loading, noise = torch.randn(D, FACTORS), 0.1 + 0.5 * torch.rand(D)

    def draw(n: int) -> torch.Tensor:
        return 1 + torch.randn(n, FACTORS) @ loading.mT + torch.randn(n, D) * noise.sqrt()

    x, held_out = draw(1000), draw(1000)
    model = models.FactorAnalysis(D, FACTORS)
    fit(model, x)
    theirs = decomposition.FactorAnalysis(FACTORS, tol=1e-12, max_iter=100_000)
    theirs.set_params(svd_method="lapack").fit(x.numpy())
    ours = model.log_likelihood(held_out)
    assert abs(ours.mean().item() - theirs.score(held_out.numpy())) < 1e-4
    assert (ours - model.elbo(held_out).elbo).abs().max() < 1e-4  # theta and q together


def test_a_prior_of_theta_costs_its_divergence_once_in_a_data_set():
    kappa, n = 2.0, 40
    model, x = stirred(prior_scale=kappa, dataset_size=n), torch.randn(n, D)
    with torch.no_grad():
        model.theta_log_var.fill_(-80.0)  # a posterior that is almost a point
    point = models.FactorAnalysis(D, FACTORS)
    with torch.no_grad():
        point.theta.copy_(kappa * model.theta)
        point.recognition.load_state_dict(model.recognition.state_dict())
        point.log_scale.copy_(model.log_scale)
    sigma = torch.exp(0.5 * model.theta_log_var)
    q = torch.distributions.Normal(kappa * model.theta, kappa * sigma)
    shared = kl_divergence(q, torch.distributions.Normal(0.0, kappa)).sum()
    difference = point.elbo(x).elbo.sum() - model.elbo(x).elbo.sum()
    torch.testing.assert_close(difference, shared)
    torch.testing.assert_close(model.log_likelihood(x, 3), point.log_likelihood(x))


def test_the_predictive_density_is_that_of_the_mean_over_theta():
    model, x = stirred(prior_scale=1.0, dataset_size=10), torch.randn(5, D)
    with torch.no_grad():
        model.theta_log_var.fill_(-6.0)
    g = torch.Generator().manual_seed(1)
    got = model.log_likelihood(x, 50, generator=g)
    g = torch.Generator().manual_seed(1)
    draws = [
        fastvae.reparameterize(model.theta, model.theta_log_var, generator=g) for _ in range(50)
    ]
    densities = []
    for offset, loading, log_var in map(model.decode, draws):
        covariance = loading @ loading.mT + log_var.exp().diag()
        densities.append(MultivariateNormal(offset, covariance).log_prob(x))
    torch.testing.assert_close(got, fastvae.log_mean_exp(torch.stack(densities, -1)).detach())


def test_samples_have_the_models_moments():
    model = stirred()
    x = model.sample(200_000, generator=torch.Generator().manual_seed(0))
    offset, loading, log_var = (t.detach() for t in model.decode(model.theta))
    covariance = loading @ loading.mT + log_var.exp().diag()
    torch.testing.assert_close(x.mean(0), offset, rtol=0, atol=0.05)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.05, atol=0.1)
    assert model.reconstruct(x[:5]).shape == (5, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "sizes must be positive, got 6 and 0"),
        ({"likelihood": "bernoulli"}, "likelihood must be gaussian, got 'bernoulli'"),
        ({"posterior": "planar"}, "posterior must be one of full, diagonal, got 'planar'"),
        ({"prior_scale": 1.0}, "must be given together, got 1.0 and None"),
        ({"prior_scale": 0.0, "dataset_size": 5}, "must be positive, got 0.0 and 5"),
        ({"prior_scale": 1.0, "dataset_size": 0}, "must be positive, got 1.0 and 0"),
        ({"prior_scale": math.nan, "dataset_size": 5}, "must be positive, got nan and 5"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=f"FactorAnalysis: .*{message}"):
        models.FactorAnalysis(D, **options)


def test_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    if not (fastvae.data.data_root() / "freyfaces").is_dir():
        pytest.skip("freyfaces is not in the data folder")
    command = ["train", "factor-analysis", "--data", "freyfaces", "--epochs", "2"]
    assert cli.main([*command, "--latent-dim", "5", "--importance-samples", "4"]) == 0
    assert "(exact, all 200 images)" in capsys.readouterr().out
    checkpoint = "runs/factor-analysis-freyfaces/checkpoint.safetensors"
    assert cli.main(["sample", checkpoint, "-n", "9"]) == 0
    assert cli.main([*command, "--resume", "--epochs", "3"]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--data", "digits"], "likelihood must be gaussian"),
        (["--posterior", "planar"], "posterior must be one of full, diagonal"),
        (["--hidden", "5"], "cannot be built"),
    ):
        assert cli.main([*command, "--out", "other", *wrong]) == 2
        assert message in capsys.readouterr().err
