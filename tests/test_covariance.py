"""Gaussians of full covariance, and of a diagonal one plus one of low rank."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    kl_divergence,
)

import fastvae

MAPS = ("log_var", "log_scale", "scale", "softplus")


def parameters(
    *shape: int, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and a triangle of positive diagonal, NaN above it: that must not be read."""
    g = torch.Generator().manual_seed(seed)
    dims = shape[-1]
    mu = torch.randn(shape, generator=g, dtype=torch.float64)
    c = torch.randn(*shape, dims, generator=g, dtype=torch.float64) / math.sqrt(dims)
    c.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    above = torch.ones(dims, dims, dtype=torch.bool).triu(1)
    return mu.to(device), c.masked_fill(above, math.nan).to(device)


def standard(dims: int, device: str) -> MultivariateNormal:
    eye = torch.eye(dims, dtype=torch.float64, device=device)
    return MultivariateNormal(torch.zeros(dims, dtype=torch.float64, device=device), eye)


@pytest.mark.parametrize("dims", [1, 2, 15, 16, 17, 33, 64, 100])
def test_matches_torch_distributions(dims, device):
    mu, c = parameters(7, dims, device=device)
    q = MultivariateNormal(mu, scale_tril=c.tril())
    kl = kl_divergence(q, standard(dims, device))
    torch.testing.assert_close(fastvae.gaussian_tril_kl(mu, c), kl)
    key = fastvae.random.key(1, device=device)
    eps = fastvae.random.normal(key, (7, dims), torch.float64)
    z, same_kl = fastvae.reparameterize_tril_kl(mu, c, key=key)
    torch.testing.assert_close(z, mu + (c.tril() @ eps.unsqueeze(-1)).squeeze(-1))
    assert torch.equal(same_kl, fastvae.gaussian_tril_kl(mu, c))
    assert torch.equal(z, fastvae.reparameterize_tril(mu, c, key=key))


@pytest.mark.parametrize("name", MAPS)
def test_diagonal_by_any_map(name, device):
    mu, c = parameters(5, 19, device=device)
    sigma = c.diagonal(dim1=-2, dim2=-1).clone()
    s = {
        "log_var": 2 * sigma.log(),
        "log_scale": sigma.log(),
        "scale": sigma,
        "softplus": sigma.expm1().log(),
    }[name].requires_grad_()
    given = torch.diagonal_scatter(c, s, dim1=-2, dim2=-1)
    key = fastvae.random.key(1, device=device)
    z, kl = fastvae.reparameterize_tril_kl(mu, given, parameterization=name, key=key)
    torch.testing.assert_close((z, kl), fastvae.reparameterize_tril_kl(mu, c, key=key))
    grad_z = torch.randn_like(z)
    (grad,) = torch.autograd.grad((z, kl), s, (grad_z, torch.ones_like(kl)))
    twin = fastvae.reference.reparameterize_tril_kl(mu, given, key, name)
    (ideal,) = torch.autograd.grad(twin, s, (grad_z, torch.ones_like(kl)))
    torch.testing.assert_close(grad, ideal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mu_shape", "tril_shape"),
    [((6, 21), ()), ((6, 21), (1,)), ((3, 6, 21), (6,)), ((3, 6, 21), (3, 1)), ((21,), (4,)),
     ((3, 6, 21), (1, 6)), ((3, 1, 21), (6,)), ((2, 3, 2, 21), (3, 1))],
    ids=str,
)  # fmt: skip
def test_shared_triangles(mu_shape, tril_shape, dtype, device):
    """One triangle may serve many rows; its gradient is the sum over them."""
    mu, _ = parameters(*mu_shape, device=device)
    _, c = parameters(*tril_shape, 21, device=device)
    mu, c = mu.to(dtype).requires_grad_(), c.to(dtype).requires_grad_()
    rows = torch.broadcast_shapes(mu_shape, (*tril_shape, 21))
    key = fastvae.random.key(1, device=device)
    exact = [mu.detach().double().requires_grad_(), c.detach().double().requires_grad_()]
    twin = fastvae.reference.reparameterize_tril_kl(*exact, key)
    z, kl = fastvae.reparameterize_tril_kl(mu, c, key=key)
    assert z.shape == rows
    assert kl.shape == rows[:-1]
    assert z.dtype == dtype
    grads = [torch.randn_like(z), torch.randn_like(kl)]
    actual = torch.autograd.grad((z, kl), (mu, c), grads)
    ideal = torch.autograd.grad(twin, exact, [g.double() for g in grads])
    noise = [fastvae.random.normal(key, rows, t).double() for t in (dtype, torch.float64)]
    if dtype == torch.bfloat16:  # is computed in float32
        noise[0] = fastvae.random.normal(key, rows).double()
    tolerance = 4 * torch.finfo(dtype).eps * math.prod(rows[:-1])
    tolerance += (noise[0] - noise[1]).abs().max()  # a uniform near 1 has few digits in float32
    for a, e in zip((z, kl, *actual), (*twin, *ideal), strict=True):
        assert (a.double() - e).abs().max() <= tolerance * (1 + e.abs().max())
    assert torch.equal(actual[1].triu(1), torch.zeros_like(c.detach()))


