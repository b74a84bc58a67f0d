"""Planar, radial, Householder and Sylvester flows: what test_ops.py does not say of them."""

import math

import pytest
import torch
from torch.nn.functional import softplus

import fastvae
from fastvae import reference

FLOWS = ("planar_flow", "radial_flow", "householder_flow")


def parameters(
    name: str, lines: tuple[int, ...], dims: int, seed: int = 0, dtype=torch.float64
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    vectors, numbers = {"planar_flow": (2, 1), "radial_flow": (1, 2)}.get(name, (1, 0))
    of_steps = [draw(*lines, dims) / dims**0.5 for _ in range(vectors)]
    return [*of_steps, *(draw(*lines) for _ in range(numbers))]


def rows(*shape: int, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dims", [1, 2, 7, 20])
def test_log_det_is_that_of_the_jacobian(name: str, dims: int) -> None:
    flow, given, z = getattr(fastvae, name), parameters(name, (5,), dims), rows(6, dims)
    _, log_det = flow(z, *given)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda x: flow(x, *given)[0], x) for x in z]
    )
    assert (log_det - torch.linalg.slogdet(jacobians).logabsdet).abs().max() <= 1e-10


@pytest.mark.parametrize("name", FLOWS)
def test_a_stack_is_its_steps(name: str) -> None:
    flow, given, z = getattr(fastvae, name), parameters(name, (6,), 3), rows(40, 3)
    stacked, log_det = flow(z, *given)
    total = torch.zeros_like(log_det)
    for k in range(6):
        z, one = flow(z, *(p[k : k + 1] for p in given))
        total += one
    torch.testing.assert_close(stacked, z, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(log_det, total, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(
    ("z_rows", "lines"),
    [
        ((4, 5), (5,)),
        ((5,), (4, 5)),
        ((4, 1), (5,)),
        ((4, 5), (1, 5)),
        ((4, 5), (4, 1)),
        ((), (3,)),
    ],
    ids=str,
)
def test_lines_broadcast_with_rows(
    name: str, z_rows: tuple[int, ...], lines: tuple[int, ...]
) -> None:
    """Samples may share the lines of their datapoint; what was shared sums its gradient."""
    flow, given, z = getattr(fastvae, name), parameters(name, (*lines, 2), 3), rows(*z_rows, 3)
    inputs = [x.requires_grad_() for x in (z, *given)]
    shape = torch.broadcast_shapes(z_rows, lines)
    expanded = [z.expand(*shape, 3)]
    expanded += [p.expand(*shape, *p.shape[len(lines) :]) for p in given]
    results = [flow(*inputs), flow(*(x.contiguous() for x in expanded))]
    for a, b in zip(*results, strict=True):
        assert a.shape[: len(shape)] == shape
        assert torch.equal(a, b)
    weights = rows(*shape)
    gradients = [
        torch.autograd.grad((z.sum(-1) * weights + log_det.square()).sum(), inputs)
        for z, log_det in results
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dot", [-1e4, -100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0, 1e4])
def test_planar_steps_are_invertible_whatever_w_and_u(dot: float, dtype: torch.dtype) -> None:
    """w.z rises with itself, the determinant is positive, and all of it is finite."""
    w = torch.tensor([[0.6, -0.8, 0.0]], dtype=dtype)
    inputs = [torch.linspace(-4, 4, 101, dtype=dtype).unsqueeze(-1) * w, dot * w, w]
    inputs = [x.requires_grad_() for x in (*inputs, torch.zeros(1, dtype=dtype))]
    z, log_det = fastvae.planar_flow(*inputs)
    along = (z @ w[0]).detach()
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    exact = fastvae.planar_flow(*(x.detach().double() for x in inputs))
    assert ((exact[0] @ w[0].double()).diff() > 0).all()
    assert (along.diff() >= 0).all()
    torch.testing.assert_close(log_det.double(), exact[1], rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), inputs):
        assert gradient.isfinite().all()


def test_a_planar_step_without_direction_is_a_translation() -> None:
    inputs = [x.requires_grad_() for x in (rows(4, 3), rows(1, 3), torch.zeros(1, 3).double())]
    b = torch.ones(1, dtype=torch.float64, requires_grad=True)
    z, log_det = fastvae.planar_flow(*inputs, b)
    torch.testing.assert_close(z, inputs[0] + math.tanh(1.0) * inputs[1])
    assert torch.equal(log_det, torch.zeros(4).double())
    back, undone = fastvae.planar_flow(z, *inputs[1:], b, inverse=True)
    torch.testing.assert_close(back, inputs[0])
    assert torch.equal(undone, torch.zeros(4).double())
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), [*inputs, b]):
        assert gradient.isfinite().all()


