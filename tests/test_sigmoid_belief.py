"""Sigmoid belief networks against sums over all their bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from chance import generator
from torch import Tensor
from torch.distributions import Bernoulli

from fastvae import checkpoint, cli, data, evaluation, models, random
from fastvae.estimators.surrogate import bernoulli_sample

D, UNITS = 4, 2


pytestmark = pytest.mark.usefixtures("double")


def network(layers: int, **options) -> models.SigmoidBelief:
    model = models.SigmoidBelief(D, UNITS, layers, **options)
    with torch.no_grad():
        model.mean.fill_(0.3)
        model.top.copy_(torch.randn(UNITS))
    return model


def all_bits(n: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n).reshape(-1, n)


def joint(model: models.SigmoidBelief, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, h) and log q(h | x) of every h, ``[H, B]``, without any op of fastvae."""
    layers = len(model.inference)
    bits = all_bits(layers * UNITS).unsqueeze(1).expand(-1, len(x), -1).split(UNITS, -1)
    chain = [x.expand(len(bits[0]), -1, -1), *bits]
    log_p = Bernoulli(logits=model.top).log_prob(bits[-1]).sum(-1)
    log_q = torch.zeros_like(log_p)
    for k, (low, high) in enumerate(itertools.pairwise(chain)):
        log_p = log_p + Bernoulli(logits=model.generation[k](high)).log_prob(low).sum(-1)
        seen = low - model.mean if k == 0 else low
        log_q = log_q + Bernoulli(logits=model.inference[k](seen)).log_prob(high).sum(-1)
    return log_p, log_q


@pytest.mark.parametrize("layers", [1, 3])
def test_the_density_is_a_sum_over_all_bits_and_sums_to_one(layers):
    model, x = network(layers), all_bits(D)
    log_px = joint(model, x)[0].logsumexp(0)
    assert log_px.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(joint(model, x)[1].exp().sum(0), torch.ones(len(x)))
    found = model.log_likelihood(x, 20_000, 1_000, generator=generator())
    torch.testing.assert_close(found, log_px.detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_bound_is_that_of_all_bits(layers):
    model, x = network(layers), all_bits(D)
    log_p, log_q = joint(model, x)
    exact = (log_q.exp() * (log_p - log_q)).sum(0)
    with torch.no_grad():
        found = model.elbo(x.repeat(20_000, 1), generator=generator())
    mean = found.elbo.unflatten(0, (-1, len(x))).mean(0)
    torch.testing.assert_close(mean, exact.detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(found.elbo, found.recon - found.kl)


def mean_gradient(model: models.SigmoidBelief, x: Tensor, parameters: list[Tensor]):
    """Of the objective over many draws, and five standard errors."""
    draws = []
    many = x.repeat(2_000, 1)
    batch = models.Batch(many, torch.arange(len(many)))
    for seed in range(16):
        bound = model.objective(batch, generator=generator(seed)).elbo.mean()
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(bound, parameters)]))
    stacked = torch.stack(draws)
    return stacked.mean(0), 5 * stacked.std(0) / math.sqrt(len(stacked))


