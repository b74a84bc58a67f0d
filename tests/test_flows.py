"""fastvae.flows: transforms keep their contract, flows are densities, and both can be saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import flows

D = 5
KINDS = ("householder", "orthogonal", "triangular")  # of Sylvester flows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    **{
        f"autoregressive {kind} {given}": (
            lambda kind=kind, given=given: flows.AffineAutoregressive(
                D, kind, given=given, hidden=(9, 16)
            )
        )
        for kind in ("exp", "gated", "additive")
        for given in ("data", "noise")
    },
    "autoregressive of one layer": lambda: flows.AffineAutoregressive(D, hidden=()),
    "autoregressive splines": lambda: flows.SplineAutoregressive(D, bins=6, hidden=(3, 40)),
    "batchnorm": lambda: flows.BatchNorm(D),
    **{kind: lambda kind=kind: flows.Linear(D, kind) for kind in ("lu", "lower", "upper")},
    "householder": lambda: flows.Householder(D),
    "householder, fewer": lambda: flows.Householder(D, length=2),
    **{f"sylvester {k}": lambda k=k: flows.Sylvester(D, 3, kind=k) for k in KINDS},
    **{f"sylvester {k}, fewer": lambda k=k: flows.Sylvester(D, 3, 2, k) for k in KINDS},
}
# The same, given a context of 3 numbers.
CONDITIONED = {
    "planar": lambda: flows.Planar(D, 4, context_dim=3),
    "radial": lambda: flows.Radial(D, 4, context_dim=3),
    "coupling": lambda: flows.AffineCoupling(D, context_dim=3),
    "conditional": lambda: flows.Conditional(D, 3),
    "conditional splines": lambda: flows.Conditional(D, 3, flows.Spline(4), flows.mlp((8,))),
    "maf": lambda: flows.AffineAutoregressive(D, context_dim=3),
    "maf of one layer": lambda: flows.AffineAutoregressive(D, context_dim=3, hidden=()),
    "iaf": lambda: flows.AffineAutoregressive(D, "gated", given="noise", context_dim=3),
    "householder": lambda: flows.Householder(D, 3, context_dim=3),
    **{f"sylvester {k}": lambda k=k: flows.Sylvester(D, 3, 2, k, context_dim=3) for k in KINDS},
}


@pytest.mark.parametrize(
    ("make", "conditioned"),
    [pytest.param(make, False, id=name) for name, make in TRANSFORMS.items()]
    + [pytest.param(make, True, id=f"{name}, given") for name, make in CONDITIONED.items()],
)
def test_transforms_are_inverse_and_know_their_determinant(make, conditioned):
    transform = stirred(make(), by=0.2)
    z = torch.randn(7, 3, D, dtype=torch.float64)
    context = torch.randn(3, 3, dtype=torch.float64) if conditioned else None
    x, log_det = transform(z, context)
    assert x.shape == z.shape
    assert log_det.shape == (7, 3)
    back, minus = transform.inverse_and_log_det(x, context)
    torch.testing.assert_close(back, z, atol=1e-8, rtol=0.0)
    torch.testing.assert_close(minus, -log_det, atol=1e-7, rtol=0.0)
    row, given = z[0, 0], context[0] if conditioned else None
    for step, there, value in (
        (transform.forward_and_log_det, row, log_det[0, 0]),
        (transform.inverse_and_log_det, x[0, 0].detach(), minus[0, 0]),
    ):
        jacobian = torch.autograd.functional.jacobian(lambda r, f=step: f(r, given)[0], there)
        exact = torch.linalg.slogdet(jacobian)[1]
        assert abs(exact - value) <= 1e-10
    if conditioned:
        assert not torch.allclose(transform(z, context + 1.0)[0], x)
        for wrong in (None, torch.zeros(3, 2, dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"context must be \[..., 3\], got"):
                transform(z, wrong)
    with pytest.raises(ValueError, match=r"x must be \[..., 5\], got \[2, 4\]"):
        transform.inverse_and_log_det(torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("make", [*TRANSFORMS.values(), *CONDITIONED.values()])
def test_transforms_take_no_rows_and_half_types(make):
    transform = make().eval()
    context = torch.zeros(3) if transform.context_dim else None
    for step in (transform.forward_and_log_det, transform.inverse_and_log_det):
        x, log_det = step(torch.zeros(0, D), context)
        assert x.shape == (0, D)
        assert log_det.shape == (0,)
    half = transform.to(torch.bfloat16)
    z = torch.randn(4, D, dtype=torch.bfloat16)
    x, log_det = half(z, None if context is None else context.bfloat16())
    assert x.dtype == torch.bfloat16
    assert log_det.dtype == torch.float32


@pytest.mark.parametrize(
    "make", [flows.realnvp, flows.nsf, flows.maf, lambda *a, **k: flows.maf(*a, bins=6, **k)]
)
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


def test_a_context_that_nothing_takes_is_refused():
    flow, context = flows.realnvp(2, length=2), torch.zeros(4, 3)
    for call in (
        lambda: flow.log_prob(torch.zeros(4, 2), context),
        lambda: flow.sample(3, context),
    ):
        message = r"Flow: context must be None where no transform has a context_dim, got \[4, 3\]"
        with pytest.raises(ValueError, match=message):
            call()


def test_splines_and_residual_steps_start_as_the_identity():
    z, context = torch.randn(9, 4), 100.0 * torch.randn(9, 5)
    residual = [kind(4, 3, size) for kind in (flows.Planar, flows.Radial) for size in (0, 5)]
    sylvester = [flows.Sylvester(4, 3, kind=kind) for kind in KINDS]
    for transform in (flows.SplineCoupling(4), *residual, *sylvester):
        given = context if getattr(transform, "context_dim", 0) else None
        x, log_det = transform(z, given)
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
    assert torch.equal(step(rows[0])[0], rows[0])  # nor by a row, which has no variance
    assert torch.equal(step(rows[:1])[0], rows[:1])
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
    assert sorted(flows.maf(2, length=1, hidden=(4,), context_dim=3).state_dict()) == [
        "transforms.0.conditioner.context.weight",
        "transforms.0.conditioner.layers.0.bias",
        "transforms.0.conditioner.layers.0.weight",
        "transforms.0.conditioner.layers.1.bias",
        "transforms.0.conditioner.layers.1.weight",
    ]


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
        (lambda: flows.AffineAutoregressive(3, given="x"), "given must be data or noise, got x"),
        (lambda: flows.MADE(0, [0]), r"dim and hidden must be positive, got 0 and \(64, 64\)"),
        (lambda: flows.MADE(2, [0], (0,)), r"dim and hidden must be positive, got 2 and \(0,\)"),
        (lambda: flows.MADE(2, [0, 2]), r"columns must be of 0 to 1, got \[0, 2\]"),
        (lambda: flows.MADE(2, []), r"columns must be of 0 to 1, got \[\]"),
        (lambda: flows.Conditional(2, 0), "dim and context_dim must be positive, got 2 and 0"),
        (lambda: flows.Linear(0), "dim must be positive, got 0"),
        (lambda: flows.Linear(2, "qr"), "kind must be one of lu, lower, upper, got qr"),
        (lambda: flows.Householder(2, 0), "dim and length must be positive, got 2 and 0"),
        (lambda: flows.BatchNorm(2, eps=0.0), "BatchNorm: dim and eps must be positive, .* 0.0"),
        (
            lambda: flows.BatchNorm(2).inverse_and_log_det(torch.zeros(1, 2)),
            r"x must have at least 2 rows in training, got \[1, 2\]",
        ),
        (lambda: flows.glow_like((1, 6, 8)), r"shape must be .* got \(1, 6, 8\) and 2 levels"),
        (
            lambda: flows.glow_like((1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 8)),
            r"x must be \[..., 1, 4, 4\], got \[2, 1, 4, 8\]",
        ),
        (lambda: flows.SplineCoupling(3, bins=0), "bins must be positive, got 0"),
        (lambda: flows.Sylvester(3, 0), "dim and length must be positive, got 3 and 0"),
        (lambda: flows.Sylvester(3, 2, 4), "rank must be within 1 and 3, got 4"),
        (lambda: flows.Sylvester(3, 2, kind="qr"), "kind must be one of householder, .*, got qr"),
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


# --- autoregressive -------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", [(), (1,), (3, 50), (64, 7, 20)])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_made_sees_the_columns_before_alone_and_all_that_it_may(dim, hidden, context_dim):
    made = stirred(flows.MADE(dim, torch.arange(dim).repeat(2), hidden, torch.nn.Tanh, context_dim))
    x, c = torch.randn(dim).double(), torch.randn(context_dim).double()
    given = (x, c) if context_dim else (x,)
    sees = [j != 0.0 for j in torch.autograd.functional.jacobian(made, given)]
    allowed = torch.ones(dim, dim).tril(-1).bool().repeat(2, 1)
    assert not (sees[0] & ~allowed).any()
    if min(hidden, default=dim) >= dim:
        assert torch.equal(sees[0], allowed)
    if context_dim:
        assert sees[1].all()


def _by_passes(transform, z, context=None):
    """As other libraries have it: D passes of the network, of each one column."""
    inverse = transform.given == "noise"
    x = torch.zeros_like(z)
    for d in range(z.shape[-1]):
        moved, log_det = transform.element(z, transform.conditioner(x, context), inverse)
        x = torch.cat([x[..., :d], moved[..., d : d + 1], x[..., d + 1 :]], -1)
    return x, log_det


@pytest.mark.parametrize("given", ["data", "noise"])
@pytest.mark.parametrize("element", [flows.Affine("exp"), flows.Affine("gated"), flows.Spline(5)])
@pytest.mark.parametrize("hidden", [(), (20,), (33, 17)])
def test_unrolling_is_as_many_passes_and_so_are_its_gradients(element, hidden, given):
    transform = stirred(
        flows.Autoregressive(
            7, element, given=given, hidden=hidden, activation=torch.nn.ELU, context_dim=2
        ),
        by=0.1,
    )
    step = transform.forward_and_log_det if given == "data" else transform.inverse_and_log_det
    z = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    context = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    wanted = [z, context, *transform.parameters()]
    weights = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, dtype=torch.float64)

    def gradients(outputs):
        loss = (outputs[0] * weights[0]).sum() + (outputs[1] * weights[1]).sum()
        return loss, torch.autograd.grad(loss, wanted)

    torch.testing.assert_close(step(z, context), _by_passes(transform, z, context))
    got = gradients(step(z, context))
    torch.testing.assert_close(got, gradients(_by_passes(transform, z, context)))


def test_unrolled_gradients_with_a_graph_are_those_without_where_z_is_of_the_context():
    element = flows.Affine("tanh_exp")
    transform = stirred(flows.Autoregressive(3, element, hidden=(9,), context_dim=2))
    context = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    start = torch.randn(11, 3, dtype=torch.float64)
    x, log_det = transform.forward_and_log_det(start + context.sum(-1, keepdim=True).sin(), context)
    loss, wanted = x.square().sum() + log_det.sum(), [context, *transform.parameters()]
    known = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted, create_graph=True), known)


@pytest.mark.parametrize("element", [flows.Affine("gated"), flows.Spline(5)])
def test_a_single_column_is_unrolled_through_hidden_units_that_see_none(element):
    transform = stirred(flows.Autoregressive(1, element, hidden=(9, 4)))
    z = torch.randn(11, 1, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(transform(z), _by_passes(transform, z))


def test_unrolling_is_exact_to_1e_6_in_float32():
    torch.manual_seed(0)
    transform = flows.AffineAutoregressive(64, "tanh_exp", hidden=(256, 256)).eval()
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.02 * torch.randn_like(p))
        z = torch.randn(512, 64)
        x, log_det = transform.forward_and_log_det(z)
        back, minus = transform.inverse_and_log_det(x)
        passes = _by_passes(transform, z)
    torch.testing.assert_close(x, passes[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back, z, rtol=0.0, atol=4e-6)
    torch.testing.assert_close(minus, -log_det, rtol=0.0, atol=2e-5)


def test_splines_and_iaf_are_differentiable_twice_and_compile_and_vmap():
    transform = stirred(flows.SplineAutoregressive(4, bins=3, hidden=(8,)))
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: transform(z), (z,), atol=1e-4)
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), transform(z))
    mapped = torch.func.vmap(transform)(z.unsqueeze(0))
    torch.testing.assert_close(mapped[0][0], transform(z)[0])


def _as_nflows(transform, hidden):
    """nflows' layer with our weights; its outputs are shift and unconstrained scale in turn."""
    nflows = pytest.importorskip("nflows.transforms")
    peer = nflows.MaskedAffineAutoregressiveTransform(
        transform.dim,
        hidden,
        context_features=transform.context_dim or None,
        num_blocks=1,
        use_residual_blocks=False,
        activation=torch.nn.functional.relu,
    )
    return peer.double().eval()