def test_radial_steps_fix_their_centre_and_are_the_identity_at_alpha_is_beta() -> None:
    center, alpha, beta = rows(1, 4), torch.tensor([0.3]), torch.tensor([1.7])
    inputs = [x.double().requires_grad_() for x in (center.clone(), center, alpha, beta)]
    z, log_det = fastvae.radial_flow(*inputs)
    assert torch.equal(z, center)
    stretch = softplus(beta) / softplus(alpha)
    torch.testing.assert_close(log_det, 4 * stretch.double().log(), rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), inputs):
        assert gradient.isfinite().all()
    z, log_det = fastvae.radial_flow(rows(5, 4), center, alpha.double(), alpha.double())
    assert torch.equal(z, rows(5, 4))
    assert not log_det.any()


@pytest.mark.parametrize("alpha", [-200.0, -20.0, 0.0, 20.0, 200.0])
@pytest.mark.parametrize("beta", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_radial_steps_are_invertible_whatever_alpha_and_beta(alpha: float, beta: float) -> None:
    """A ray from the centre is mapped onto itself, in its order."""
    ray = torch.linspace(0.01, 8, 200, dtype=torch.float64).unsqueeze(-1) * torch.ones(3)
    settings = [torch.zeros(1, 3), torch.tensor([alpha]), torch.tensor([beta])]
    inputs = [x.double().requires_grad_() for x in (ray, *settings)]
    z, log_det = fastvae.radial_flow(*inputs)
    assert (z.diff(dim=0) > 0).all()
    assert log_det.isfinite().all()
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), inputs):
        assert gradient.isfinite().all()
    z, log_det = fastvae.radial_flow(*(x.detach().float() for x in inputs))
    assert (z.diff(dim=0) >= 0).all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("planar_flow", (dot, 0.0)) for dot in (-60.0, -30.0, -18.0, -10.0, 40.0)),
        *(("radial_flow", ab) for ab in ((0.0, -60.0), (20.0, -200.0), (5.0, -87.0), (-28.0, 0.0))),
    ],
    ids=str,
)
def test_op_and_twin_agree_where_a_step_all_but_folds(
    name: str, settings: tuple[float, float], dtype: torch.dtype
) -> None:
    """At the point where it does; the twin serves torch.func and double backward."""
    if name == "planar_flow":
        w = torch.tensor([[0.6, -0.8, 0.0]])
        inputs = [torch.zeros(1, 3), settings[0] * w, w, torch.zeros(1)]
    else:
        inputs = [torch.zeros(1, 3), torch.zeros(1, 3), *(torch.tensor([x]) for x in settings)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    results = []
    for module in (fastvae, reference):
        z, log_det = getattr(module, name)(*inputs)
        gradients = torch.autograd.grad(z.sum() + log_det.sum(), inputs)
        results.append((z, log_det, *gradients))
    rtol = 2e-5 if dtype == torch.float32 else 1e-11
    # past the smallest float32 the twin's clamp has no gradient, and the op's is finite
    beyond = dtype == torch.float32 and settings in ((20.0, -200.0), (5.0, -87.0))
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.isfinite().all()
        if k < 2 or not beyond:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_a_very_short_w_overflows_nowhere() -> None:
    for size in (1e-10, 1e-17, 1e-20, 1e-25):
        w = torch.tensor([[size, 0.0, 0.0]])
        inputs = [torch.zeros(2, 3), torch.ones(1, 3), w, torch.zeros(1)]
        inputs = [x.requires_grad_() for x in inputs]
        z, log_det = fastvae.planar_flow(*inputs)
        assert z.isfinite().all()
        assert log_det.isfinite().all()
        gradients = torch.autograd.grad(log_det.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_shared_lines_keep_their_digits_over_many_rows(name: str) -> None:
    """Equal rows, whose sum errs the most: each rounding is the same."""
    count = 400_000
    given = [p.requires_grad_() for p in parameters(name, (2,), 1, dtype=torch.float32)]
    z = torch.full((count, 1), 0.37)
    outputs = getattr(fastvae, name)(z, *given)
    found = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), given)
    exact = [p.detach().double().requires_grad_() for p in given]
    outputs = getattr(fastvae, name)(z[:1].double(), *exact)
    for a, b in zip(found, torch.autograd.grad(sum(x.sum() for x in outputs), exact), strict=True):
        torch.testing.assert_close(a.double(), count * b, rtol=1e-5, atol=1e-5 * count)


