"""The VAE against formulas that can be solved, and against its own bounds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from chance import generator
from torch import Tensor
from torch.distributions import MultivariateNormal

import fastvae
from fastvae import data, demo, models
from fastvae.checkpoint import Settings
from fastvae.train import Trainer

FLOWS = [name for name, family in models.POSTERIORS.items() if family.flow is not None]


def model(
    likelihood: str = "bernoulli", dtype: torch.dtype = torch.float32, **posterior: object
) -> models.VAE:
    torch.manual_seed(0)
    vae = models.VAE(12, 7, hidden=(16, 9), likelihood=likelihood, **posterior).to(dtype)
    if vae.flow is not None:  # away from the identity
        with torch.no_grad():
            for parameter in vae.flow.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return vae


@pytest.fixture(scope="module")
def trained() -> Trainer:
    """A model that has learnt something: bounds that hold only by accident do not hold for it."""
    trainer = Trainer("vae", {"latent_dim": 8, "hidden": [64]}, data.load("digits"), Settings())
    for _ in range(300):
        trainer.train_step()
    return trainer


class Linear(models.VAE):
    """x = W z + b + s e, where W has orthogonal columns: p(x) and p(z | x) are known exactly."""

    def __init__(self) -> None:
        super().__init__(5, latent_dim=3, hidden=(), likelihood="gaussian")
        self.double()
        torch.manual_seed(1)
        q, _ = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))
        self.w = q * torch.tensor([2.0, 1.0, 0.3])
        self.b, self.s2 = torch.randn(5, dtype=torch.float64), 0.25
        precision = 1 + self.w.square().sum(0) / self.s2
        gain = self.w / self.s2 / precision  # [5, 3]: E[z | x] = gain' (x - b)
        with torch.no_grad():
            affine = self.encoder[0]
            affine.weight.copy_(torch.cat([gain.T, torch.zeros(3, 5)]))
            affine.bias.copy_(torch.cat([-gain.T @ self.b, -precision.log()]))

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mu = z @ self.w.T + self.b
        return mu, torch.full_like(mu, self.s2).log()

    def exact(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.s2 * torch.eye(5, dtype=torch.float64)
        return MultivariateNormal(self.b, covariance).log_prob(x)


def test_linear_gaussian_with_the_exact_posterior_is_exact():
    """Every importance weight is p(x) itself, whatever z: the estimate has no variance."""
    exact = Linear()
    x = 2 * torch.randn(6, 5, dtype=torch.float64)
    for num_samples in (1, 3, 10):
        found = exact.log_likelihood(x, num_samples, chunk=4, generator=generator())
        torch.testing.assert_close(found, exact.exact(x), rtol=1e-10, atol=1e-10)


def test_linear_gaussian_with_another_posterior_is_right_in_the_mean():
    rough = Linear()
    with torch.no_grad():
        rough.encoder[0].bias += torch.tensor([0.1, -0.2, 0.3, 0.4, 0.4, 0.4])
    x = torch.randn(6, 5, dtype=torch.float64)
    found = rough.log_likelihood(x, 20000, chunk=2000, generator=generator())
    # the weights have a relative deviation of about 1: 0.007 after 20000, and six times that
    torch.testing.assert_close(found, rough.exact(x), rtol=0, atol=0.04)
    elbo = torch.stack([rough.elbo(x, generator=generator(k)).elbo for k in range(500)]).mean(0)
    assert bool((elbo < rough.exact(x) - 0.05).all())  # the price of the other posterior


def test_log_likelihood_is_above_the_elbo_and_grows_with_samples(trained):
    x = trained.data.test.float()
    with torch.no_grad():
        elbo = torch.stack([trained.model.elbo(x, generator=generator(k)).elbo for k in range(100)])
    bounds = [trained.model.log_likelihood(x, k, generator=generator()) for k in (1, 16, 256)]
    means = [float(bound.mean()) for bound in (elbo, *bounds)]
    # K = 1 is the ELBO in the mean: 200 images with a deviation of some 2 nats each
    assert means[1] == pytest.approx(means[0], abs=0.6)
    assert means[0] < means[2] < means[3]


@pytest.mark.parametrize("num_samples", [1, 10, 33])
def test_the_chunk_does_not_change_the_samples(num_samples):
    """7 latents of 3 rows: a chunk that is no multiple of 4 would start inside a block of noise."""
    vae, x = model(dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64)
    whole = vae.log_likelihood(x, num_samples, chunk=1000, generator=generator())
    for chunk in (1, 2, 4, 5, 32):
        parts = vae.log_likelihood(x, num_samples, chunk=chunk, generator=generator())
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    other = vae.log_likelihood(x, num_samples, generator=generator(1))
    assert not torch.allclose(other, whole, rtol=1e-6)


def test_log_likelihood_never_holds_more_than_a_chunk():
    vae, shapes = model(), []
    vae.decoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    vae.log_likelihood(torch.rand(3, 12), num_samples=21, chunk=8)
    assert shapes == [(8, 3, 7), (8, 3, 7), (5, 3, 7)]


@pytest.mark.parametrize("bad", [{"num_samples": 0}, {"chunk": 0}])
def test_log_likelihood_refuses_no_samples(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be positive, got 0"):
        model().log_likelihood(torch.rand(3, 12), **bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elbo_and_gradients_are_those_of_the_formula_by_hand(dtype):
    vae, x = model(dtype=dtype), torch.rand(4, 12, dtype=dtype)
    elbo, recon, kl = vae.elbo(x, generator=generator())
    found = torch.autograd.grad(elbo.mean(), list(vae.parameters()))
    mu, log_var = vae.encode(x)
    eps = fastvae.random.normal(fastvae.random.from_generator(generator()), (4, 7), dtype)
    z, kl_eager = demo.eager_reparameterize_kl(mu, log_var, eps)
    recon_eager = demo.eager_bernoulli_log_prob(x, *vae.decode(z))
    expected = torch.autograd.grad((recon_eager - kl_eager).mean(), list(vae.parameters()))
    rtol = 1e-4 if dtype == torch.float32 else 1e-10  # the textbook KL loses digits
    torch.testing.assert_close((recon, kl), (recon_eager, kl_eager), rtol=rtol, atol=rtol)
    torch.testing.assert_close(elbo, recon - kl)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in found)


@pytest.mark.parametrize("posterior", FLOWS)
def test_flow_elbo_and_gradients_are_those_of_the_formula_by_hand(posterior):
    vae = model(dtype=torch.float64, posterior=posterior, posterior_size=3)
    x = torch.rand(4, 12, dtype=torch.float64)
    found = vae.elbo(x, generator=generator())
    gradients = torch.autograd.grad(found.elbo.sum(), list(vae.parameters()))
    mu, log_var = vae.encoder(x).chunk(2, -1)
    context = vae.encoder[:-1](x)
    eps = fastvae.random.normal(fastvae.random.from_generator(generator()), (4, 7), mu.dtype)
    start = mu + (0.5 * log_var).exp() * eps
    z, log_det = vae.flow.forward_and_log_det(start, context)
    for row in range(4):  # of the row's own map
        jacobian = torch.autograd.functional.jacobian(
            lambda z, row=row: vae.flow.forward_and_log_det(z, context[row])[0], start[row]
        )
        exact = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[row], exact, rtol=1e-9, atol=1e-9)
    assert float((z - start).detach().abs().max()) > 0.01  # it does something
    recon = demo.eager_bernoulli_log_prob(x, *vae.decode(z))
    normal = torch.distributions.Normal(0.0, 1.0)
    entropy = torch.distributions.Normal(mu, (0.5 * log_var).exp()).entropy().sum(-1)
    kl = -entropy - log_det - normal.log_prob(z).sum(-1)
    expected = torch.autograd.grad((recon - kl).sum(), list(vae.parameters()))
    torch.testing.assert_close((found.recon, found.kl), (recon, kl), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.elbo, recon - kl)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("posterior", FLOWS)
def test_flow_bounds_are_in_order_and_its_samples_are_not_in_the_chunk(posterior):
    """q(z | x) integrates to 1: the importance weights say so, at K = 1 and at many."""
    # of two steps: the gates of four make q so narrow that its weights have no variance
    vae = model(dtype=torch.float64, posterior=posterior, posterior_size=2)
    x = torch.rand(3, 12).double()
    whole = vae.log_likelihood(x, 33, chunk=1000, generator=generator())
    parts = vae.log_likelihood(x, 33, chunk=8, generator=generator())
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    many = [vae.log_likelihood(x, 20_000, 2_000, generator=generator(k)) for k in range(2)]
    torch.testing.assert_close(many[0], many[1], rtol=0, atol=0.1)
    # the same decoder under a Gaussian posterior has the same log p(x)
    plain = model(dtype=torch.float64)
    plain.decoder.load_state_dict(vae.decoder.state_dict())
    exact = plain.log_likelihood(x, 20_000, 2_000, generator=generator())
    torch.testing.assert_close(many[0], exact, rtol=0, atol=0.1)
    elbo = torch.stack([vae.elbo(x, generator=generator(k)).elbo for k in range(200)]).mean(0)
    assert bool((elbo < exact).all())


def test_gaussian_elbo_has_the_gaussian_density():
    vae, x = model("gaussian", torch.float64), torch.rand(4, 12, dtype=torch.float64)
    with torch.no_grad():
        _, recon, _ = vae.elbo(x, generator=generator())
        mu, log_var = vae.encode(x)
        mean, x_log_var = vae.decode(fastvae.reparameterize(mu, log_var, generator=generator()))
    assert 0 < float(mean.min()) < float(mean.max()) < 1
    density = torch.distributions.Normal(mean, (0.5 * x_log_var).exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(recon, density, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("likelihood", list(models.LIKELIHOODS))
def test_samples_and_reconstructions_are_images(likelihood):
    vae = model(likelihood)
    one, two = (vae.sample(5, generator=generator()) for _ in range(2))
    assert one.shape == (5, 12)
    assert torch.equal(one, two)
    assert not torch.equal(one, vae.sample(5, generator=generator(1)))
    x = torch.rand(4, 12)
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))
    assert vae.reconstruct(x).shape == (4, 12)
    assert 0 <= float(one.min()) <= float(one.max()) <= 1


def test_a_trained_model_reconstructs_its_own_image_best(trained):
    x = trained.data.test[:50].float()
    made = trained.model.reconstruct(x).clamp(1e-6, 1 - 1e-6)
    score = x @ made.log().T + (1 - x) @ (1 - made).log().T  # [image, reconstruction]
    assert (score.argmax(1) == torch.arange(50)).float().mean() > 0.3  # by chance: 0.02


def test_config_builds_the_same_model_again():
    for vae in (model("gaussian"), model(posterior="planar", posterior_size=3)):
        again = models.build("vae", vae.config)
        again.load_state_dict(vae.state_dict())
        x = torch.rand(3, 12)
        for other in (again, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
            assert torch.equal(other.reconstruct(x), vae.reconstruct(x))


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="no model 'gan'; take one of vae"):
        models.build("gan", {})
    with pytest.raises(ValueError, match=r"model vae cannot be built from .*colour"):
        models.build("vae", {"data_dim": 4, "colour": "red"})
    with pytest.raises(ValueError, match="sizes must be positive, got 4, 0 and"):
        models.VAE(4, latent_dim=0)
    with pytest.raises(ValueError, match="must be one of bernoulli, gaussian, got 'poisson'"):
        models.VAE(4, likelihood="poisson")
    with pytest.raises(ValueError, match=r"one of gaussian, full, .* got 'spline'"):
        models.VAE(4, posterior="spline")
    with pytest.raises(ValueError, match=r"must go with one of low-rank, .* got 4 and 'gaussian'"):
        models.VAE(4, posterior_size=4)
    for length in (0, 2.5):
        with pytest.raises(ValueError, match=f"must be a positive integer, got {length}"):
            models.VAE(4, posterior="planar", posterior_size=length)