def test_samples_share_the_triangle_and_store_no_gradient_each(device):
    mu, c = parameters(2, 128, device=device)
    mu, c = mu.requires_grad_(), c.requires_grad_()
    key = fastvae.random.key(4, device=device)
    z, kl = fastvae.reparameterize_tril_kl(mu, c, 50, key=key)
    assert z.shape == (50, 2, 128)
    assert kl.shape == (2,)
    eps = fastvae.random.normal(key, z.shape, z.dtype)
    torch.testing.assert_close(z, mu + torch.einsum("bij,sbj->sbi", c.tril(), eps))
    (grad,) = torch.autograd.grad(z.sum(), c, retain_graph=True)
    expected = eps.sum(0).unsqueeze(-2).expand(2, 128, 128).tril()
    torch.testing.assert_close(grad, expected)
    if device == "cpu":
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(z.sum(), c, retain_graph=True)
        most = max(e.cpu_memory_usage for e in profile.key_averages())
        assert most < 4 * c.numel() * c.element_size()


def test_no_covariance_is_the_diagonal_gaussian(device):
    mu = torch.randn(9, 30, device=device)
    sigma = torch.rand(9, 30, device=device) + 0.1
    key = fastvae.random.key(2, device=device)
    pair = fastvae.reparameterize_tril_kl(mu, torch.diag_embed(sigma), key=key)
    other = fastvae.reparameterize_kl(mu, sigma, parameterization="scale", key=key)
    for a, b in zip(pair, other, strict=True):
        assert torch.equal(a, b)


def test_special_triangles(device):
    mu = torch.zeros(1, 2, device=device)
    triangle = torch.tensor([[1.0, 7.0], [0.5, 0.0]], device=device)
    assert fastvae.gaussian_tril_kl(mu, triangle) == math.inf  # singular
    triangle[1, 1] = -1.0
    assert fastvae.gaussian_tril_kl(mu, triangle).isnan()  # no Cholesky factor
    triangle[1, 1] = math.nan
    assert fastvae.gaussian_tril_kl(mu, triangle).isnan()
    for shape in ((0, 3), (4, 0), (0, 0)):
        mu = torch.zeros(shape, device=device, requires_grad=True)
        c = torch.zeros(*shape, shape[-1], device=device, requires_grad=True)
        z, kl = fastvae.reparameterize_tril_kl(mu, c)
        assert z.shape == shape
        assert torch.equal(kl, torch.zeros(shape[:-1], device=device))
        grads = torch.autograd.grad(z.sum() + kl.sum(), (mu, c))
        assert grads[1].shape == c.shape


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_a_triangle_of_no_rows_has_no_slope(shape, device):
    mu = torch.zeros(shape, device=device, requires_grad=True)
    triangle = torch.eye(3, device=device, requires_grad=True)
    z, kl = fastvae.reparameterize_tril_kl(mu, triangle)
    (slope,) = torch.autograd.grad(z.sum() + kl.sum(), triangle)
    assert torch.equal(slope, torch.zeros_like(triangle))


def test_no_samples_of_a_triangle_have_its_divergence(device):
    mu, triangle = torch.ones(2, 3, device=device), torch.eye(3, device=device).requires_grad_()
    z, kl = fastvae.reparameterize_tril_kl(mu, triangle, num_samples=0)
    assert z.shape == (0, 2, 3)
    (slope,) = torch.autograd.grad(z.sum() + kl.sum(), triangle)
    (known,) = torch.autograd.grad(fastvae.gaussian_tril_kl(mu, triangle).sum(), triangle)
    assert torch.equal(slope, known)


def test_bad_triangles_raise():
    mu, start = torch.zeros(2, 3), "fastvae::reparameterize_tril_kl: "
    for shape in ((3,), (3, 4), (4, 3), (2, 4, 4), (1, 1)):
        message = start + r"scale_tril must be \[..., D, D\] for the D of mu, got .* and \[2, 3\]"
        with pytest.raises(ValueError, match=message):
            fastvae.reparameterize_tril(mu, torch.zeros(shape))
    with pytest.raises(ValueError, match=start + "scale_tril must broadcast with mu"):
        fastvae.reparameterize_tril(mu, torch.zeros(4, 3, 3))
    with pytest.raises(ValueError, match=start + "num_samples must be non-negative, got -1"):
        fastvae.reparameterize_tril(mu, torch.eye(3), -1)
    with pytest.raises(ValueError, match="parameterization must be one of"):
        fastvae.gaussian_tril_kl(mu, torch.eye(3), parameterization="variance")


