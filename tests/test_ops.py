"""What holds for every op: each test runs over every row of tests/cases.py."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, COMPOSITIONS, Case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._mode_utils import no_dispatch

import fastvae

KEY = (20260101, 7)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One vector register, its neighbours, several rows to a tile, a tile, more than one.
SHAPES = ((3, 16), (5, 1), (2, 3, 17), (64, 20), (2, 513), (1, 2000), (7,))


def skip_if(reason: str) -> None:
    """A row of the table may say why a test says nothing of it."""
    if reason:
        pytest.skip(reason)


each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """A test compiles one function for every case, and torch gives up on the ninth."""
    torch.compiler.reset()


@pytest.fixture
def key(device: str) -> Tensor:
    return fastvae.random.key(*KEY, device=device)


def weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar that weighs neighbours differently, by weights that half types represent exactly."""
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        w = 0.5 + torch.arange(out.numel(), dtype=torch.float64, device=out.device) % 9 / 8
        total = total + (out.double() * w.reshape(out.shape)).sum()
    return total


def gradients(case: Case, inputs: list[Tensor], key: Tensor, reference: bool = False):
    call = case.call_reference if reference else case.call
    return torch.autograd.grad(weighted(call(inputs, key)), inputs)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    """max |actual - expected| <= rtol (|expected| + rms(expected)), and NaN nowhere."""
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    expected = expected.double()
    error = (actual.double() - expected).abs()
    scale = expected.abs() + expected.square().mean().sqrt()
    worst = (error / scale.clamp_min(1e-300)).max().item()
    assert worst <= rtol, f"{what}: error {worst:.2e} > {rtol:.0e}"


# --- values and gradients -------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_match_float64_reference(case, shape, dtype, device, key):
    inputs = case.draw(shape, dtype, requires_grad=True, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = case.call(inputs, key), case.call_reference(exact, key)
    for out, ref, kind in zip(outputs, expected, case.outputs, strict=True):
        is_double = dtype == torch.float64
        row_dtype = torch.float64 if is_double else torch.float32
        assert out.dtype == (dtype if kind == "element" else row_dtype)
        tolerance = case.rtol[dtype if kind == "element" else row_dtype]
        assert_close(out, ref, tolerance, kind)
    # gradients come back in the dtype of the inputs
    for grad, ref, spec in zip(
        gradients(case, inputs, key),
        gradients(case, exact, key, reference=True),
        case.inputs,
        strict=True,
    ):
        assert grad.dtype == dtype
        assert_close(grad, ref, case.rtol[dtype], f"gradient of {spec.name}")


@each_case
def test_row_sums_have_six_digits(case, device, key):
    """In float32, at inputs as a trained model gives them; a case's tolerance allows extremes."""
    skip_if("row" not in case.outputs and "no output is a row sum")
    inputs = case.draw((256, 64), device=device)
    expected = case.call_reference(
        [x.double() if x.is_floating_point() else x for x in inputs], key
    )
    for out, ref, kind in zip(case.call(inputs, key), expected, case.outputs, strict=True):
        if kind == "row":
            assert_close(out, ref, case.row_rtol, kind)


@each_case
def test_gradcheck(case, device, key):
    skip_if(case.straight_through)
    inputs = case.draw((3, 5), torch.float64, requires_grad=True, device=device)
    assert gradcheck(lambda *xs: case.call(list(xs), key), inputs)


@each_case
def test_gradgradcheck(case, device, key):
    inputs = case.draw((2, 3), torch.float64, requires_grad=True, device=device)
    assert gradgradcheck(lambda *xs: case.call(list(xs), key), inputs)


@each_case
def test_gradients_with_a_graph_are_those_without_where_inputs_depend_on_others(case, device, key):
    """As z does on mu: what comes to mu by way of z must not come twice."""
    leaves = case.draw((2, 3), torch.float64, requires_grad=True, device=device)
    inputs, link = [], torch.zeros((), dtype=torch.float64, device=device)
    for leaf in leaves:
        inputs.append(leaf + link)
        total = 0.5 * sum(x.sum() for x in inputs)
        link = total - total.detach()  # 0, with a slope
    loss = weighted(case.call(inputs, key))
    known = torch.autograd.grad(loss, leaves, retain_graph=True)
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-9)


