"""Latent-class naive Bayes: everything is a sum over the classes, and can be known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastvae import checkpoint, cli, models

D, K = 5, 3


pytestmark = pytest.mark.usefixtures("double")


def stirred(**options) -> models.NaiveBayes:
    model = models.NaiveBayes(D, K, **options)
    with torch.no_grad():
        model.class_logits.add_(0.5 * torch.randn(K))
    return model


def data(n: int = 200) -> Tensor:
    """Of three prototypes, so that there are classes to find."""
    prototypes = torch.tensor([[0.9, 0.9, 0.1, 0.1, 0.5], [0.1, 0.9, 0.9, 0.1, 0.9], [0.2] * 5])
    return prototypes[torch.arange(n) % 3].bernoulli()


def every_image() -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * D)


def maximise(function, parameters) -> None:
    """To the optimum, in the parameters given: the bound of all images is no estimate."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, max_eval=4000, tolerance_grad=1e-11, tolerance_change=1e-16,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = -function()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_the_joint_is_the_formula_and_sums_to_one():
    model, x = stirred(), every_image()
    probability = model.pixel_logits.sigmoid()
    each = torch.distributions.Bernoulli(probability).log_prob(x.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(model.log_joint(x), each + model.class_logits.log_softmax(0))
    assert model.log_likelihood(x).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_the_bound_is_below_by_the_divergence_from_the_posterior():
    model, x = stirred(), every_image()
    bound = model.elbo(x)
    q = torch.distributions.Categorical(logits=model.recognition(x))
    p = torch.distributions.Categorical(logits=model.log_joint(x))
    gap = torch.distributions.kl_divergence(q, p)
    assert gap.min() > 1e-3
    torch.testing.assert_close(bound.elbo + gap, model.log_likelihood(x))
    torch.testing.assert_close(bound.elbo, bound.recon - bound.kl)


def test_a_linear_softmax_reaches_the_marginal_likelihood():
    """The weights that do are those of the model; and training finds them, or as good ones."""
    model, x = stirred(), every_image()
    maximise(lambda: model.elbo(x).elbo.mean(), list(model.recognition.parameters()))
    assert (model.log_likelihood(x) - model.elbo(x).elbo).abs().max() < 1e-8
    with torch.no_grad():
        eta = model.pixel_logits
        model.recognition.weight.copy_(eta)
        offset = model.class_logits - torch.nn.functional.softplus(eta).sum(-1)
        model.recognition.bias.copy_(offset)
    torch.testing.assert_close(model.elbo(x).elbo, model.log_likelihood(x))


def test_em_is_coordinate_ascent_on_the_bound():
    """The same trajectory to 1e-6: q to its optimum, theta to its optimum, by turns."""
    em, ascent, x = stirred(), stirred(), data()
    ascent.load_state_dict(em.state_dict())
    theta = [ascent.class_logits, ascent.pixel_logits]
    previous = -math.inf
    for _ in range(8):
        log_px = em.em_step(x)
        assert log_px.mean() > previous
        previous = log_px.mean()
        maximise(lambda: ascent.elbo(x).elbo.mean(), list(ascent.recognition.parameters()))
        torch.testing.assert_close(ascent.elbo(x).elbo, log_px, rtol=0, atol=1e-6)
        maximise(lambda: ascent.elbo(x).elbo.mean(), theta)
        for a, b in ((em, ascent),):
            torch.testing.assert_close(
                a.class_logits.softmax(0), b.class_logits.softmax(0), rtol=0, atol=1e-6
            )
            torch.testing.assert_close(
                a.pixel_logits.sigmoid(), b.pixel_logits.sigmoid(), rtol=0, atol=1e-6
            )


def test_em_stays_finite_where_a_class_dies_or_a_pixel_is_never_on():
    model = stirred()
    with torch.no_grad():
        model.class_logits[0] = -1e4
    x = data()
    x[:, 0] = 0.0
    for _ in range(3):
        assert model.em_step(x).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.log_likelihood(x).isfinite().all()


@pytest.mark.parametrize("objective", ["score", "gumbel"])
def test_the_gradient_of_samples_is_that_of_the_sum(objective):
    """The score function's is unbiased, for q and the model; the straight-through one's is not."""
    model, x = stirred(objective=objective, num_samples=40_000), every_image()
    batch = models.Batch(x, torch.arange(len(x)))
    g = torch.Generator().manual_seed(0)
    found = model.objective(batch, generator=g)
    torch.testing.assert_close(found.elbo, model.elbo(x).elbo, rtol=0, atol=0.1)
    torch.testing.assert_close(found.elbo, found.recon - found.kl)
    theta = [model.class_logits, model.pixel_logits]
    q = list(model.recognition.parameters())
    one, two = (torch.autograd.grad(e.elbo.mean(), theta + q) for e in (found, model.elbo(x)))
    torch.testing.assert_close(one[:2], two[:2], rtol=0, atol=2e-3)
    if objective == "score":
        torch.testing.assert_close(one[2:], two[2:], rtol=0, atol=5e-3)
    else:  # it points where the other does
        alike = torch.cosine_similarity(one[2].flatten(), two[2].flatten(), dim=0)
        assert 0.8 < alike < 1.0


@pytest.mark.parametrize(("objective", "gap"), [("elbo", 1e-4), ("score", 1e-4), ("gumbel", 5e-3)])
def test_each_objective_learns_the_posterior(objective, gap):
    """By Adam, of a model that stays as it is; what is biased ends near, not at it."""
    samples = {} if objective == "elbo" else {"num_samples": 20}
    model, x = stirred(objective=objective, **samples), every_image()
    model.class_logits.requires_grad_(False)
    model.pixel_logits.requires_grad_(False)
    before = (model.log_likelihood(x) - model.elbo(x).elbo).mean()
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.recognition.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    batch = models.Batch(x, torch.arange(len(x)))
    for _ in range(1500):
        optimizer.zero_grad()
        (-model.objective(batch, generator=g).elbo.mean()).backward()
        optimizer.step()
        schedule.step()
    after = (model.log_likelihood(x) - model.elbo(x).elbo).mean()
    assert before > 10 * gap
    assert -1e-12 < after < gap


def test_samples_are_those_of_the_model():
    model = stirred()
    y = model.sample_prior(50_000, generator=torch.Generator().manual_seed(0))
    assert y.shape == (50_000, K)
    torch.testing.assert_close(y.mean(0), model.class_logits.softmax(0).detach(), rtol=0, atol=0.01)
    x = model.sample(50_000, generator=torch.Generator().manual_seed(0))
    mean = model.class_logits.softmax(0) @ model.pixel_logits.sigmoid()
    torch.testing.assert_close(x.mean(0), mean.detach(), rtol=0, atol=0.01)
    assert model.reconstruct(data(4)).shape == (4, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "sizes must be positive, got 5 and 0"),
        ({"likelihood": "gaussian"}, "likelihood must be bernoulli, got 'gaussian'"),
        ({"objective": "iwae"}, "objective must be one of elbo, score, gumbel, got 'iwae'"),
        ({"objective": "score", "num_samples": 1}, "num_samples of score must be at least 2"),
        ({"objective": "gumbel", "num_samples": 0}, "num_samples must be a positive integer"),
        ({"num_samples": 4}, "num_samples must go with one of score, gumbel, got 4 and 'elbo'"),
        ({"objective": "gumbel", "temperature": math.nan}, "temperature must be positive, got nan"),
        ({"temperature": 0.1}, "temperature must go with one of gumbel, got 0.1 and 'elbo'"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=f"NaiveBayes: .*{message}"):
        models.NaiveBayes(D, **options)


def test_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    command = ["train", "naive-bayes", "--epochs", "2", "--objective", "score"]
    assert cli.main([*command, "--latent-dim", "20", "--num-samples", "4"]) == 0
    assert "(exact, all 200 images)" in capsys.readouterr().out
    path = tmp_path / "runs/naive-bayes-digits/checkpoint.safetensors"
    config = checkpoint.read(path).header.config
    assert (config["latent_dim"], config["objective"], config["num_samples"]) == (20, "score", 4)
    assert cli.main(["sample", str(path), "-n", "9"]) == 0
    assert cli.main([*command, "--resume", "--epochs", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "naive-bayes", "--objective", "iwae", "--out", "x"]) == 2
    assert "objective must be one of elbo, score, gumbel" in capsys.readouterr().err
