"""The kernel of affine autoregressive flows, fastvae::unroll_affine: what its twin in Python says.

The twin is :meth:`fastvae.flows.MADE.unroll`; what both are, D passes through the network, is in
test_flows.py, and so are the gradients. Here is what else may be asked of them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastvae
from fastvae import flows
from fastvae.flows.autoregressive import ACTIVATIONS, MAX_LAYERS
from fastvae.flows.element import KINDS

pytestmark = pytest.mark.skipif(fastvae._load.module is None, reason="no compiled module")

HIDDEN = [(), (1,), (3, 50), (64, 7, 20), (256, 256, 256)]
DIRECTIONS = [False, True]


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def transform(
    dim: int,
    hidden: tuple[int, ...],
    kind: str = "sigmoid",
    inverse: bool = False,
    dtype: torch.dtype = torch.float64,
    **others,
) -> flows.Autoregressive:
    """Of weights that keep their units' size, and scales near 1: it amplifies no error."""
    given = "noise" if inverse else "data"
    flow = flows.AffineAutoregressive(dim, kind, given=given, hidden=hidden, **others)
    for p in flow.parameters():
        p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]))
    for p in (flow if not hidden else flow.conditioner.layers[-1]).parameters():
        p.mul_(0.1)
    return flow.to(dtype).eval()