def test_gradients_with_a_graph_are_those_without_where_an_input_comes_twice():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for loss in (fastvae.gaussian_kl(x, x).sum(), fastvae.gaussian_log_prob(x, x, x).sum()):
        (known,) = torch.autograd.grad(loss, x, retain_graph=True)
        (found,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(found, known)


@each_case
def test_gradient_only_where_asked(case, device, key):
    """Any subset of inputs may require gradients; the others get none, the values do not change."""
    full = gradients(case, case.draw((4, 9), requires_grad=True, device=device), key)
    for wanted in range(len(case.inputs)):
        inputs = case.draw((4, 9), device=device)
        inputs[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(weighted(case.call(inputs, key)), [inputs[wanted]])
        assert torch.equal(grad, full[wanted])
    outputs = case.call(case.draw((4, 9), device=device), key)
    assert not any(out.requires_grad for out in outputs)
    with torch.no_grad():
        outputs = case.call(case.draw((4, 9), requires_grad=True, device=device), key)
        assert not any(out.requires_grad for out in outputs)


@each_case
def test_each_output_alone_backpropagates(case, device, key):
    inputs = case.draw((4, 9), torch.float64, requires_grad=True, device=device)
    for i in range(len(case.outputs)):
        out, ref = case.call(inputs, key)[i], case.call_reference(inputs, key)[i]
        actual = torch.autograd.grad(weighted((out,)), inputs, allow_unused=True)
        expected = torch.autograd.grad(weighted((ref,)), inputs, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            a = torch.zeros_like(inputs[0]) if a is None else a
            e = torch.zeros_like(inputs[0]) if e is None else e
            assert_close(a, e, 1e-12, f"output {i}")


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_gives_the_same_values(case, dtype, device, key):
    """What is kept for backward changes no bit of what is returned."""
    inputs = case.draw((20, 77), dtype, requires_grad=True, device=device)
    plain = [x.detach() for x in inputs]
    for out, ref in zip(case.call(inputs, key), case.call(plain, key), strict=True):
        assert torch.equal(out, ref)


@each_case
def test_outputs_may_be_changed_in_place(case, device, key):
    """As in eager PyTorch, where none of these formulas needs its result again."""
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((4, 9), requires_grad=True, device=device)
    expected = gradients(case, inputs, key)

    def doubled(*xs):
        outputs = case.call(list(xs), key)
        for out in outputs:
            out.mul_(2.0)
        return weighted(outputs) / 2.0

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for function in (doubled, compiled):
        actual = torch.autograd.grad(function(*inputs), inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@each_case
def test_inference_mode(case, device, key):
    inputs = case.draw((4, 9), device=device)
    expected = case.call(inputs, key)
    with torch.inference_mode():
        for out, ref in zip(case.call(inputs, key), expected, strict=True):
            assert torch.equal(out, ref)


# --- layouts --------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of ``x``, ``[..., 33]``, lying in memory in other ways."""
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    backwards = tuple(range(x.dim()))[::-1]

    def poisoned(*shape: int) -> Tensor:  # what lies between the elements must not be read
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)

    *rows, columns = x.shape
    return {
        "reversed strides": x.permute(backwards).contiguous().permute(backwards),
        "unaligned": unaligned.copy_(x),
        "sliced columns": poisoned(*rows, columns + 37)[..., 5 : columns + 5].copy_(x),
        "strided columns": poisoned(*rows, 2 * columns + 4)[..., 1 : 2 * columns + 1 : 2].copy_(x),
        "strided rows": poisoned(2 * x.shape[0], *x.shape[1:])[::2].copy_(x),
        "transposed columns": x.mT.contiguous().mT if rows else x,
        "transposed batch": x.transpose(0, 1).contiguous().transpose(0, 1) if rows else x,
    }


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_do_not_matter(case, dtype, device, key):
    inputs = case.draw((6, 4, 33), dtype, device=device)
    expected = case.call(inputs, key)
    for k in range(len(inputs)):
        for name, other in layouts(inputs[k]).items():
            outputs = case.call([*inputs[:k], other, *inputs[k + 1 :]], key)
            for out, ref in zip(outputs, expected, strict=True):
                assert torch.equal(out, ref), f"{case.inputs[k].name} {name}"
    turned = [layouts(x)["transposed columns"].requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    for a, b in zip(gradients(case, turned, key), gradients(case, plain, key), strict=True):
        assert torch.equal(a, b)


BROADCASTS = ((33,), (1, 33), (4, 33), (4, 1), (6, 1, 33), (1, 4, 1), (6, 1, 1), (1,))


@each_case
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_broadcast_equals_expanded(case, shape, device, key):
    """Any input may be broadcast; its gradient is the sum over what was shared."""
    skip_if(case.no_broadcast)
    if len(case.inputs) == 1:
        pytest.skip("nothing to broadcast with")
    for k in range(len(case.inputs)):
        small = case.draw((6, 4, 33), torch.float64, device=device)
        small[k] = case.draw(shape, torch.float64, seed=1, device=device)[k]
        small = [x.requires_grad_() for x in small]
        full = [x.detach().expand(6, 4, 33).contiguous().requires_grad_() for x in small]
        for out, ref in zip(case.call(small, key), case.call(full, key), strict=True):
            assert torch.equal(out, ref)
        expected = list(gradients(case, full, key))
        expected[k] = expected[k].sum_to_size(shape)
        for grad, ref in zip(gradients(case, small, key), expected, strict=True):
            assert_close(grad, ref, 1e-13, f"broadcast {case.inputs[k].name}")


@each_case
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,), (1, 1)], ids=str)
def test_empty_and_tiny(case, shape, device, key):
    inputs = case.draw(shape, requires_grad=True, device=device)
    outputs, expected = case.call(inputs, key), case.call_reference(inputs, key)
    for out, ref in zip(outputs, expected, strict=True):
        assert out.shape == ref.shape
        torch.testing.assert_close(out, ref)  # rows without columns sum to 0
    for grad, x in zip(gradients(case, inputs, key), inputs, strict=True):
        assert grad.shape == x.shape


@each_case
def test_expanded_gradient(case, device, key):
    """loss.sum().backward() hands an op a gradient of stride 0."""
    inputs = case.draw((5, 6), requires_grad=True, device=device)
    outputs = case.call(inputs, key)
    actual = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
    ones = [torch.ones_like(o).contiguous() for o in case.call(inputs, key)]
    expected = torch.autograd.grad(case.call(inputs, key), inputs, ones)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@each_case
def test_more_than_2_31_elements(case, device, key):
    """A stride-0 input of 2^31 + 2^20 elements: int64 everywhere, and nothing materialised.

    Another map to a scale changes the formula of an element, not the loop over them.
    """
    skip_if(case.wired_as and f"as {case.wired_as}")
    if "element" in case.outputs:
        pytest.skip("its output would be as large: covered at 2^31 in test_random by key offsets")
    skip_if(case.copies)
    columns, rows = 1 << 10, (1 << 21) + (1 << 10)
    inputs = [x.expand(rows, columns) for x in case.draw((1, columns), device=device)]
    (out,) = case.call(inputs, key)
    (one,) = case.call([x[:1] for x in inputs], key)
    assert out.shape == (rows,)
    assert torch.equal(out, one.expand(rows))


# --- determinism ----------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("shape", [(1000, 64), (3, 200_003), (100_001, 3)], ids=str)
def test_bitwise_equal_for_any_thread_count(case, shape, device, key, threads):
    if shape[0] > 1000:
        skip_if(case.sees_batch)
    if shape[1] > 1000:
        skip_if(case.quadratic)
    results = []
    for n in (1, 2, 3, 5):
        threads(n)
        inputs = case.draw(shape, requires_grad=True, device=device)
        outputs = case.call(inputs, key)
        ones = [torch.ones_like(o) for o in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, ones)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@each_case
def test_bitwise_equal_for_any_split_of_the_batch(case, device, key):
    skip_if(case.sees_batch)
    inputs = case.draw((60, 20), device=device)
    whole = case.call(inputs, key)
    for begin, end in ((0, 7), (7, 8), (8, 60)):
        part_key = fastvae.random.shard(key, begin, 20)
        part = case.call(case.rows(inputs, slice(begin, end)), part_key)
        for out, ref in zip(part, whole, strict=True):
            assert torch.equal(out, ref[begin:end])


# --- special values -------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_special_values_in_every_lane_stay_in_their_row(case, bad, device, key):
    """37 columns: two registers, a tail. A bad element changes its own row and no other."""
    clean_inputs = case.draw((37, 37), device=device)
    clean = case.call(clean_inputs, key)
    rows = 2 if case.mixes else 1  # then every other row stays as it was
    for k in range(len(case.inputs)):
        inputs = [x.clone() for x in clean_inputs]
        inputs[k].view(-1)[:: rows * (inputs[k].shape[-1] + 1)] = bad  # lane i of row i
        outputs = case.call(inputs, key)
        expected = case.call_reference([x.double() for x in inputs], key)
        doubles = case.call([x.double() for x in inputs], key)
        for out, ref, double, kind in zip(outputs, expected, doubles, case.outputs, strict=True):
            what = f"{case.inputs[k].name} = {bad}"
            assert torch.equal(double.isnan(), ref.isnan()), what
            assert torch.equal(out.isnan(), ref.isnan()), what
            assert torch.equal(out.isposinf(), ref.isposinf()), what
            assert torch.equal(out.isneginf(), ref.isneginf()), what
            if kind == "element" and not case.mixes:
                off = ~torch.eye(37, dtype=torch.bool, device=device)
                if case.mixes:
                    off[::2] = False
                assert torch.equal(out[off], clean[0][off]), what


# --- composability --------------------------------------------------------------------------------


@each_case
def test_opcheck(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((3, 5), requires_grad=True, device=device)
    op = getattr(torch.ops.fastvae, case.op)
    arguments = [*inputs, *([key] if case.sampled else [])]
    absent = len(op.default._schema.arguments) - len(arguments) - len(case.settings)
    torch.library.opcheck(op, (*arguments, *[None] * absent, *case.settings))

    outputs = case.call([x.detach() for x in inputs], key)
    grads = [torch.ones_like(o) for o in outputs]
    arguments = [*grads, *(x.detach() for x in inputs), *([key] if case.sampled else [])]
    backward = getattr(torch.ops.fastvae, f"{case.op}_backward")
    schema = backward.default._schema.arguments
    arguments += [None] * (len(schema) - 1 - len(case.settings) - len(arguments))
    arguments += case.settings
    wanted = len(backward.default._schema.returns)
    torch.library.opcheck(backward, (*arguments, [i < len(inputs) for i in range(wanted)]))
    keeping = getattr(torch.ops.fastvae, f"{case.op}_keeping", None)
    if keeping is not None:
        plain = [x.detach() for x in inputs]
        torch.library.opcheck(keeping, (*plain, *[None] * absent, *case.settings))


def test_every_registered_op_has_a_case():
    registered = {
        name.split("::")[1].split(".")[0].removesuffix("_backward").removesuffix("_keeping")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastvae::")
    }
    registered -= {"unroll_affine"}  # private to fastvae.flows: tests/test_unroll.py
    assert registered == {case.op for case in CASES}
    # the others are one op of several faces, or composed of ops: tests/test_covariance.py
    faces = {"reparameterize_tril", "gaussian_tril_kl", "reparameterize_low_rank_kl"}
    faces |= {"householder_columns", "orthogonal_columns"}  # tests/test_residual_flow.py
    faces |= {"linear_flow"}  # tests/test_linear.py
    assert registered | faces == set(fastvae.functional.__all__)
    composed = {"linear_flow", "maf_sample", *fastvae.estimators.__all__}
    assert {case.op for case in COMPOSITIONS} <= composed


@each_case
def test_compile_fullgraph_one_graph_for_many_batch_sizes(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(*xs):
        return weighted(case.call(list(xs), key))

    for batch in (4, 8, 16, 33, 64):
        inputs = case.draw((batch, 7), requires_grad=True, device=device)
        actual = torch.autograd.grad(step(*inputs), inputs)
        for a, e in zip(actual, gradients(case, inputs, key), strict=True):
            torch.testing.assert_close(a, e)
    # a float setting, torch tries as a variable first, and then as the constant that ops take
    floats = any(isinstance(x, float) for x in case.options.values())
    assert counter.frame_count == 1 + floats


@each_case
def test_compile_inductor(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    compiled = torch.compile(lambda *xs: case.call(list(xs), key), fullgraph=True)
    inputs = case.draw((6, 7), requires_grad=True, device=device)
    outputs = compiled(*inputs)
    for out, ref in zip(outputs, case.call(inputs, key), strict=True):
        assert torch.equal(out, ref)
    actual = torch.autograd.grad(weighted(outputs), inputs)
    for a, e in zip(actual, gradients(case, inputs, key), strict=True):
        torch.testing.assert_close(a, e)


@each_case
def test_compiled_autograd(case, device, key):
    """torch.compile of the backward pass, which asks every node what it saved."""
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((4, 9), requires_grad=True, device=device)
    expected = gradients(case, inputs, key)

    @torch.compile(backend="eager")
    def step(*xs):
        weighted(case.call(list(xs), key)).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step(*inputs)
    for x, e in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, e)


@each_case
def test_autocast_meets_in_the_widest_type(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    wide, narrow = (
        case.draw((4, 9), device=device),
        case.draw((4, 9), torch.bfloat16, device=device),
    )
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        mixed = case.call([wide[0], *narrow[1:]], key)
        alone = case.call(narrow, key)
    exact = case.call([wide[0], *(x.float() for x in narrow[1:])], key)
    for out, ref in zip(mixed, exact, strict=True):
        assert out.dtype == torch.float32
        assert torch.equal(out, ref)
    for out, ref, kind in zip(alone, case.call(narrow, key), case.outputs, strict=True):
        assert out.dtype == (torch.bfloat16 if kind == "element" else torch.float32)
        assert torch.equal(out, ref)


@each_case
def test_func_grad_and_hessian(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((2, 3), torch.float64, requires_grad=True, device=device)
    plain = [x.detach() for x in inputs]

    def loss(*xs):
        return weighted(case.call(list(xs), key))

    indices = tuple(range(len(inputs)))
    for a, e in zip(
        torch.func.grad(loss, indices)(*plain), gradients(case, inputs, key), strict=True
    ):
        torch.testing.assert_close(a, e)
    actual = torch.func.hessian(loss, indices)(*plain)
    expected = torch.autograd.functional.hessian(loss, tuple(plain))
    for i in indices:
        for j in indices:
            torch.testing.assert_close(actual[i][j], expected[i][j])


@each_case
def test_forward_mode_is_the_directional_derivative_and_not_zero(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((2, 3), torch.float64, requires_grad=True, device=device)
    plain = [x.detach() for x in inputs]
    tangents = case.draw((2, 3), torch.float64, seed=1, device=device)
    expected = sum(
        (g * t).sum() for g, t in zip(gradients(case, inputs, key), tangents, strict=True)
    )

    def loss(*xs):
        return weighted(case.call(list(xs), key))

    _, tangent = torch.func.jvp(loss, tuple(plain), tuple(tangents))
    torch.testing.assert_close(tangent, expected)
    assert tangent.abs() > 1e-6
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(plain, tangents, strict=True)
        ]
        dual = torch.autograd.forward_ad.unpack_dual(loss(*duals))
    torch.testing.assert_close(dual.tangent, expected)


def examples(case: Case, count: int, shape: tuple[int, ...], device: str) -> list[Tensor]:
    """What vmap maps over: each input stacked along a new first dimension."""
    drawn = [case.draw(shape, torch.float64, seed=i, device=device) for i in range(count)]
    return [torch.stack(tensors) for tensors in zip(*drawn, strict=True)]


@each_case
def test_vmap(case, device, key):
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = examples(case, 5, (2, 3), device)
    outputs = torch.func.vmap(lambda *xs: case.call(list(xs), key))(*inputs)
    for i in range(5):
        one = case.call([x[i] for x in inputs], key)
        for out, ref in zip(outputs, one, strict=True):
            torch.testing.assert_close(out[i], ref)
    per_example = torch.func.vmap(torch.func.grad(lambda *xs: weighted(case.call(list(xs), key))))
    grads = per_example(*inputs)
    first = [x[0].clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(grads[0], gradients(case, first, key)[0])


@each_case
def test_compiled_func_transforms(case, device, key):
    """torch.compile around grad and vmap: the op meets functorch inside dynamo's fake tensors."""
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = examples(case, 5, (2, 3), device)

    def loss(*xs):
        return weighted(case.call(list(xs), key))

    for transform, arguments in (
        (torch.func.grad, [x[0] for x in inputs]),
        (torch.func.vmap, inputs),
    ):
        expected = transform(loss)(*arguments)
        actual = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(actual, expected)


@each_case
def test_checkpointing_replays_the_noise(case, device):
    skip_if(case.wired_as and f"as {case.wired_as}")
    inputs = case.draw((4, 9), requires_grad=True, device=device)

    def run(*xs):
        torch.manual_seed(3)
        return weighted(case.call(list(xs)))

    plain = torch.autograd.grad(run(*inputs), inputs)
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(
        lambda *xs: weighted(case.call(list(xs))), *inputs, use_reentrant=False
    )
    for a, e in zip(torch.autograd.grad(out, inputs), plain, strict=True):
        torch.testing.assert_close(a, e)


@each_case
def test_meta_and_fake_tensors(case, key):
    inputs = case.draw((4, 9), device="meta")
    outputs = case.call(inputs, key.to("meta"))
    for out, kind in zip(outputs, case.outputs, strict=True):
        assert out.is_meta
        assert out.shape == ((4, 9) if kind == "element" else (4,))


# --- errors ---------------------------------------------------------------------------------------


def replaced(case: Case, k: int, value) -> list:
    inputs: list = case.draw((3, 4))
    inputs[k] = value
    return inputs


@each_case
def test_wrong_inputs_raise_and_name_the_argument(case):
    key = fastvae.random.key(1)
    for k, spec in enumerate(case.inputs):
        start = rf"fastvae::{case.op}: {spec.name} must "
        if not spec.integral:
            with pytest.raises(TypeError, match=start + "be float32, .* got (Long|long|int64)"):
                case.call(replaced(case, k, torch.ones(3, 4, dtype=torch.int64)), key)
        with pytest.raises(RuntimeError, match=start + r"have at least one dimension"):
            case.call(replaced(case, k, torch.tensor(1.0)), key)
        with pytest.raises((TypeError, RuntimeError), match=r"Tensor|tensor"):
            case.call(replaced(case, k, "not a tensor"), key)
        first = case.inputs[0].name
        if k > 0:
            with pytest.raises(TypeError, match=start + rf"have the dtype of {first}, got .* and "):
                case.call(replaced(case, k, torch.ones(3, 4, dtype=torch.float64)), key)
            if not case.no_broadcast:
                with pytest.raises(
                    ValueError, match=start + rf"broadcast with {first}, got \[3, 5\] and"
                ):
                    case.call(replaced(case, k, torch.ones(3, 5)), key)
            with pytest.raises(RuntimeError, match=rf"on the device of {first}, got"):
                case.call(replaced(case, k, torch.ones(3, 4, device="meta")), key.to("meta"))


@each_case
def test_wrong_inputs_raise_under_transforms_too(case):
    """Where the twin serves, which checks nothing."""
    key, first = fastvae.random.key(1), case.inputs[0]
    wrong = [(torch.ones(3, 4, dtype=torch.float64), TypeError, "have the dtype of")]
    if not case.no_broadcast:
        wrong.append((torch.ones(3, 5), ValueError, "broadcast with"))
    for k, spec in enumerate(case.inputs):
        for value, error, rule in wrong:
            if k == 0 or first.integral:
                continue
            inputs = replaced(case, k, value)

            def loss(x, rest=tuple(inputs[1:])):
                return sum(out.sum() for out in case.call([x, *rest], key))

            message = rf"fastvae::{case.op}: {spec.name} must {rule} {first.name}, got"
            for call in (torch.func.grad(loss), torch.func.vmap(loss, randomness="same")):
                with pytest.raises(error, match=message):
                    call(inputs[0])


@each_case
def test_wrong_keys_raise(case):
    if not case.sampled:
        with pytest.raises(TypeError):
            case.fastvae(*case.draw((3, 4)), key=fastvae.random.key(1))
        return
    inputs, start = case.draw((3, 4)), rf"fastvae::{case.op}: key must "
    with pytest.raises(TypeError, match=start + "be int64"):
        case.call(inputs, torch.zeros(2))
    with pytest.raises(ValueError, match=start + r"have shape \[2\]"):
        case.call(inputs, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=start + "be on the device"):
        case.call(inputs, torch.zeros(2, dtype=torch.int64, device="meta"))
    twice = {"key": fastvae.random.key(1), "generator": torch.Generator()}
    with pytest.raises(ValueError, match="key and generator must not be given together"):
        case.fastvae(*inputs, **case.options, **twice)
    with pytest.raises(ValueError, match="num_samples must be non-negative, got -1"):
        case.fastvae(*inputs, num_samples=-1, **case.options)


def test_wrong_priors_raise():
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="mu_p and log_var_p must be given together, got only mu_p"
    ):
        fastvae.gaussian_kl(x, x, x)
    with pytest.raises(ValueError, match="given together, got only log_var_p"):
        fastvae.gaussian_kl(x, x, None, x)


@each_case
def test_wrong_gradients_raise(case):
    """The backward ops are public in torch.ops: they check what they are given."""
    inputs, key = case.draw((3, 4)), fastvae.random.key(1)
    op = getattr(torch.ops.fastvae, f"{case.op}_backward").default
    rest = [*inputs, *([key] if case.sampled else [])]
    known = 1 + len(case.outputs) + len(rest) + len(case.settings)
    tail = [*[None] * (len(op._schema.arguments) - known), *case.settings]
    wanted = [True] * len(op._schema.returns)
    for i, kind in enumerate(case.outputs):
        good = [torch.ones(3, 4) if k == "element" else torch.ones(3) for k in case.outputs]
        bad = list(good)
        bad[i] = torch.ones(5, 7) if kind == "element" else torch.ones(5)
        with pytest.raises(ValueError, match=r"must (broadcast|have one value per row)"):
            op(*bad, *rest, *tail, wanted)
        bad[i] = good[i].double()
        with pytest.raises(TypeError, match=r"must (be|have the dtype)"):
            op(*bad, *rest, *tail, wanted)


@pytest.mark.skipif(fastvae.build_info()["cuda"], reason="this build has CUDA")
def test_cuda_without_cuda_says_what_to_do():
    """Reached with a fake CUDA tensor, its fake kernels switched off: no GPU is needed."""
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    message = "mu_q must be on cpu, got cuda:0: .* without CUDA; rebuild with FASTVAE_CUDA=ON"
    with no_dispatch(), pytest.raises(RuntimeError, match=message):
        fastvae.gaussian_kl(x, x)