@pytest.mark.parametrize("layers", [1, 3])
def test_nvil_is_unbiased(layers):
    """With its baselines; the running averages at rest, for these scale q's gradient on purpose."""
    model, x = network(layers).eval(), all_bits(D)[3:8]
    parameters = [p for n, p in model.named_parameters() if not n.startswith("baselines")]
    log_p, log_q = joint(model, x)
    exact = (log_q.exp() * (log_p - log_q)).sum(0).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    found, error = mean_gradient(model, x, parameters)
    assert ((found - expected).abs() <= error + 1e-9).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_vimco_is_unbiased(layers):
    """Of the bound of two samples: a sum over all pairs of them."""
    model, x = network(layers, objective="vimco", num_samples=2), all_bits(D)[3:6]
    parameters = list(model.parameters())
    log_p, log_q = joint(model, x)
    log_w = log_p - log_q
    pairs = torch.logaddexp(log_w.unsqueeze(0), log_w.unsqueeze(1)) - math.log(2)
    exact = (log_q.exp().unsqueeze(0) * log_q.exp().unsqueeze(1) * pairs).sum((0, 1)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    found, error = mean_gradient(model, x, parameters)
    assert ((found - expected).abs() <= error + 1e-9).all()
    assert (error < 0.1).all()


def test_reweighted_wake_sleep_takes_q_to_the_posterior():
    """Of a model that stays, with many samples: the gradient of KL(p || q) at what it is."""
    model, x = network(1, objective="rws", num_samples=2_000), all_bits(D)[3:8]
    parameters = list(model.inference.parameters())
    log_p, log_q = joint(model, x)
    posterior = (log_p - log_p.logsumexp(0)).exp().detach()
    exact = (posterior * log_q).sum(0).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    batch = models.Batch(x.repeat(50, 1), torch.arange(250))
    bound = model.objective(batch, generator=generator()).elbo.mean()
    found = torch.cat([g.flatten() for g in torch.autograd.grad(bound, parameters)])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("objective", ["nvil", "vimco", "rws"])
def test_every_parameter_learns(objective):
    model = network(3, objective=objective)
    batch = models.Batch(all_bits(D), torch.arange(16))
    (-model.objective(batch, generator=generator()).elbo.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_preparing_takes_the_mean_image():
    model, x = network(2), torch.rand(50, D)
    model.prepare(data.Dataset("made", x, x, x, (2, 2), "bernoulli", "none"), generator())
    torch.testing.assert_close(model.mean, x.float().mean(0).double())
    torch.testing.assert_close(model.generation[0].bias.sigmoid().detach(), model.mean)


def test_samples_are_those_of_the_model():
    model = network(2)
    mean = model.sample(200_000, generator=generator()).mean(0)
    x = all_bits(D)
    exact = joint(model, x)[0].logsumexp(0).exp() @ x
    torch.testing.assert_close(mean, exact.detach(), rtol=0, atol=0.01)
    assert model.sample_prior(5).shape == (5, 2 * UNITS)
    assert model.reconstruct(x).shape == (16, D)


@pytest.mark.parametrize("layers", [1, 3])
def test_all_layers_are_one_vector_with_two_densities(layers):
    model, x = network(layers), all_bits(D)[:5]
    every = all_bits(layers * UNITS).unsqueeze(1).expand(-1, len(x), -1)
    log_p, log_q = joint(model, x)
    torch.testing.assert_close(sum(model.log_joint(x)(every)), log_p)
    q = model.posterior(x)
    torch.testing.assert_close(q.log_prob(every), log_q)
    z, log_prob = q.draw(3, key=random.key(0))
    assert z.shape == (3, 5, layers * UNITS)
    torch.testing.assert_close(log_prob, q.log_prob(z))
    assert q.sample(key=random.key(0)).shape == (5, layers * UNITS)
    mean = q.sample(100_000, key=random.key(1)).mean(0)
    torch.testing.assert_close(q.mean[:, :UNITS], mean[:, :UNITS], rtol=0, atol=0.01)
    exact = (log_q.exp().unsqueeze(-1) * every).sum(0)
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.01)
    whole, parts = model.sample_prior(200_000, generator=generator()).mean(0), all_bits(D)
    exact = torch.einsum("hb,hu->u", joint(model, parts)[0].exp(), every[:, 0])
    torch.testing.assert_close(whole, exact.detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("layers", [1, 3])
def test_annealing_is_exact_where_q_is_not_the_posterior(layers):
    model, x = network(layers), all_bits(D)
    with torch.no_grad():
        for parameter in (*model.generation.parameters(), *model.inference.parameters()):
            parameter *= 2.0
    log_px = joint(model, x)[0].logsumexp(0)
    found = evaluation.annealed_log_likelihood(model, x, 50, 500, generator=generator())
    torch.testing.assert_close(found, log_px.detach(), rtol=0, atol=0.05)
    lower, upper = evaluation.bidirectional(model, 1000, 50, 32, generator=generator())
    assert lower < upper + 0.02
    assert upper - lower < 0.1


def test_rare_bits_are_as_rare_in_half_types():
    logits = torch.tensor([-8.0, 8.0, -20.0, 20.0]).expand(1_000_000, 4)
    bits = bernoulli_sample(logits.bfloat16(), generator=generator())
    assert bits.dtype == torch.bfloat16
    rate = bits.double().mean(0)
    exact = logits[0].sigmoid()
    error = 5 * (exact * (1 - exact) / 1_000_000).sqrt() + 1e-7
    assert ((rate - exact).abs() <= error).all()


def test_what_is_drawn_along_is_what_images_are_of():
    model = network(3)
    with torch.no_grad():
        model.inference[2].weight *= 100.0  # the top bits vary most
    means = evaluation.posterior_means(model, all_bits(D))
    made = evaluation.traversals(model, means, points=5).unflatten(0, (-1, 5))
    assert len(made) == UNITS
    assert (made.std(1).amax(-1) > 1e-3).all()
    with pytest.raises(ValueError, match="must have a gaussian posterior, got 'bits'"):
        evaluation.inference_gaps(model, all_bits(D))


def test_intervals_of_bits_hold_what_they_say_if_q_is_the_posterior():
    """x says nothing of h: the posterior is the prior."""
    model = network(1)
    with torch.no_grad():
        model.generation[0].weight.zero_()
        model.inference[0].weight.zero_()
        model.inference[0].bias.copy_(model.top)
    exact = evaluation.calibration(model, n=8000, generator=generator())
    assert exact == pytest.approx({0.5: 0.5, 0.8: 0.8, 0.95: 0.95}, abs=0.015)
    with torch.no_grad():
        model.inference[0].bias += 2.0
    wrong = evaluation.calibration(model, n=8000, generator=generator())
    assert all(wrong[level] < level - 0.03 for level in wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "sizes must be positive, got 4, 2 and 0"),
        ({"likelihood": "gaussian"}, "likelihood must be bernoulli, got 'gaussian'"),
        ({"objective": "elbo"}, "objective must be one of nvil, vimco, rws, got 'elbo'"),
        ({"num_samples": 3}, "num_samples must go with one of vimco, rws, got 3 and 'nvil'"),
        ({"objective": "vimco", "num_samples": 1}, "must be at least 2, got 1"),
        ({"objective": "rws", "num_samples": 0}, "must be a positive integer, got 0"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=f"SigmoidBelief: .*{message}"):
        models.SigmoidBelief(**{"data_dim": D, "latent_dim": UNITS, "layers": 1, **options})


@pytest.mark.parametrize("objective", ["nvil", "vimco", "rws"])
def test_trains_from_the_command_line_and_resumes(tmp_path, monkeypatch, capsys, objective):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    command = ["train", "sbn", "--objective", objective, "--latent-dim", "20", "--layers", "2"]
    command += ["--importance-samples", "10"]
    assert cli.main([*command, "--epochs", "4", "--out", "whole"]) == 0
    assert cli.main([*command, "--epochs", "2", "--out", "parts"]) == 0
    assert cli.main([*command, "--epochs", "4", "--out", "parts", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "test log-likelihood" in out
    whole, parts = (
        checkpoint.read(tmp_path / path / "checkpoint.safetensors").part("model")
        for path in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    first = float(out.split("train ELBO")[1].split()[0])
    last = float(out.split("epoch     4   train ELBO")[1].split()[0])
    assert last > first
    assert cli.main(["sample", "whole/checkpoint.safetensors", "-n", "9"]) == 0
    few = ["--images", "20", "--annealing-steps", "5", "--chains", "2"]
    assert cli.main(["evaluate", "whole/checkpoint.safetensors", *few]) == 0
    assert "of 40" in capsys.readouterr().out