# --- low rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("name", MAPS)
def test_low_rank_matches_torch_distributions(rank, name, device):
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(6, 12, generator=g, dtype=torch.float64).to(device)
    s = torch.rand(6, 12, generator=g, dtype=torch.float64).add(0.3).to(device)
    factor = torch.randn(6, 12, rank, generator=g, dtype=torch.float64).to(device)
    inputs = [x.requires_grad_() for x in (mu, s, factor)]
    sigma = fastvae.reference.scale.ScaleMap(name).sigma(s)
    q = LowRankMultivariateNormal(mu, factor, sigma.square()) if rank else None
    full = torch.diag_embed(sigma.square()) + factor @ factor.mT
    q = q or MultivariateNormal(mu, full)
    _, kl = fastvae.reparameterize_low_rank_kl(*inputs, parameterization=name)
    ideal = kl_divergence(MultivariateNormal(mu, full), standard(12, device))
    torch.testing.assert_close(kl, ideal)
    wanted = inputs[: 3 if rank else 2]
    torch.testing.assert_close(
        torch.autograd.grad(kl.sum(), wanted), torch.autograd.grad(ideal.sum(), wanted)
    )
    mean, count = 0.0, 200_000
    z, _ = fastvae.reparameterize_low_rank_kl(
        *(x.detach()[:1] for x in inputs),
        count,
        parameterization=name,
        key=fastvae.random.key(7, device=device),
    )
    centred = z[:, 0] - mu.detach()[0]
    mean, covariance = centred.mean(0), centred.mT @ centred / count
    variance = full[0].detach().diagonal()
    assert (mean.abs() <= 5 * (variance / count).sqrt()).all()
    spread = (variance[:, None] * variance + full[0].detach().square()) / count
    assert ((covariance - full[0].detach()).abs() <= 5 * spread.sqrt()).all()


def test_low_rank_trains_in_half_types_and_under_compile(device):
    mu, log_var = torch.randn(2, 4, 8, dtype=torch.bfloat16, device=device).unbind()
    factor = torch.randn(4, 8, 2, dtype=torch.bfloat16, device=device)
    inputs = [x.clone().requires_grad_() for x in (mu, log_var, factor)]
    key = fastvae.random.key(0, device=device)

    def loss(*xs):
        z, kl = fastvae.reparameterize_low_rank_kl(*xs, key=key)
        return z.float().sum() + kl.sum()

    grads = torch.autograd.grad(loss(*inputs), inputs)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("log_var", [-4.0, -20.0, -60.0])
def test_low_rank_of_columns_that_are_one_another(log_var, device):
    """M is I and a matrix of rank 1: log det M = log(1 + R |v / sigma|^2)."""
    mu = torch.zeros(1, 16, device=device)
    column = torch.linspace(-1.0, 1.0, 16, device=device).reshape(1, 16, 1).requires_grad_()
    rank = 8 if log_var > -60.0 else 1  # beyond, float64 has not the digits of I
    factor, scale = column.expand(1, 16, rank), torch.full_like(mu, log_var)
    _, kl = fastvae.reparameterize_low_rank_kl(mu, scale, factor)
    squares = rank * column.double().square().sum()
    log_det = torch.log1p(squares * math.exp(-log_var))
    known = fastvae.gaussian_kl(mu, scale).double() + 0.5 * (squares - log_det)
    torch.testing.assert_close(kl.double(), known, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(one.sum(), column)[0] for one in (kl, known)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_low_rank_of_no_numbers_is_none(device):
    mu, factor = torch.zeros(2, 3, device=device), torch.ones(2, 3, 2, device=device)
    factor[0, 0, 0] = math.nan
    _, kl = fastvae.reparameterize_low_rank_kl(mu, mu, factor)
    assert kl.isnan().tolist() == [True, False]


def test_low_rank_is_computed_in_its_own_type_under_autocast(device):
    mu, log_var = torch.randn(2, 4, 16, device=device).unbind()
    inputs, key = (mu, log_var - 4.0, torch.randn(4, 16, 8, device=device)), fastvae.random.key(0)
    known = fastvae.reparameterize_low_rank_kl(*inputs, key=key.to(device))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        found = fastvae.reparameterize_low_rank_kl(*inputs, key=key.to(device))
    torch.testing.assert_close(found, known)


def test_bad_factors_raise():
    mu, log_var = torch.zeros(2, 3), torch.zeros(2, 3)
    start = "fastvae::reparameterize_low_rank_kl: "
    for shape in ((3,), (4, 1), (2, 4, 2)):
        with pytest.raises(ValueError, match=start + r"factor must be \[..., D, R\]"):
            fastvae.reparameterize_low_rank_kl(mu, log_var, torch.zeros(shape))
    with pytest.raises(TypeError, match=start + "factor must have the dtype of mu"):
        fastvae.reparameterize_low_rank_kl(mu, log_var, torch.zeros(3, 1).double())
