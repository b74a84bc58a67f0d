"""What every model offers to training, evaluation and pictures, of every model."""

from __future__ import annotations

import json

import pytest
import torch
from chance import generator
from torch import Tensor

import fastvae
from fastvae import models

B, D, N = 5, 12, 30
_SMALL = {"latent_dim": 3, "hidden": [8]}
_FEW = {"num_labels": 6, "classes": 3}
CONFIGS = {
    "vae": _SMALL,
    "dlgm": {**_SMALL, "layers": 2},
    "local-vae": {**_SMALL, "inference": "semi"},
    "factor-analysis": {"latent_dim": 3, "likelihood": "gaussian"},
    "naive-bayes": {"latent_dim": 3},
    "m2": {**_SMALL, **_FEW},
    "m1m2": {**_SMALL, **_FEW, "base": models.VAE(D, 4, hidden=(8,)).config},
    "sbn": {"latent_dim": 3, "layers": 2},
}
VECTORS = [name for name, kind in models.MODELS.items() if issubclass(kind, models.LatentVector)]

pytestmark = pytest.mark.usefixtures("double")


def images(n: int = B) -> Tensor:
    return torch.rand(n, D, generator=generator()).bernoulli(generator=generator())


@pytest.fixture(params=models.MODELS)
def model(request) -> models.Model:
    return build(request.param)


def build(name: str) -> models.Model:
    torch.manual_seed(0)
    of_data = {"data_dim": D, "likelihood": "bernoulli", "dataset_size": N}
    own = {key: of_data[key] for key in models.MODELS[name].of_data}
    return models.build(name, {**own, **CONFIGS[name]})


def test_a_config_is_json_that_builds_it_again(model):
    (name,) = [key for key, kind in models.MODELS.items() if type(model) is kind]
    again = models.build(name, json.loads(json.dumps(model.config)))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x = images()
    one, two = (m.elbo(x, generator=generator()).elbo for m in (model, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["local-vae", "m1m2", "vae", "dlgm"])
def test_a_config_holds_lists_whatever_was_given(name):
    of_data = {"data_dim": D, "likelihood": "bernoulli", "dataset_size": N}
    own = {key: of_data[key] for key in models.MODELS[name].of_data}
    config = {**CONFIGS[name], "hidden": (8,)}
    assert models.build(name, {**own, **config}).config["hidden"] == [8]


def test_the_bound_is_its_terms_and_below_the_likelihood(model):
    x = images()
    found = model.elbo(x, generator=generator())
    assert all(term.shape == (B,) for term in found)
    torch.testing.assert_close(found.elbo, found.recon - found.kl)
    warm = found.weighted(0.25)
    torch.testing.assert_close(warm.elbo, found.recon - 0.25 * found.kl)
    assert warm.recon is found.recon
    with torch.no_grad():
        many = model.elbo(x.repeat(2000, 1), generator=generator()).elbo.view(-1, B).mean(0)
    log_p = model.log_likelihood(x, 2000, generator=generator())
    assert log_p.shape == (B,)
    assert not log_p.requires_grad
    assert (many < log_p + 0.05).all()


def test_parts_do_not_change_how_many_samples_there_are(model):
    x = images()
    for num_samples, chunk in ((1, 1), (7, 3), (8, 100)):
        parts = list(model.log_weights(x, num_samples, chunk, generator=generator()))
        assert all(part.shape[-1] == B for part in parts)
        together = fastvae.log_mean_exp(torch.cat(parts).mT)
        found = model.log_likelihood(x, num_samples, chunk, generator=generator())
        torch.testing.assert_close(found, together)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"chunk": -1}], ids=str)
def test_no_samples_are_refused(model, options):
    ((what, value),) = options.items()
    with pytest.raises(ValueError, match=f": {what} must be positive, got {value}"):
        model.log_likelihood(images(), **options)


def test_pictures_are_of_images(model):
    x = images(12)
    one, two = (model.sample(12, generator=generator()) for _ in range(2))
    assert torch.equal(one, two)
    for made in (one, model.reconstruct(x), *(panel for _, panel in model.panels(x, generator()))):
        assert made.shape[-1] == D
        assert made.isfinite().all()
        assert not made.requires_grad


def test_no_images_are_no_mistake(model):
    x = images(0)
    assert all(term.shape == (0,) for term in model.elbo(x, generator=generator()))
    assert model.log_likelihood(x, 4, generator=generator()).shape == (0,)
    assert model.reconstruct(x).shape == (0, D)


def test_images_of_another_size_are_refused(model):
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size|dim"):
        model.elbo(torch.rand(B, D + 1))


def test_nan_stays_nan(model):
    x = images()
    x[1, 2] = torch.nan
    found = model.elbo(x, generator=generator()).elbo
    assert found[1].isnan()
    assert found[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("name", VECTORS)
def test_z_is_a_vector_with_a_density(name):
    model, x = build(name), images()
    z = model.sample_prior(20_000, generator=generator())
    assert z.shape == (20_000, model.latent_dim)
    assert model.posterior(x).mean.shape == (B, model.latent_dim)
    some = z[: 6 * B].view(6, B, -1).clone().requires_grad_()
    log_p_x, log_p_z = model.log_joint(x)(some)
    assert log_p_x.shape == log_p_z.shape == (6, B)
    (slope,) = torch.autograd.grad((log_p_x + log_p_z).sum(), some)
    assert slope.isfinite().all()
    drawn = model.draw_given(z[:1].expand(20_000, -1), generator=generator())
    torch.testing.assert_close(drawn.mean(0), model.mean_given(z[0]).detach(), rtol=0, atol=0.02)
    # E_p(z)[p(x | z)] is p(x)
    log_p_x = model.log_p_x_given(x)(z.unsqueeze(1).expand(-1, B, -1))
    known = model.log_likelihood(x, 5000, 500, generator=generator())
    torch.testing.assert_close(fastvae.log_mean_exp(log_p_x.mT.detach()), known, rtol=0, atol=0.1)
