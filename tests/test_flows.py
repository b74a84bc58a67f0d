"""fastvae.flows: transforms keep their contract, flows are densities, and both can be saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import flows

D = 5


def stirred(module: torch.nn.Module, by: float = 0.3) -> torch.nn.Module:
    """In float64, and away from the identity that it may start as."""
    g = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module.eval()


TRANSFORMS = {
    "planar": lambda: flows.Planar(D, 4),
    "radial": lambda: flows.Radial(D, 4),
    "actnorm": lambda: flows.ActNorm(D),
    "reverse": lambda: flows.Permutation(D),
    "shuffle": lambda: flows.Permutation(D, random=True),
    **{
        kind: lambda kind=kind: flows.AffineCoupling(D, kind)
        for kind in ("exp", "tanh_exp", "sigmoid", "gated", "additive")
    },
    "flipped": lambda: flows.AffineCoupling(D, flip=True, passing=1),
    "spline": lambda: flows.SplineCoupling(D, bins=6),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_inverse_and_know_their_determinant(name):
    transform = stirred(TRANSFORMS[name]())
    z = torch.randn(7, 3, D, dtype=torch.float64)
    x, log_det = transform(z)
    assert x.shape == z.shape
    assert log_det.shape == (7, 3)
    back, minus = transform.inverse_and_log_det(x)
    torch.testing.assert_close(back, z, atol=1e-8, rtol=0.0)
    torch.testing.assert_close(minus, -log_det, atol=1e-7, rtol=0.0)
    row = z[0, 0]
    jacobian = torch.autograd.functional.jacobian(
        lambda z: transform.forward_and_log_det(z)[0], row
    )
    exact = torch.linalg.slogdet(jacobian)[1]
    assert abs(exact - log_det[0, 0]) <= 1e-10


@pytest.mark.parametrize("make", [flows.realnvp, flows.nsf])
def test_a_flow_is_a_density(make):
    """It integrates to 1, and samples have the density that they are said to."""
    flow = stirred(make(2, length=3, hidden=(16,)), by=0.1)  # smooth enough for the grid
    grid = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    total = flow.log_prob(points).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total - 1.0) <= 1e-3
    x, log_prob = flow.rsample_and_log_prob((4, 6))
    assert x.shape == (4, 6, 2)
    torch.testing.assert_close(flow.log_prob(x), log_prob, atol=1e-8, rtol=0.0)
    assert not flow.sample(3).requires_grad


def test_a_flow_learns_what_a_gaussian_cannot():
    torch.manual_seed(0)

    def circle(n: int) -> Tensor:
        angle = 2.0 * math.pi * torch.rand(n)
        radius = 2.0 + 0.1 * torch.randn(n)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    flow = flows.nsf(2, length=3, hidden=(32,))
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for _ in range(200):
        loss = -flow.log_prob(circle(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaussian = 2.0 * 0.5 * (1.0 + math.log(2.0 * math.pi * 2.0))  # of the same variance, 2
    assert loss.item() < gaussian - 0.8


def test_a_context_conditions_the_density():
    flow = stirred(flows.nsf(2, length=2, context_dim=3))
    context = torch.randn(6, 3, dtype=torch.float64)
    x, log_prob = flow.rsample_and_log_prob(4, context)
    assert x.shape == (4, 6, 2)
    torch.testing.assert_close(flow.log_prob(x, context), log_prob, atol=1e-6, rtol=0.0)
    assert not torch.allclose(flow.log_prob(x, context.flip(0)), log_prob)
    for wrong in (None, torch.zeros(6, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"SplineCoupling: context must be \[..., 3\], got"):
            flow.log_prob(x, wrong)


def test_splines_and_radial_steps_start_as_the_identity():
    z = torch.randn(9, 4)
    for transform in (flows.SplineCoupling(4), flows.Radial(4, 3)):
        x, log_det = transform(z)
        torch.testing.assert_close(x, z, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(log_det, torch.zeros(9), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("inverse", [False, True])
def test_actnorm_takes_the_measure_of_its_first_batch_once(inverse):
    norm = flows.ActNorm(3)
    norm.eval()
    rows = 5.0 + 2.0 * torch.randn(1000, 3)
    step = norm.inverse_and_log_det if inverse else norm.forward_and_log_det
    assert torch.equal(step(rows)[0], rows)  # not in evaluation
    norm.train()
    out, _ = step(rows)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(3), atol=1e-5, rtol=0.0)
    scale = norm.log_scale.clone()
    step(7.0 * rows)
    assert torch.equal(norm.log_scale, scale)
    other = flows.ActNorm(3)
    other.load_state_dict(norm.state_dict())
    assert torch.equal((other.inverse_and_log_det if inverse else other)(rows)[0], step(rows)[0])


def test_state_is_stable_and_reprs_say_shapes():
    flow = flows.nsf(3, length=2)
    other = flows.nsf(3, length=2)
    other.load_state_dict(flow.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(flow.log_prob(x), other.log_prob(x))
    assert sorted(flows.realnvp(2, length=1, hidden=(4,)).state_dict()) == [
        "transforms.0.conditioner.hidden.0.bias",
        "transforms.0.conditioner.hidden.0.weight",
        "transforms.0.conditioner.last.bias",
        "transforms.0.conditioner.last.weight",
        "transforms.1.is_set",
        "transforms.1.log_scale",
        "transforms.1.shift",
    ]
    assert "SplineCoupling(\n      dim=3, passing=2, flip=False, bins=8, bound=3.0" in repr(flow)
    assert repr(flows.Planar(3, 8)) == "Planar(dim=3, length=8)"


def test_base_may_be_of_torch_distributions():
    normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    base = torch.distributions.Independent(normal, 1)
    transforms = [flows.AffineCoupling(3)]
    x = torch.randn(5, 3)
    expected = flows.Flow(flows.StandardNormal(3), transforms).log_prob(x)
    torch.testing.assert_close(flows.Flow(base, transforms).log_prob(x), expected)
    assert torch.equal(flows.Flow(base, []).log_prob(x), base.log_prob(x))


def test_compiles_without_a_break():
    flow = flows.nsf(4, length=2)
    x = torch.randn(6, 4)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flows.AffineCoupling(1), "dim must be at least 2, got 1"),
        (lambda: flows.AffineCoupling(3, passing=3), "passing must be within 1 and 2, got 3"),
        (lambda: flows.AffineCoupling(3, "tanh"), "kind must be one of exp, .* got tanh"),
        (lambda: flows.SplineCoupling(3, bins=0), "bins must be positive, got 0"),
        (lambda: flows.Planar(3, 0), "dim and length must be positive, got 3 and 0"),
        (lambda: flows.ActNorm(0), "dim must be positive, got 0"),
        (lambda: flows.Permutation(0), "dim must be positive, got 0"),
        (lambda: flows.StandardNormal(0), "dim must be positive, got 0"),
        (lambda: flows.AffineCoupling(3)(torch.zeros(2, 4)), r"x must be \[..., 3\], got \[2, 4\]"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()


def test_a_flow_wants_transforms():
    with pytest.raises(TypeError, match=r"transforms must be of fastvae.flows.Transform, got Tanh"):
        flows.Flow(flows.StandardNormal(2), [torch.nn.Tanh()])


def test_a_transform_says_what_it_lacks():
    for call in (flows.Transform(), flows.Transform().inverse_and_log_det):
        with pytest.raises(NotImplementedError, match="Transform has no"):
            call(torch.zeros(1, 2))
    assert fastvae.flows is flows
