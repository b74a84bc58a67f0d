"""Inference for each image of its own: where it must end, and what it stores."""

from __future__ import annotations

import math

import pytest
import torch
from test_vae import Linear
from torch import Tensor

import fastvae
from fastvae import checkpoint, cli, evaluation, models
from fastvae.models.local import refine
from fastvae.models.posterior import Gaussian

D, L = 12, 3


pytestmark = pytest.mark.usefixtures("double")


def key(seed: int = 0) -> Tensor:
    return fastvae.random.key(seed)


def images(n: int = 6) -> Tensor:
    return torch.rand(n, D).bernoulli()


def local_vae(**options) -> models.LocalVAE:
    return models.LocalVAE(D, 20, latent_dim=L, hidden=(8,), **options)


@pytest.mark.parametrize(("start", "steps"), [(0.0, 300), (30.0, 1000), (-30.0, 1000)])
def test_refining_finds_the_exact_posterior(start, steps):
    """Of a linear model whose posterior is diagonal, from near and from far."""
    model, x = Linear(), 2 * torch.randn(6, 5)
    exact = model.posterior(x)
    q = Gaussian(torch.full_like(exact.mu, start), torch.full_like(exact.mu, 2.0))
    q = refine(model, x, q, steps, key=key())
    torch.testing.assert_close(q.mu, exact.mu.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(q.log_var, exact.log_var.detach(), rtol=0, atol=1e-7)


def test_a_step_is_the_natural_gradient():
    model, x = models.VAE(D, L, hidden=(8,)), images()
    q = model.posterior(x)
    mu, log_var = (p.detach().requires_grad_() for p in (q.mu, q.log_var))
    one = fastvae.random.fold_in(key(), 0)
    z = fastvae.reparameterize(mu, log_var, 8, key=one)
    log_joint = model.log_p_x_given(x)(z) - 0.5 * z.square().sum(-1)
    log_q = fastvae.gaussian_log_prob(z, mu.detach(), log_var.detach())  # sticking the landing
    d_mu, d_log_var = torch.autograd.grad((log_joint - log_q).mean(0).sum(), (mu, log_var))
    found = refine(model, x, q, 1, rate=0.1, key=key())
    torch.testing.assert_close(found.mu, (mu + 0.1 * log_var.exp() * d_mu).detach())
    torch.testing.assert_close(found.log_var, (log_var + 0.2 * d_log_var).detach())
    assert not found.mu.requires_grad


def test_no_step_leaves_q_by_more_than_a_deviation():
    model, x = Linear(), torch.full((1, 5), 1e6)
    q = Gaussian(torch.zeros(1, 3), torch.zeros(1, 3))
    moved = refine(model, x, q, 1, key=key())
    assert moved.mu.abs().max() == 1.0
    assert moved.log_var.abs().max() <= 1.0


def test_the_graph_of_refinement_is_right():
    """The gradient through the steps, to encoder and decoder, against finite differences."""
    model, x = local_vae(inference="semi", refine_steps=3), images()
    batch = models.Batch(x, torch.arange(len(x)))

    def bound() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return model.objective(batch, generator=g).elbo.mean()

    gradients = torch.autograd.grad(bound(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        direction, h = torch.randn_like(parameter), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * h * direction
                values.append(bound().detach())
            parameter += h * direction
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_local_parameters_are_stored_for_the_rows_of_the_batch():
    model, x = local_vae(), images()
    rows = torch.tensor([3, 1, 19, 0, 7, 12])
    before = model.mu.clone()
    bound = model.objective(models.Batch(x, rows), generator=torch.Generator().manual_seed(0))
    others = torch.ones(20, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(model.mu[others], before[others])
    assert bool((model.mu[rows] != before[rows]).any(-1).all())
    bound.elbo.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(name.startswith("encoder") for name, _ in model.named_parameters())
    again = local_vae()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.mu, model.mu)


@pytest.mark.parametrize("inference", ["local", "semi"])
@pytest.mark.parametrize("prior", ["standard", "mixture"])
def test_unseen_images_are_climbed_to_with_or_without_gradients(inference, prior):
    model, x = local_vae(inference=inference, prior=prior, test_refine_steps=30), images()
    with torch.no_grad():
        q = model.posterior(x)
    assert torch.equal(q.mu, model.posterior(x).mu)
    g = torch.Generator().manual_seed(0)
    before, after = (
        torch.cat([*each.log_weights(model.log_joint(x), 2000, 16, key=key())]).mean()
        for each in (model._start(x), q)
    )
    assert after > before
    assert model.elbo(x, generator=g).elbo.shape == (6,)
    assert model.log_likelihood(x, 64, generator=g).isfinite().all()
    assert model.reconstruct(x).shape == (6, D)
    assert model.sample(3, generator=g).shape == (3, D)


def test_gaps_add_up_and_vanish_where_the_encoder_is_exact():
    model, x = Linear(), 2 * torch.randn(6, 5)
    g = torch.Generator().manual_seed(0)
    exact = evaluation.inference_gaps(model, x, 300, 50, generator=g)
    assert exact.log_px == pytest.approx(model.exact(x).mean().item(), abs=1e-7)
    assert abs(exact.amortization_gap) < 1e-7
    assert abs(exact.family_gap) < 1e-7
    with torch.no_grad():  # a mean that is off by one deviation in one dimension costs half a nat
        model.encoder[0].bias[0] += (0.5 * model.encoder[0].bias[3]).exp()
    rough = evaluation.inference_gaps(model, x, 300, 4000, generator=g)
    assert rough.amortization_gap == pytest.approx(0.5, abs=0.03)
    assert abs(rough.family_gap) < 1e-7
    assert "amortisation gap" in str(rough)


def test_gaps_of_a_flow_are_refused():
    with pytest.raises(ValueError, match="must have a gaussian posterior, got 'planar'"):
        evaluation.inference_gaps(models.VAE(D, L, posterior="planar"), images())


def test_inference_mode_is_refused_as_slopes_are_taken():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"refine: .* must be off"):
        local_vae().posterior(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference": "amortised"}, "inference must be one of local, semi, got 'amortised'"),
        ({"posterior": "planar"}, "posterior must be gaussian, got 'planar'"),
        ({"objective": "iwae"}, "objective must be elbo, got 'iwae'"),
        ({"prior": "vamp"}, "prior must need no encoder, got 'vamp'"),
        ({"refine_steps": 0}, "must be positive, got 0, 100 and 20"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=f"LocalVAE: .*{message}"):
        local_vae(**options)


def test_a_bound_that_is_infinite_or_nan_keeps_to_its_image():
    model, x = local_vae(), images()
    x[2, 0] = math.nan
    q = model.posterior(x)
    good = [0, 1, 3, 4, 5]
    assert q.mu[good].isfinite().all()
    assert not q.mu[2].isfinite().all()


@pytest.mark.parametrize("inference", ["local", "semi"])
def test_trains_from_the_command_line_and_resumes(tmp_path, monkeypatch, capsys, inference):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    command = ["train", "local-vae", "--inference", inference, "--latent-dim", "3", "--hidden", "8"]
    command += ["--importance-samples", "4"]
    assert cli.main([*command, "--epochs", "2", "--out", "whole"]) == 0
    assert cli.main([*command, "--epochs", "1", "--out", "parts"]) == 0
    assert cli.main([*command, "--epochs", "2", "--out", "parts", "--resume"]) == 0
    capsys.readouterr()
    whole, parts = (
        checkpoint.read(tmp_path / out / "checkpoint.safetensors").part("model")
        for out in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert ("mu" in whole) == (inference == "local")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
