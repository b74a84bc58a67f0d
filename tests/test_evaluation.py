"""Evaluation of models whose density, posterior and calibration are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from chance import generator
from test_vae import Linear
from torch import Tensor

import fastvae
from fastvae import cli, evaluation, models

D, L = 12, 3


pytestmark = pytest.mark.usefixtures("double")


def images(n: int = 6) -> Tensor:
    return torch.rand(n, D).bernoulli()


def test_annealing_is_exact_where_the_posterior_is():
    model, x = Linear(), 2 * torch.randn(6, 5)
    with torch.no_grad():
        model.encoder[0].bias += 0.3  # refined away
    found = evaluation.annealed_log_likelihood(model, x, 5, 2, generator=generator())
    torch.testing.assert_close(found, model.exact(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"posterior": p} for p in ("gaussian", "full", "low-rank", "mixture", "planar")]
    + [{"prior": "mixture"}, {"posterior": "planar", "prior": "flow"}],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
def test_annealing_agrees_with_importance_sampling_for_any_q_and_prior(options):
    model, x = models.VAE(D, L, hidden=(16, 9), **options), images()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if name.startswith("prior."):
                parameter *= 0.3
    found = evaluation.annealed_log_likelihood(model, x, 60, 400, generator=generator())
    known = model.log_likelihood(x, 50_000, 5_000, generator=generator())
    torch.testing.assert_close(found, known, rtol=0, atol=0.05)
    lower, upper = evaluation.bidirectional(model, 50, 60, 16, generator=generator())
    assert lower < upper + 0.02
    assert upper - lower < 0.1


def m2() -> models.M2:
    return models.M2(D, 30, num_labels=3, classes=3, latent_dim=L, hidden=(8,))


def m1m2() -> models.M1M2:
    base = models.VAE(D, L, hidden=(8,)).config
    return models.M1M2(D, 30, base, num_labels=3, classes=3, latent_dim=2, hidden=(8,))


@pytest.mark.parametrize("make", [m2, m1m2])
def test_annealing_of_a_model_with_classes_sums_over_them(make):
    """And so do importance samples: of p(z), of q(z | x), and of z for every class."""
    model, x = make(), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        wide = [(model.encoder.rest[-1], model.style_dim)]  # of log_var, from where on
        if make is m1m2:
            wide.append((model.base.encoder[-1], L))
        for layer, start in wide:
            layer.weight[start:] *= 0.3
            layer.bias[start:] = 1.0
        z = model.sample_prior(400_000, generator=generator())
        log_p_x = model.log_p_x_given(x)
        log_p = torch.cat(
            [log_p_x(part.unsqueeze(1).expand(-1, 6, -1)) for part in z.split(20_000)]
        )
        known = fastvae.log_mean_exp(log_p.mT)
        q, key = model.posterior(x), fastvae.random.key(0)
        log_w = torch.cat([*q.log_weights(model.log_joint(x), 200_000, 20_000, key=key)])
    torch.testing.assert_close(fastvae.log_mean_exp(log_w.mT), known, rtol=0, atol=0.05)
    of_every = model.log_likelihood(x.repeat(100, 1), 2000, generator=generator()).view(100, -1)
    torch.testing.assert_close(fastvae.log_mean_exp(of_every.mT), known, rtol=0, atol=0.05)
    found = evaluation.annealed_log_likelihood(model, x, 200, 400, generator=generator())
    torch.testing.assert_close(found, known, rtol=0, atol=0.05)
    lower, upper = evaluation.bidirectional(model, 50, 60, 16, generator=generator())
    assert lower < upper + 0.02
    assert upper - lower < 0.1
    mean = model.draw_given(z[:1].expand(20_000, -1), generator=generator()).mean(0)
    torch.testing.assert_close(mean, model.mean_given(z[0]).detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("posterior", ["full", "diagonal"])
def test_annealing_of_factor_analysis_is_exact(posterior):
    model = models.FactorAnalysis(D, L, posterior=posterior)
    with torch.no_grad():
        model.theta += 0.5 * torch.randn_like(model.theta)
    x = model.sample(6, generator=generator())
    found = evaluation.annealed_log_likelihood(model, x, 300, 400, generator=generator())
    torch.testing.assert_close(found, model.log_likelihood(x), rtol=0, atol=0.05)
    lower, upper = evaluation.bidirectional(model, 50, 100, 16, generator=generator())
    assert upper - lower < 0.1


def test_intervals_hold_what_they_say_if_q_is_the_posterior():
    model = Linear()
    for num_samples in (1, 20, 200):  # of any number, as the rank among them is uniform
        exact = evaluation.calibration(
            model, n=8000, num_samples=num_samples, generator=generator()
        )
        for level, found in exact.items():
            assert found == pytest.approx(level, abs=0.012)
    with torch.no_grad():  # half the deviation
        model.encoder[0].bias[3:] -= 2 * math.log(2.0)
    narrow = evaluation.calibration(model, n=4000, generator=generator())
    normal = torch.distributions.Normal(0.0, 1.0)
    for level, found in narrow.items():
        half = normal.icdf(torch.tensor(0.5 + level / 2)) / 2
        assert found == pytest.approx(2 * normal.cdf(half).item() - 1, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be positive, got 0"),
        ({"num_samples": 0}, "num_samples must be positive, got 0"),
        ({"levels": [0.5, 1.5]}, r"levels must be in \(0, 1\), got \[0.5, 1.5\]"),
    ],
    ids=lambda of: "" if isinstance(of, str) else str(of),
)
def test_intervals_of_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=f"calibration: {message}"):
        evaluation.calibration(Linear(), **options)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: evaluation.inference_gaps(Linear(), images(), num_samples=0),
         "inference_gaps: num_samples must be positive, got 0"),
        (lambda: evaluation.bidirectional(Linear(), 0), "bidirectional: n must be positive, got 0"),
    ],
    ids=["gaps", "bidirectional"],
)  # fmt: skip
def test_means_of_nothing_are_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def test_annealing_begins_with_a_mixture_where_q_is_one():
    """Of a q that is the posterior, chains have nothing to go; of the prior, a long way."""
    model, x = models.VAE(D, L, hidden=(), posterior="mixture", posterior_size=2), images()
    with torch.no_grad():  # both components are N(0, 0.1 I), and so is the posterior
        for parameter in model.parameters():
            parameter.zero_()
        weights = model.encoder[0].bias.view(2, 2 * L + 1)
        weights[:, L:-1] = math.log(0.1)
        weights[0, -1] = 3.0
    precision = 1 / 0.1 - 1.0
    model.log_p_x_given = lambda _: lambda z: -0.5 * precision * z.square().sum(-1)
    found = evaluation.annealed_log_likelihood(model, x, 2, 2, generator=generator())
    known = torch.full((len(x),), 0.5 * L * math.log(0.1))
    torch.testing.assert_close(found, known, rtol=0, atol=1e-6)


def test_intervals_of_a_mixture_count_its_weights():
    model = models.VAE(D, L, hidden=(), posterior="mixture", posterior_size=2)
    with torch.no_grad():  # nothing is said of x; q and p are N(0, I), of halves that differ
        for parameter in model.parameters():
            parameter.zero_()
        weights = model.encoder[0].bias.view(2, 2 * L + 1)
        weights[0, -1] = 3.0  # of one that is right, the other is far away
        weights[1, :L] = 50.0
    found = evaluation.calibration(model, [0.5], n=2000, generator=generator())
    share = torch.tensor([3.0, 0.0]).softmax(0)[0].item()  # ranks end at 0.95
    assert found[0.5] == pytest.approx((0.75 - 0.25) / share, abs=0.03)


def test_units_that_say_nothing_are_not_active():
    model, x = models.VAE(D, L, hidden=(8,)), images(50)
    with torch.no_grad():
        model.encoder[-1].weight[0] = 0.0
        model.encoder[-1].weight[1] *= 10.0
    active = evaluation.active_units(evaluation.posterior_means(model, x))
    assert active.tolist()[:2] == [False, True]


def test_traversals_change_one_dimension_a_row():
    model, x = models.VAE(D, L, hidden=(8,)), images()
    means = model.posterior(x).mean
    made = evaluation.traversals(model, means, count=2, points=4)
    most = means.var(0).argsort(descending=True)
    z = means[0].clone()
    z[most[1]] = 2.5
    torch.testing.assert_close(made[7], model.decode(z)[0].sigmoid().detach())
    assert evaluation.traversals(model, means, count=99).shape == (10 * L, D)


def test_evaluate_from_the_command_line(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    train = ["train", "vae", "--latent-dim", "3", "--hidden", "8", "--epochs", "2"]
    assert cli.main([*train, "--importance-samples", "0"]) == 0
    checkpoint = "runs/vae-digits/checkpoint.safetensors"
    capsys.readouterr()
    quick = ["--images", "20", "--annealing-steps", "5", "--chains", "2"]
    assert cli.main(["evaluate", checkpoint, *quick]) == 0
    out = capsys.readouterr().out
    for words in ("active units", "amortisation gap", "annealed", "enclosed", "50 % intervals"):
        assert words in out
    written = json.loads(Path("runs/vae-digits/evaluation.json").read_text())
    assert written["images"] == 20
    assert (written["checkpoint"], written["epoch"]) == (checkpoint, 2)
    assert (written["annealing_steps"], written["chains"]) == (5, 2)
    assert Path("runs/vae-digits/traversals.png").stat().st_size > 1000
    assert cli.main(["train", "naive-bayes", "--epochs", "1", "--importance-samples", "0"]) == 0
    assert cli.main(["evaluate", "runs/naive-bayes-digits/checkpoint.safetensors"]) == 2
    assert "evaluate takes models whose z is a vector, not naive-bayes" in capsys.readouterr().err
    assert cli.main(["evaluate", "nothing"]) == 2


@pytest.mark.parametrize("flag", ["--images", "--annealing-steps", "--chains"])
def test_evaluate_refuses_none(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["evaluate", "x", flag, "0"])
    assert exit.value.code == 2
    assert "must be an integer from 1" in capsys.readouterr().err
    assert fastvae.__version__