def by_kernel(flow, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    inverse = flow.given == "noise"
    got = flow.conditioner.unroll_affine(z, flow.element.kind, inverse, context)
    assert got is not None
    return got


def by_twin(flow, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    inverse = flow.given == "noise"
    return flow.conditioner.unroll(z, lambda x, n: flow.element(x, n, inverse), context)


def by_passes(flow, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = torch.zeros_like(z)
    for _ in range(z.shape[-1]):
        x, log_det = flow.element(z, flow.conditioner(x, context), flow.given == "noise")
    return x, log_det


def assert_close(got, want, tolerance: float) -> None:
    """To `tolerance`, relative to the largest there is."""
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        torch.testing.assert_close(x.double(), y.double(), rtol=0.0, atol=tolerance * scale)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_values_of_every_network(dim, hidden, context_dim):
    for batch in (0, 1, 3, 17, 512):
        context = torch.randn(batch, context_dim).double() if context_dim else None
        for inverse in DIRECTIONS:
            flow = transform(dim, hidden, inverse=inverse, context_dim=context_dim)
            z = torch.randn(batch, dim, dtype=torch.float64)
            got = by_kernel(flow, z, context)
            assert_close(got, by_twin(flow, z, context), 1e-12)
            if batch <= 17:
                assert_close(got, by_passes(flow, z, context), 1e-12)
            exact, narrow = got, flow.float()
            got = by_kernel(narrow, z.float(), None if context is None else context.float())
            assert got[0].dtype == got[1].dtype == torch.float32
            # of float32, what its own weights give in float64
            exact = by_kernel(
                narrow.double(),
                z.float().double(),
                None if context is None else context.float().double(),
            )
            assert_close(got, exact, 1e-6)


@pytest.mark.parametrize("inverse", DIRECTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_kind_and_activation(kind, activation, inverse):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        flow = transform(7, (33, 20), kind, inverse, activation=activation)
        exact = by_passes(flow, z := 2.0 * torch.randn(37, 7, dtype=torch.float64))
        assert_close(by_kernel(flow, z), exact, 1e-12)
        flow, z = flow.to(dtype), z.to(dtype)
        got = by_kernel(flow, z)
        assert_close(got, by_passes(flow.double(), z.double()), tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_where_they_are_extreme(activation):
    """Through a network whose only unit is the shift of the second column."""
    extreme = [-1e30, -800.0, -100.0, -1.0, -1e-8, -0.0, 0.0, 1e-8, 1.0, 100.0, 800.0, 1e30]
    for dtype in (torch.float32, torch.float64):
        flow = transform(2, (1,), "additive", dtype=dtype, activation=activation)
        for p in flow.parameters():
            p.zero_()
        flow.conditioner.layers[0].weight[0, 0] = 1.0
        flow.conditioner.layers[1].weight[1, 0] = 1.0
        z = (
            torch.tensor([*extreme, math.inf, -math.inf], dtype=dtype).unsqueeze(1)
            * torch.tensor([1.0, 0.0]).to(dtype).nan_to_num()
        )
        z[:, 1] = 0.0
        got = by_kernel(flow, z)[0][:, 1]
        want = activation()(z[:, 0])
        eps = torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).tiny
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=tiny, equal_nan=True)


def test_half_types_compute_in_float32():
    flow = transform(5, (16, 16), dtype=torch.bfloat16, context_dim=2)
    z, context = torch.randn(20, 5).bfloat16(), torch.randn(20, 2).bfloat16()
    layers = flow.conditioner.layers
    arguments = (0, "sigmoid", False, "relu")
    sums = layers[0].bias + flow.conditioner.context(context)
    op = torch.ops.fastvae.unroll_affine
    x, log_det = op(z, [y.weight for y in layers], [y.bias for y in layers], sums, *arguments)
    assert (x.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)
    wide = op(
        z.float(),
        [y.weight.float() for y in layers],
        [y.bias.float() for y in layers],
        sums.float(),
        *arguments,
    )
    assert torch.equal(x, wide[0].bfloat16())
    assert torch.equal(log_det, wide[1])
    assert torch.equal(by_kernel(flow, z, context)[0], x)


def test_any_leading_dimensions_and_strides():
    flow = transform(5, (9, 9), context_dim=2)
    z, context = torch.randn(3, 4, 5).double(), torch.randn(4, 2).double()
    x, log_det = by_kernel(flow, z, context)
    flat = by_kernel(flow, z.view(12, 5), context.repeat(3, 1))
    assert torch.equal(x.view(12, 5), flat[0])
    assert torch.equal(log_det.view(12), flat[1])
    spread = torch.randn(5, 4, 6).double()[:, :, ::2].permute(2, 1, 0).copy_(z)
    assert not spread.is_contiguous()
    assert torch.equal(by_kernel(flow, spread, context)[0], x)
    assert torch.equal(by_kernel(flow, z[0, 0], context[0])[0], x[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [(), (64, 7, 20), (256, 256, 256)])
def test_threads_and_splits_change_no_bit(hidden, dtype):
    flow = transform(20, hidden, dtype=dtype, context_dim=2)
    z, context = torch.randn(205, 20, dtype=dtype), torch.randn(205, 2, dtype=dtype)
    # A product of torch's own depends on the split: the sums come as they are.
    made, layers = flow.conditioner, flow.conditioner.layers
    sums = made._first_sums(z, context)

    def call(rows: slice):
        weights, biases = [y.weight for y in layers], [y.bias for y in layers]
        return torch.ops.fastvae.unroll_affine(
            z[rows], weights, biases, sums[rows], made.least, "sigmoid", False, "relu"
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = call(slice(None))
        torch.set_num_threads(2)
        assert all(x.isfinite().all() for x in whole)
        for x, y in zip(call(slice(None)), whole, strict=True):
            assert torch.equal(x, y)
        cuts = [0, 1, 17, 33, 64, 70, 205]  # of one lane, one block, two, and some
        for first, last in pairwise(cuts):
            for x, y in zip(call(slice(first, last)), whole, strict=True):
                assert torch.equal(x, y[first:last])
    finally:
        torch.set_num_threads(threads)


def test_nan_stays_in_its_row():
    flow = transform(6, (20, 20))
    z = torch.randn(50, 6, dtype=torch.float64)
    clean = by_kernel(flow, z)
    for row in (0, 20, 49):
        spoilt = z.clone()
        spoilt[row, 2] = math.nan
        x, log_det = by_kernel(flow, spoilt)
        others = torch.arange(50) != row
        assert torch.equal(x[others], clean[0][others])
        assert torch.equal(log_det[others], clean[1][others])
        assert torch.equal(x[row, :2], clean[0][row, :2])
        assert x[row, 2:].isnan().all()
        assert log_det[row].isnan()


# --- which way a call goes ------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """How many calls of MADE.unroll_affine found a kernel."""
    found = []
    original = flows.MADE.unroll_affine

    def watched(*args):
        result = original(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(flows.MADE, "unroll_affine", watched)
    return found


def test_the_kernel_serves_with_and_without_gradients(launches):
    flow = transform(4, (8,), context_dim=2)
    z, context = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    with torch.enable_grad():
        flow(z, context)[0].sum().backward()  # of the parameters
        flow.requires_grad_(False)
        flow(z, context)
        flow(z, context.clone().requires_grad_())[0].sum().backward()
        flow(z.clone().requires_grad_(), context)[0].sum().backward()
    with torch.inference_mode():
        flow(z, context)
    with torch.autocast("cpu"):
        flow(z, context)
    assert launches == [True] * 5 + [False]


def test_the_twin_serves_transforms_of_functions(launches):
    flow = transform(4, (8,)).requires_grad_(False)
    z, tangent = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    want = flow(z)
    torch.testing.assert_close(torch.func.vmap(flow)(z), want)
    jacobian = torch.func.jacrev(lambda z: flow(z)[0])(z[0])
    torch.testing.assert_close(jacobian.diagonal().log().sum(), want[1][0])
    jacobian = torch.func.jacfwd(lambda z: flow(z)[0])(z[0])
    torch.testing.assert_close(jacobian.diagonal().log().sum(), want[1][0])
    with torch.enable_grad(), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(flow(forward_ad.make_dual(z, tangent))[0])
    torch.testing.assert_close(moved.tangent[0], jacobian @ tangent[0])
    assert launches == [True, False, False, False, False]


@pytest.mark.parametrize(
    "activation",
    [nn.Softplus, lambda: nn.ELU(0.5), lambda: nn.LeakyReLU(0.2), type("Own", (nn.ReLU,), {})],
)
def test_the_twin_serves_other_activations(activation, launches):
    flow = transform(4, (8,), activation=activation)
    z = torch.randn(3, 4, dtype=torch.float64)
    assert_close(flow(z), by_passes(flow, z), 1e-12)
    assert launches == [False]


def test_the_twin_serves_other_elements_and_deep_networks(launches):
    class Doubled(flows.Affine):
        def __call__(self, x, parameters, inverse):
            y, log_det = super().__call__(x, parameters, inverse)
            return 2.0 * y, log_det

    flow = flows.Autoregressive(3, Doubled("exp")).double()
    z = torch.randn(3, 3, dtype=torch.float64)
    assert torch.equal(flow(z)[0], 2.0 * z)
    assert launches == []
    deep = transform(3, (4,) * MAX_LAYERS)
    deep(z)
    transform(3, (4,) * (MAX_LAYERS - 1))(z)
    assert launches == [False, True]


@pytest.mark.parametrize("wants", [False, True])
def test_either_way_compiles_in_one_graph(wants):
    flow = transform(4, (8,), context_dim=2).requires_grad_(wants)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.set_grad_enabled(wants):
        for batch in (3, 5, 16):
            z, context = torch.randn(batch, 4).double(), torch.randn(batch, 2).double()
            torch.testing.assert_close(compiled(z, context), flow(z, context))


# --- gradients ------------------------------------------------------------------------------------


def gradients(outputs, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = [x for x in outputs if x.requires_grad]  # volumes that are kept have none
    weights = [torch.linspace(-1.0, 2.0, x.numel()).to(x).view_as(x) for x in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inverse", DIRECTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_twin(kind, activation, inverse, dtype):
    flow = transform(7, (33, 20), kind, inverse, dtype, activation=activation, context_dim=3)
    with torch.enable_grad():
        z = torch.randn(3, 1, 7, dtype=dtype, requires_grad=True)
        context = torch.randn(4, 3, dtype=dtype, requires_grad=True)  # broadcasts
        z = z.expand(3, 4, 7)
        inputs = [z, context, *flow.parameters()]
        got = gradients(flow.move(z, context, inverse), inputs)
        exact = [x.detach().double().requires_grad_() for x in (z, context)]
        flow.double()
        want = gradients(by_twin(flow, *exact), [*exact, *flow.parameters()])
    assert_close(got, want, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 4), (1, 3, 5)])
def test_gradients_of_some_inputs_alone(wanted):
    flow = transform(4, (8,), context_dim=2)
    z, context = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    inputs = [z, context, *flow.parameters()]
    for i, x in enumerate(inputs):
        x.requires_grad_(i in wanted)
    with torch.enable_grad():
        chosen = [inputs[i] for i in wanted]
        got = gradients(flow(z, context), chosen)
        assert_close(got, gradients(by_twin(flow, z, context), chosen), 1e-12)
        # of the log-determinant alone, which nothing else depends on
        got, want = (
            torch.autograd.grad(f(z, context)[1].sum(), chosen, allow_unused=True)
            for f in (flow, lambda *given: by_twin(flow, *given))
        )
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def test_gradients_twice():
    flow = transform(3, (5,), "gated", context_dim=2)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*flow.named_parameters(), strict=True)

    def call(z, context, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(flow, given, (z, context))

    with torch.enable_grad():
        assert torch.autograd.gradcheck(call, (z, context, *parameters))
        assert torch.autograd.gradgradcheck(call, (z, context, *parameters))


def test_gradients_of_parameters_lent_for_a_call():
    """What the network holds when backward runs is not what forward was given."""
    flow = transform(4, (8,))
    z = torch.randn(3, 4, dtype=torch.float64)
    with torch.enable_grad():
        lent = {n: (0.5 * p).detach().requires_grad_() for n, p in flow.named_parameters()}
        got = gradients(torch.func.functional_call(flow, lent, (z,)), list(lent.values()))
        flow.load_state_dict({n: p.detach() for n, p in lent.items()})
        want = gradients(by_twin(flow, z), list(flow.parameters()))
    assert_close(got, want, 1e-12)


def test_a_parameter_changed_before_backward_raises():
    flow = transform(4, (8,))
    with torch.enable_grad():
        loss = flow(torch.randn(3, 4, dtype=torch.float64))[0].sum()
    flow.conditioner.layers[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_noise_in_an_activation_is_the_twins_to_differentiate():
    """A network that is not the same twice has no gradient at its results alone."""
    flow = transform(4, (8,), activation=nn.RReLU).train()
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        torch.manual_seed(1)
        got = gradients(flow(z), [z])
        torch.manual_seed(1)
        assert torch.equal(got[0], gradients(by_twin(flow, z), [z])[0])


# --- the op ---------------------------------------------------------------------------------------


def arguments(**changed):
    """Of 3 columns, a hidden layer of 5 units."""
    given = {
        "z": torch.randn(2, 3),
        "weights": [torch.randn(5, 3), torch.randn(6, 5)],
        "biases": [torch.randn(5), torch.randn(6)],
        "sums": torch.randn(2, 5),
        "least": 1,
        "kind": "exp",
        "inverse": False,
        "activation": "tanh",
    }
    assert changed.keys() <= given.keys()
    return tuple((given | changed).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sums", [True, False])
def test_opcheck(sums, dtype):
    z, weights, biases, first, *settings = arguments()
    given = (
        z.to(dtype),
        [w.to(dtype) for w in weights],
        [b.to(dtype) for b in biases],
        first.to(dtype) if sums else None,
        *settings,
    )
    torch.library.opcheck(
        torch.ops.fastvae.unroll_affine, given, test_utils=("test_schema", "test_faketensor")
    )


WRONG = [
    ({"z": torch.zeros(())}, "z must have at least one dimension, got a 0-dim tensor"),
    ({"z": torch.zeros(2, 3).long()}, "z must be float32, float64, bfloat16 or float16, got Long"),
    ({"z": torch.zeros(2, 0)}, r"z must have at least one column, got \[2, 0\]"),
    ({"least": 2}, r"least must be 0, or 1 of several columns, got 2 and \[2, 3\]"),
    (
        {
            "z": torch.zeros(2, 1),
            "weights": [torch.zeros(5, 1), torch.zeros(2, 5)],
            "biases": [torch.zeros(5), torch.zeros(2)],
        },
        r"least must be 0, or 1 of several columns, got 1 and \[2, 1\]",
    ),
    ({"weights": []}, "weights must be of 1 to 32 layers, got 0"),
    ({"weights": [torch.zeros(3, 3)] * 33}, "weights must be of 1 to 32 layers, got 33"),
    ({"biases": [torch.zeros(5)]}, "biases must be one for each of weights, got 1 and 2"),
    (
        {"weights": [torch.zeros(5, 3).double(), torch.zeros(6, 5)]},
        "weights must have the dtype of z, got Double and Float",
    ),
    (
        {"biases": [torch.zeros(5), torch.zeros(6).double()]},
        "biases must have the dtype of z, got Double and Float",
    ),
    (
        {"weights": [torch.zeros(5, 3), torch.zeros(6, 4)]},
        r"weights must be \[N, 5\] in layer 1, got \[6, 4\]",
    ),
    (
        {"weights": [torch.zeros(15), torch.zeros(6, 5)]},
        r"weights must be \[N, 3\] in layer 0, got \[15\]",
    ),
    (
        {"biases": [torch.zeros(5), torch.zeros(5)]},
        r"biases must be \[N\] for weights of \[N, ..\], got \[5\] and \[6, 5\]",
    ),
    (
        {"kind": "additive"},
        r"weights must end in 1 for each column of z, got \[6, 5\] and \[2, 3\]",
    ),
    (
        {"sums": torch.zeros(3, 5)},
        r"sums must be \[.., N\] for z of \[.., D\] and weights of \[N, D\], "
        r"got \[3, 5\], \[2, 3\] and \[5, 3\]",
    ),
    ({"sums": torch.zeros(2, 5).double()}, "sums must have the dtype of z, got Double and Float"),
    ({"kind": "log"}, "kind must be one of exp, tanh_exp, sigmoid, gated, additive, got log"),
    (
        {"activation": "gelu"},
        "activation must be one of relu, leaky_relu, elu, silu, sigmoid, tanh, got gelu",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_wrong_arguments_raise_and_name_themselves(changed, message, device):
    def moved(x):
        if isinstance(x, list):
            return [moved(y) for y in x]
        return x.to(device) if isinstance(x, Tensor) else x

    given = [moved(x) for x in arguments(**changed)]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"unroll_affine: {message}"):
        torch.ops.fastvae.unroll_affine(*given)