def test_values_are_those_of_nflows_on_the_same_parameters():
    """Its scale, sigmoid(s + 2) + 1e-3 from data to noise, is ours but for the last."""
    dim, hidden = 5, 12
    transform = stirred(flows.AffineAutoregressive(dim, "sigmoid", hidden=(hidden, hidden)))
    peer = _as_nflows(transform, hidden)
    made = peer.autoregressive_net
    ours = transform.conditioner.layers
    with torch.no_grad():
        theirs = [made.initial_layer, made.blocks[0].linear, made.final_layer]
        degrees = made.initial_layer.degrees  # 1, 2, 3, 4, 1, ...; ours are sorted
        order = degrees.argsort(stable=True)
        back = order.argsort()
        ours_degrees = degrees[order]
        theirs[0].weight.copy_(ours[0].weight[back])
        theirs[0].bias.copy_(ours[0].bias[back])
        theirs[1].weight.copy_(ours[1].weight[back][:, back])
        theirs[1].bias.copy_(ours[1].bias[back])
        rows = torch.arange(2 * dim).view(2, dim).T.flatten()  # scale, then shift, of each column
        rows = rows.view(dim, 2).flip(1).flatten()
        theirs[2].weight.copy_(ours[2].weight[rows][:, back])
        theirs[2].bias.copy_(ours[2].bias[rows])
    assert torch.equal(ours_degrees, transform.conditioner.layers[0].mask.sum(1).long())
    x = torch.randn(6, dim, dtype=torch.float64)
    numbers = peer.autoregressive_net(x).view(6, dim, 2)
    shift, scale = transform.conditioner(x).chunk(2, -1)
    torch.testing.assert_close(numbers[..., 1], shift)
    torch.testing.assert_close(numbers[..., 0], scale)