def test_many_rows_and_their_split() -> None:
    """More blocks of rows than chunks that the gradients of shared lines are summed by."""
    given = [p.requires_grad_() for p in parameters("planar_flow", (3,), 5)]
    z = rows(5000, 5)
    outputs = fastvae.planar_flow(z, *given)
    gradients = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), given)
    parts = [fastvae.planar_flow(x, *given) for x in z.split([1, 1999, 3000])]
    for a, b in zip(outputs, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))
    total = sum(z.sum() + log_det.sum() for z, log_det in parts)
    for a, b in zip(gradients, torch.autograd.grad(total, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# --- inverses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("amortised", [False, True], ids=["shared", "own"])
def test_an_inverse_undoes_the_flow_either_way_round(name: str, amortised: bool) -> None:
    """To 1e-5 in float32."""
    lead = (50,) if amortised else ()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        flow, z = getattr(fastvae, name), rows(50, 8, dtype=dtype)
        given = parameters(name, (*lead, 12), 8, dtype=dtype)
        for first in (False, True):
            moved, log_det = flow(z, *given, inverse=first)
            back, undone = flow(moved, *given, inverse=not first)
            assert (back - z).abs().max() <= tolerance
            assert (log_det + undone).abs().max() <= 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dot", [-1e4, -100.0, -10.0, -5.0, -1.0, 0.0, 1.0, 30.0, 100.0, 1e4, 1e7])
def test_planar_inverses_are_as_good_as_their_conditioning(dot: float, dtype: torch.dtype) -> None:
    """A rounding of the largest number on the way grows by 1 over the stretch."""
    eps = torch.finfo(dtype).eps
    w = torch.tensor([[0.6, -0.8, 0.0]], dtype=dtype)
    given = [dot * w, w, torch.full((1,), 0.1, dtype=dtype)]
    z = rows(4000, 3, dtype=dtype)
    x, log_det = fastvae.planar_flow(z, *given, inverse=True)
    again, forth = fastvae.planar_flow(x, *given)
    largest = max(4.0, abs(dot))  # of z, v and, where that is steep, the stretch
    assert (again - z).abs().max() <= 8 * eps * largest
    moved, _ = fastvae.planar_flow(z, *given)
    back, undone = fastvae.planar_flow(moved, *given, inverse=True)
    a = (z.double() @ w[0].double()) + 0.1
    gain = 1 + (math.log1p(math.exp(dot)) - 1 if dot < 30 else dot - 1) / a.cosh().square()
    # where it all but folds, z = x^3 / 3: what is within the cube root of a rounding looks alike
    error = (back - z).abs().amax(-1).double()
    allowed = (8 * eps * largest / gain.clamp(max=1.0)).clamp(max=4 * (eps * largest) ** (1 / 3))
    assert (error <= allowed).all()
    assert log_det.isfinite().all()
    assert undone.isfinite().all()
    assert forth.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [-200.0, -20.0, 0.0, 20.0, 200.0])
@pytest.mark.parametrize("beta", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_radial_inverses_are_as_good_as_their_conditioning(
    alpha: float, beta: float, dtype: torch.dtype
) -> None:
    eps, z = torch.finfo(dtype).eps, rows(2000, 3, dtype=dtype)
    given = [torch.zeros(1, 3), torch.tensor([alpha]), torch.tensor([beta])]
    given = [x.to(dtype) for x in given]
    for first in (False, True):  # around 0 nothing is lost near the centre, whatever the stretch
        moved, log_det = fastvae.radial_flow(z, *given, inverse=first)
        back, undone = fastvae.radial_flow(moved, *given, inverse=not first)
        stretch = (moved.norm(dim=-1) / z.norm(dim=-1)).double()
        along = log_det.double().exp() / stretch.square()  # the rest of the determinant
        error = (back - z).norm(dim=-1) / z.norm(dim=-1)
        assert (error <= 16 * eps * (stretch / along).clamp(min=1.0)).all()
        assert log_det.isfinite().all()
        assert undone.isfinite().all()
    center = fastvae.radial_flow(given[0], *given, inverse=True)
    assert torch.equal(center[0], given[0])


def test_the_planar_root_is_found_wherever_it_lies() -> None:
    """In one dimension the step is a + e tanh(a): from the tightest fold to the steepest step."""
    for dtype, most in ((torch.float32, 4), (torch.float64, 12)):
        eps, rim = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        dots = torch.cat(
            [-torch.logspace(-3, 1.3, 60), torch.zeros(1), torch.logspace(-3, most, 120)]
        )
        u = dots.to(dtype).reshape(-1, 1, 1)
        z = torch.cat([torch.logspace(-12, most + 1, 500), torch.zeros(1)]).to(dtype)
        given = [u, torch.ones_like(u), torch.zeros_like(u[..., 0])]
        a, log_det = fastvae.planar_flow(z.reshape(-1, 1, 1), *given, inverse=True)
        assert log_det.isfinite().all()
        a, z = a.squeeze(-1).double(), z.double().unsqueeze(-1)
        e = softplus(dots.to(dtype).double(), threshold=40.0).clamp(min=rim) - 1.0
        rise = e * a.tanh()
        # a itself may be lost within the cube root, below which a - tanh(a) rounds as much as it is
        lost = torch.where(e < 0.0, (3.0 * z).pow(1 / 3).clamp(max=1.0), 0.0)
        steep = 1.0 + e.clamp(min=0.0) * (1 - a.tanh().square())
        slack = (a.abs() + lost + z + rise.abs()) * steep
        assert ((a + rise - z).abs() <= 8 * eps * slack + rim).all()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dims", [1, 3])
def test_gradients_of_an_inverse_are_those_of_the_implicit_function(name: str, dims: int) -> None:
    """From the forward op's own Jacobians, of both outputs: dx = J^-1 (dy - F_p dp)."""
    given, y = parameters(name, (4,), dims), rows(5, dims)
    flow, jacobian = getattr(fastvae, name), torch.autograd.functional.jacobian
    inputs = [t.clone().requires_grad_() for t in (y, *given)]
    x, log_det = flow(*inputs, inverse=True)
    g, m = rows(5, dims), rows(5)
    found = torch.autograd.grad((x, log_det), inputs, (g, m))
    total = [torch.zeros_like(p) for p in given]
    for i in range(5):
        of_z, *of_given = zip(*jacobian(flow, (x[i].detach(), *given)), strict=True)
        along = torch.linalg.solve(of_z[0].T, g[i] - m[i] * of_z[1])
        torch.testing.assert_close(found[0][i], along, rtol=1e-10, atol=1e-10)
        for sum_, (of_value, of_log_det) in zip(total, of_given, strict=True):
            sum_ -= torch.tensordot(along, of_value, 1) + m[i] * of_log_det
    for a, b in zip(found[1:], total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_no_number_has_no_inverse_that_looks_like_one(name: str, bad: float) -> None:
    z = rows(3, 4)
    z[1, 2] = bad
    x, _ = getattr(fastvae, name)(z, *parameters(name, (3,), 4), inverse=True)
    assert x[[0, 2]].isfinite().all()
    assert not x[1, 2].isfinite()


def test_third_derivatives_of_an_inverse() -> None:
    """The twin knows them too: d^3/dc^3 of a(c), where a + e tanh(a) = c."""
    given = parameters("planar_flow", (1,), 1)

    def value(y: torch.Tensor) -> torch.Tensor:
        return fastvae.planar_flow(y, *given, inverse=True)[0].sum()

    def second(y: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: torch.func.grad(value)(y).sum())(y)

    y = torch.tensor([0.7], dtype=torch.float64)
    step = 1e-5
    slope = (second(y + step) - second(y - step)) / (2 * step)
    third = torch.func.grad(lambda y: second(y).sum())(y)
    torch.testing.assert_close(third, slope, rtol=1e-6, atol=1e-6)


# --- Householder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-22, 1e-15, 1.0, 1e15, 1e22])
def test_a_reflection_is_of_a_direction_if_there_is_one(size: float) -> None:
    z, v = rows(4, 3, dtype=torch.float32), rows(2, 3)
    given = (size * v).float().requires_grad_()
    x, log_det = fastvae.householder_flow(z, given)
    square = size * size * v.square().sum(-1)
    info = torch.finfo(torch.float32)
    normal = ((square >= info.tiny) & (square <= info.max)).all()
    expected = fastvae.householder_flow(z.double(), v)[0].float() if normal else z
    torch.testing.assert_close(x, expected)
    assert torch.equal(log_det, torch.zeros(4))
    assert torch.autograd.grad(x.sum(), given)[0].isfinite().all()


# --- Sylvester ------------------------------------------------------------------------------------


def sylvester(
    lead: tuple[int, ...], dims: int, rank: int, dtype=torch.float64, scale: float = 1.0
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(dims)
    shapes = [(dims, rank), (rank, rank), (rank, rank), (rank,)]
    q, *rest = (torch.randn(*lead, *x, generator=g, dtype=torch.float64) for x in shapes)
    return [x.to(dtype) for x in (fastvae.householder_columns(q), *(scale * x for x in rest))]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("dims", "rank"), [(1, 1), (5, 1), (3, 3), (7, 2), (20, 17), (5, 0)])
def test_sylvester_log_det_is_that_of_the_jacobian(dims: int, rank: int, inverse: bool) -> None:
    given, z = sylvester((4,), dims, rank), rows(5, dims)
    _, log_det = fastvae.sylvester_flow(z, *given, inverse=inverse)

    def jacobian(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(
            lambda x: fastvae.sylvester_flow(x, *given, inverse=inverse)[0], x
        )

    jacobians = torch.stack([jacobian(x) for x in z])
    assert (log_det - torch.linalg.slogdet(jacobians).logabsdet).abs().max() <= 1e-10


def test_a_sylvester_step_of_rank_one_is_a_planar_step() -> None:
    q, r, s, b = sylvester((3,), 4, 1)
    z, log_det = fastvae.sylvester_flow(rows(6, 4), q, r, s, b)
    product = (r.tanh() * s.tanh())[:, 0, 0]
    w = s.tanh()[:, 0] * q[..., 0]
    dot = torch.log(torch.expm1(1 + product))  # whose softplus is 1 + it
    expected = fastvae.planar_flow(
        rows(6, 4), (dot / w.square().sum(-1)).unsqueeze(-1) * w, w, b[:, 0]
    )
    torch.testing.assert_close(z, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(3,), (40, 3)], ids=["shared", "own"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("dims", "rank"), [(17, 16), (40, 33), (64, 16)])
def test_sylvester_op_and_twin_agree(
    lead, dims: int, rank: int, inverse: bool, dtype: torch.dtype
) -> None:
    inputs = [rows(40, dims), *sylvester(lead, dims, rank, scale=0.3)]
    exact = [x.requires_grad_() for x in inputs]
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    results = []
    for function, arguments in (
        (fastvae.sylvester_flow, inputs),
        (reference.sylvester_flow, exact),
    ):
        z, log_det = function(*arguments, inverse)
        loss = (z * rows(40, dims)).sum() + (log_det * rows(40)).sum()
        results.append((z, log_det, *torch.autograd.grad(loss, arguments)))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def test_sylvester_lines_broadcast_with_rows() -> None:
    """Samples may share the lines of their datapoint; what was shared sums its gradient."""
    for z_rows, lead in (((4, 5), (5,)), ((4, 1), (5,)), ((4, 5), (4, 1)), ((), (3,))):
        given = sylvester((*lead, 2), 5, 2)
        inputs = [x.requires_grad_() for x in (rows(*z_rows, 5), *given)]
        shape = torch.broadcast_shapes(z_rows, lead)
        full = [inputs[0].expand(*shape, 5)]
        full += [p.expand(*shape, *p.shape[len(lead) :]).contiguous() for p in inputs[1:]]
        gradients = []
        for arguments in (inputs, full):
            z, log_det = fastvae.sylvester_flow(*arguments)
            assert z.shape[:-1] == log_det.shape == shape
            loss = (z.sum(-1) * rows(*shape) + log_det.square()).sum()
            gradients.append(torch.autograd.grad(loss, inputs))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 10.0, 30.0, 1e4])
def test_sylvester_steps_are_invertible_whatever_the_diagonals(size, dtype: torch.dtype) -> None:
    """Each product of two may come as close to -1 as the type knows, and all stays finite."""
    q, _, _, b = sylvester((2,), 4, 3, dtype)
    inputs = [rows(30, 4, dtype=dtype), q, size * torch.eye(3, dtype=dtype).expand(2, 3, 3)]
    inputs += [-inputs[2], torch.zeros_like(b)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    z, log_det = fastvae.sylvester_flow(*inputs)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    for gradient in torch.autograd.grad(z.sum() + log_det.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lead", [(12,), (50, 12)], ids=["shared", "own"])
@pytest.mark.parametrize(("dims", "rank"), [(1, 1), (8, 1), (8, 8), (33, 17)])
def test_a_sylvester_inverse_undoes_the_flow_either_way_round(lead, dims: int, rank: int) -> None:
    """To 1e-5 in float32."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        given = sylvester(lead, dims, rank, dtype, scale=0.5 / rank**0.5)
        z = rows(50, dims, dtype=dtype)
        for first in (False, True):
            moved, log_det = fastvae.sylvester_flow(z, *given, inverse=first)
            back, undone = fastvae.sylvester_flow(moved, *given, inverse=not first)
            assert (back - z).abs().max() <= tolerance
            assert (log_det + undone).abs().max() <= tolerance
            assert (moved - z).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("size", [1.0, 4.0, 30.0, 1e4])
def test_sylvester_inverses_are_right_or_finite_whatever_the_diagonals(
    size: float, signs: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sent where they came from: a step stretches little, and never grows an error much."""
    eps = torch.finfo(dtype).eps
    q, r, s, b = sylvester((2,), 4, 3, dtype)
    for x, sign in zip((r, s), signs, strict=True):
        x.diagonal(dim1=-2, dim2=-1).fill_(sign * size)
    inputs = [x.requires_grad_() for x in (rows(300, 4, dtype=dtype), q, r, s, b)]
    x, log_det = fastvae.sylvester_flow(*inputs, inverse=True)
    again, forth = fastvae.sylvester_flow(x, *inputs[1:])
    assert (again - inputs[0]).abs().max() <= 40 * eps
    assert (log_det + forth).abs().max() <= 100 * eps
    for gradient in torch.autograd.grad(x.sum() + log_det.sum(), inputs):
        assert gradient.isfinite().all()
    # and where all elements fold at once, those of the last step
    fold = torch.zeros_like(inputs[0][:1]), q[-1:], r[-1:], s[-1:], torch.zeros_like(b[-1:])
    x, log_det = fastvae.sylvester_flow(*fold, inverse=True)
    assert torch.equal(x, fold[0])
    assert log_det.isfinite().all()
    expected = fastvae.sylvester_flow(*fold)[1]
    torch.testing.assert_close(-log_det, expected, rtol=2 * eps, atol=2 * eps)


def test_gradients_of_a_sylvester_inverse_are_those_of_the_implicit_function() -> None:
    """Along orthonormal columns: from the forward op's own Jacobians of both outputs."""
    free, r, s, b = rows(3, 5, 2), *sylvester((3,), 5, 2, scale=0.7)[1:]
    y, jacobian = rows(4, 5), torch.autograd.functional.jacobian

    def flow(z: torch.Tensor, free: torch.Tensor, *given: torch.Tensor, inverse: bool = False):
        return fastvae.sylvester_flow(z, fastvae.householder_columns(free), *given, inverse)

    inputs = [t.clone().requires_grad_() for t in (y, free, r, s, b)]
    x, log_det = flow(*inputs, inverse=True)
    g, m = torch.flip(rows(4, 5), (0,)), rows(4)
    found = torch.autograd.grad((x, log_det), inputs, (g, m))
    total = [torch.zeros_like(p) for p in (free, r, s, b)]
    for i in range(4):
        of_z, *of_given = zip(*jacobian(flow, (x[i].detach(), free, r, s, b)), strict=True)
        along = torch.linalg.solve(of_z[0].T, g[i] - m[i] * of_z[1])
        torch.testing.assert_close(found[0][i], along, rtol=1e-10, atol=1e-10)
        for sum_, (of_value, of_log_det) in zip(total, of_given, strict=True):
            sum_ -= torch.tensordot(along, of_value, 1) + m[i] * of_log_det
    for a, e in zip(found[1:], total, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lead", [(2,), (2, 1)], ids=["shared", "own"])
def test_a_sylvester_inverse_is_differentiable_twice(lead) -> None:
    inputs = [rows(2, 3), *sylvester(lead, 3, 2, scale=0.7)]
    inputs = [x.requires_grad_() for x in inputs]

    def inverse(*inputs: torch.Tensor):
        return fastvae.sylvester_flow(*inputs, inverse=True)

    assert torch.autograd.gradcheck(inverse, inputs)
    assert torch.autograd.gradgradcheck(inverse, inputs, fast_mode=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_no_number_has_no_sylvester_inverse_that_looks_like_one(bad: float) -> None:
    z = rows(3, 4)
    z[1, 2] = bad
    x, _ = fastvae.sylvester_flow(z, *sylvester((3,), 4, 2), inverse=True)
    assert x[[0, 2]].isfinite().all()
    assert not x[1, 2].isfinite()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_many_rows_of_a_sylvester_flow_and_their_split(inverse: bool) -> None:
    given = [p.requires_grad_() for p in sylvester((3,), 5, 2)]
    z = rows(5000, 5)
    outputs = fastvae.sylvester_flow(z, *given, inverse)
    gradients = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), given)
    parts = [fastvae.sylvester_flow(x, *given, inverse) for x in z.split([1, 1999, 3000])]
    for a, b in zip(outputs, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))
    total = sum(z.sum() + log_det.sum() for z, log_det in parts)
    for a, b in zip(gradients, torch.autograd.grad(total, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_householder_columns_are_orthonormal_whatever_the_parameters(rank: int) -> None:
    for size in (0.0, 1e-8, 1.0, 1e6):
        x = (size * rows(3, 6, rank)).requires_grad_()
        q = fastvae.householder_columns(x)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(q.mT @ q, eye.expand(3, rank, rank), rtol=0, atol=1e-13)
        (gradient,) = torch.autograd.grad((q * rows(3, 6, rank)).sum(), x)
        assert gradient.isfinite().all()
    x = rows(2, 4, min(rank, 3)).requires_grad_()
    assert torch.autograd.gradcheck(fastvae.householder_columns, [x])


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_orthogonal_columns_are_the_nearest_orthonormal_ones(rank: int) -> None:
    for size in (1e-30, 1.0, 1e30):
        x = size * rows(3, 6, rank)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        q = fastvae.orthogonal_columns(x.requires_grad_())
        torch.testing.assert_close(q, u @ vh, rtol=0, atol=1e-13)
        (gradient,) = torch.autograd.grad((q * rows(3, 6, rank)).sum(), x)
        assert gradient.isfinite().all()
        q = fastvae.orthogonal_columns(x.detach().float())
        torch.testing.assert_close(q, (u @ vh).float(), rtol=0, atol=1e-5)
    x = rows(2, 6, rank).requires_grad_()
    assert torch.autograd.gradcheck(fastvae.orthogonal_columns, [x])
    half = x.detach().bfloat16()
    with torch.autocast("cpu"):
        q = fastvae.orthogonal_columns(half)
    assert torch.equal(q, fastvae.orthogonal_columns(half.float()).bfloat16())
    for shape in ((0, 5, 2), (2, 5, 0)):
        assert fastvae.orthogonal_columns(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("singular", [1e-3, 1e-6])
def test_orthogonal_columns_of_nearly_dependent_ones(singular: float) -> None:
    u, _, vh = torch.linalg.svd(rows(8, 4), full_matrices=False)
    x = u * torch.tensor([1.0, 1.0, 0.1, singular], dtype=torch.float64) @ vh
    torch.testing.assert_close(fastvae.orthogonal_columns(x), u @ vh, rtol=0, atol=1e-9)


def test_columns_of_half_types_are_computed_in_float32() -> None:
    x = rows(2, 6, 3).bfloat16()
    q = fastvae.householder_columns(x)
    assert torch.equal(q, fastvae.householder_columns(x.float()).bfloat16())


def test_wrong_shapes_of_a_sylvester_flow_raise_and_name_the_argument() -> None:
    z, (q, r, s, b) = rows(4, 5), sylvester((2,), 5, 3)

    def fails(message: str, *arguments: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=f"fastvae::sylvester_flow: {message}"):
            fastvae.sylvester_flow(*arguments)

    fails(r"q must be \[..., K, D, M\] for the D of z, got \[2, 3, 5\] and", z, q.mT, r, s, b)
    fails(r"q must be \[..., K, D, M\] for the D of z, got \[5, 3\] and", z, q[0], r, s, b)
    fails(r"q must have at least one step, got \[0, 5, 3\]", z, q[:0], r[:0], s[:0], b[:0])
    fails(r"q must have no more columns than rows, got \[2, 5, 6\]", z, rows(2, 5, 6), r, s, b)
    fails(r"r must be \[..., K, M, M\] for the q of .*, got \[2, 2, 3\] and", z, q, r[:, 1:], s, b)
    fails(r"s must be \[..., K, M, M\] for the q of .*, got \[1, 3, 3\] and", z, q, r, s[:1], b)
    fails(r"b must be \[..., K, M\] for the q of .*, got \[2, 2\] and", z, q, r, s, b[:, 1:])
    own = sylvester((5, 2), 5, 3)
    fails(r"q must broadcast with z in its leading dimensions, got \[5, 2, 5, 3\]", z, *own)


# --- against normflows, with the same parameters --------------------------------------------------


def test_normflows_planar_where_it_is_right_and_where_it_overflows() -> None:
    planar = pytest.importorskip("normflows").flows.Planar
    u, w, b = parameters("planar_flow", (1,), 3)
    z = rows(20, 3)
    theirs = planar((3,), u=u, w=w, b=b)(z)
    for a, e in zip(fastvae.planar_flow(z, u, w, b), theirs, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-12)
    # log(1 + e^x) is infinite where w.u is 100
    w = torch.tensor([[1.0, 0.0, 0.0]])
    steep = [100.0 * w, w, torch.zeros(1)]
    assert not planar((3,), u=steep[0], w=w, b=steep[2])(z.float())[0].isfinite().all()
    assert all(x.isfinite().all() for x in fastvae.planar_flow(z.float(), *steep))


def test_pythae_planar_is_ours_where_it_can_be_inverted_and_where_it_cannot() -> None:
    peers = pytest.importorskip("pythae.models.normalizing_flows", exc_type=ImportError)
    flow = peers.PlanarFlow(peers.PlanarFlowConfig(input_dim=(2,), activation="tanh")).double()
    w, b = torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1).double()

    def theirs(z: torch.Tensor, along: float) -> tuple[torch.Tensor, torch.Tensor]:
        flow.u.data, flow.w.data, flow.b.data = along * w, w, b
        out = flow(z)
        return out.out.detach(), out.log_abs_det_jac.detach()

    def ours(z: torch.Tensor, along: float) -> tuple[torch.Tensor, torch.Tensor]:
        return fastvae.planar_flow(z, along * w, w, b)

    # It takes u as it is; ours makes softplus(w.u) - 1 of w.u. And it adds 1e-4 to a determinant.
    z = rows(20, 2)
    moved, log_det = ours(z, 0.3)
    expected, other = theirs(z, softplus(torch.tensor(0.3, dtype=torch.float64)).item() - 1.0)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((log_det.exp() + 1e-4).log(), other, rtol=1e-12, atol=1e-12)
    # With w.u = -3 it folds the line: what was on the right comes to lie left of the middle.
    line = torch.stack([torch.linspace(-3, 3, 101), torch.zeros(101)], -1).double()
    assert (theirs(line, -3.0)[0][:, 0].diff() < 0).any()
    assert (ours(line, -3.0)[0][:, 0].diff() > 0).all()


def test_normflows_radial_where_it_is_right_and_where_it_overflows() -> None:
    radial = pytest.importorskip("normflows").flows.Radial
    center, alpha, beta = parameters("radial_flow", (1,), 3)
    z, theirs = rows(20, 3), radial((3,), z_0=center)
    theirs.alpha.data = softplus(alpha).reshape(theirs.alpha.shape)
    theirs.beta.data = beta.reshape(theirs.beta.shape)
    for a, e in zip(fastvae.radial_flow(z, center, alpha, beta), theirs(z), strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-12)
    theirs.float().beta.data.fill_(100.0)
    assert not theirs(z.float())[0].isfinite().all()
    given = [x.float() for x in (center, alpha, torch.tensor([100.0]))]
    assert all(x.isfinite().all() for x in fastvae.radial_flow(z.float(), *given))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_wrong_shapes_raise_and_name_the_argument(name: str) -> None:
    flow = getattr(fastvae, name)
    first, last = {"planar_flow": ("u", "b"), "radial_flow": ("center", "beta")}.get(
        name, ("v", "")
    )
    z, given = rows(4, 3), parameters(name, (2,), 3)

    def fails(message: str, *arguments: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=f"fastvae::{name}: {message}"):
            flow(*arguments)

    wide = parameters(name, (2,), 5)
    fails(rf"{first} must be \[..., K, D\] for the D of z, got \[2, 5\] and \[4, 3\]", z, *wide)
    fails(rf"{first} must be \[..., K, D\] for the D of z, got \[3\]", z, given[0][0], *given[1:])
    none = parameters(name, (0,), 3)
    fails(rf"{first} must have at least one step, got \[0, 3\]", z, *none)
    if last:
        message = rf"{last} must have the shape of {first} without its last dimension, got \[1\]"
        fails(message, z, *given[:2], given[2][:1])
    if name == "planar_flow":
        fails(r"w must have the shape of u, got \[1, 3\]", z, given[0], given[1][:1], given[2])
    own = parameters(name, (5, 2), 3)
    fails(rf"{first} must broadcast with z in its leading dimensions, got \[5, 2, 3\]", z, *own)


@pytest.mark.parametrize("name", FLOWS)
def test_the_reference_takes_what_the_op_takes(name: str) -> None:
    given, z = parameters(name, (5, 2), 3), rows(4, 1, 3)
    expected = getattr(reference, name)(z, *given)
    for a, b in zip(getattr(fastvae, name)(z, *given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