def test_the_first_column_knows_the_context_as_in_nflows_it_does_not():
    torch.manual_seed(0)
    transform = stirred(flows.AffineAutoregressive(3, hidden=(8,), context_dim=2))
    peer = _as_nflows(transform, 8)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def moved(call):
        return (call(x, context)[0] - call(x, context + 1.0)[0])[:, 0].abs().max()

    assert moved(peer.forward) == 0.0
    assert moved(transform.inverse_and_log_det) > 1e-3


# --- batch normalisation, images ------------------------------------------------------------------


def test_batchnorm_takes_its_batch_in_training_and_its_running_values_after():
    norm = flows.BatchNorm(3, momentum=1.0).double()
    x = 5.0 + 2.0 * torch.randn(1000, 3, dtype=torch.float64)
    z, log_det = norm.inverse_and_log_det(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0.0)
    variance = x.var(0, correction=0)
    torch.testing.assert_close(log_det[0], -0.5 * (variance + 1e-5).log().sum())
    norm.eval()
    torch.testing.assert_close(norm.inverse_and_log_det(x), (z, log_det))  # momentum is 1
    torch.testing.assert_close(norm.forward_and_log_det(z)[0], x)
    norm.train()
    few = x[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: norm.inverse_and_log_det(t), (few,))


def test_an_image_flow_is_a_density_and_goes_both_ways():
    flow = stirred(flows.glow_like((2, 8, 4), levels=2, length=2, hidden=(6,)), by=0.1)
    x = torch.rand(5, 3, 2, 8, 4, dtype=torch.float64)
    z, log_det = flow.inverse_and_log_det(x)
    assert z.shape == (5, 3, 64)
    back, minus = flow.forward_and_log_det(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_det)
    image = x[0, 0]
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.inverse_and_log_det(x)[0], image)
    exact = torch.linalg.slogdet(jacobian.view(64, 64))[1]
    assert abs(exact - log_det[0, 0]) <= 1e-10
    samples, log_prob = flow.rsample_and_log_prob(4)
    assert samples.shape == (4, 2, 8, 4)
    torch.testing.assert_close(flow.log_prob(samples), log_prob)
    assert flow.log_prob(torch.zeros(0, 2, 8, 4, dtype=torch.float64)).shape == (0,)


@pytest.mark.parametrize("make", [flows.planar_posterior, flows.iaf_posterior])
def test_posteriors_are_reparameterized_and_know_their_density(make):
    torch.manual_seed(0)
    posterior = stirred(make(3, context_dim=4), by=0.1)
    context = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    z, log_q = posterior.rsample_and_log_prob(5, context)
    assert z.shape == (5, 6, 3)
    torch.testing.assert_close(posterior.log_prob(z, context), log_q, atol=1e-6, rtol=0.0)
    (grad,) = torch.autograd.grad((log_q + z.square().sum(-1)).sum(), context)
    assert bool((grad != 0.0).any(-1).all())
