"""The numeric rule for the layer norm, of a residual sum or alone; its contract with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffit_kernels as dk
from tests.cases import (
    DTYPES,
    LAYOUTS,
    AddLayerNormCase,
    LayerNormCase,
    Tensors,
    plain_add_layer_norm,
)
from tests.numeric_rule import assert_numeric_rule

# dtypes of x and y
PAIRS = [
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
SHAPES = [(5, 1), (7,), (3, 2), (2, 3), (1, 1, 5), (3, 7), (2, 3, 17), (129, 24), (2, 5, 72)]
CASE = AddLayerNormCase((2, 5, 17))

Kind = type[AddLayerNormCase]
KINDS = pytest.mark.parametrize("kind", [AddLayerNormCase, LayerNormCase])


def name_of(value: object) -> str:
    """Test ids that say the shape or the dtypes."""
    assert isinstance(value, tuple)
    parts = [str(part).removeprefix("torch.") for part in value]
    return ("-" if isinstance(value[0], torch.dtype) else "x").join(parts)


def check(case: AddLayerNormCase) -> None:
    assert_numeric_rule(case.operator(), case.plain(), case.truth())


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1152), (2, 8192)], ids=name_of)
def test_shapes(
    backend: str, kind: Kind, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check(kind(shape, *dtypes))


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["layout", "grad_layout"])
def test_layouts(
    backend: str, kind: Kind, argument: str, layout: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check(replace(kind((2, 17, 24), *dtypes), **{argument: layout}))


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("offset", [1e3, -1e4])
@pytest.mark.parametrize("features", [3, 17, 72, 1152])
def test_rows_far_from_zero(
    backend: str,
    kind: Kind,
    features: int,
    offset: float,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """The variance keeps its accuracy where the mean is much larger than the deviations."""
    check(kind((7, features), *dtypes, offset=offset))


@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("value", [0.0, 3.0, -1000.0])
def test_the_norm_of_a_constant_row_is_zero(
    backend: str, value: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x = torch.full((3, 17), value, dtype=dtypes[0])
    s, n = dk.add_layer_norm(x, torch.zeros(3, 17, dtype=dtypes[1]))
    assert torch.equal(s, x)
    assert not n.any()
    assert not dk.layer_norm(x).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_that_of_the_sum_before_rounding(backend: str, dtype: torch.dtype) -> None:
    """Steps of an eighth, lost in the rounded sum, are all there is to the norm."""
    x = torch.full((1, 4), 0.5 / torch.finfo(dtype).eps, dtype=dtype)
    y = torch.tensor([[0.0, 0.125, 0.25, 0.125]], dtype=dtype)
    s, n = dk.add_layer_norm(x, y)
    assert torch.equal(s, x)
    assert torch.equal(n, plain_add_layer_norm(0 * x, y)[1])


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_nan_stays_in_its_row(
    backend: str, kind: Kind, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = kind((17, 24), *dtypes)
    x, *y = case.inputs().values()
    broken = x.clone()
    broken[3, 5] = torch.nan
    others = torch.arange(17) != 3
    results, good = case.fused(broken, *y), case.fused(x, *y)
    assert results[-1][3].isnan().all()
    for s in results[:-1]:
        assert torch.equal(s.isnan(), broken.isnan())
    for after, before in zip(results, good, strict=True):
        assert torch.equal(after[others], before[others])


small_cases = st.builds(
    lambda kind, **fields: kind(**fields),
    kind=st.sampled_from([AddLayerNormCase, LayerNormCase]),
    shape=st.builds(
        lambda lead, features: (*lead, features),
        st.lists(st.integers(1, 7), max_size=3),
        st.integers(1, 80),
    ),
    offset=st.sampled_from([0.0, 1e3]),
)


# The fixture chooses one backend for all examples, so it need not be made anew for each.
@settings(
    derandomize=True,
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=small_cases, dtypes=st.sampled_from(PAIRS))
def test_random_cases(
    backend: str, case: AddLayerNormCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check(replace(case, dtype=dtypes[0], y_dtype=dtypes[1]))


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_two_calls_are_equal(
    backend: str, default_algorithms: None, kind: Kind, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = kind((2, 100, 72), *dtypes)
    first, second = (case.operator(draws=1) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("used", ["s", "n"])
def test_a_result_without_a_gradient_adds_none(backend: str, used: str) -> None:
    """A result that is not used counts as one whose gradient is zero."""
    inputs = [x.requires_grad_() for x in CASE.inputs().values()]
    grads = dict(zip("sn", CASE.grads(), strict=True))
    results = dict(zip("sn", dk.add_layer_norm(*inputs), strict=True))
    got = torch.autograd.grad(results[used], inputs, grads[used], retain_graph=True)
    other = "n" if used == "s" else "s"
    zeros = grads | {other: torch.zeros_like(grads[other])}
    expected = torch.autograd.grad(list(results.values()), inputs, list(zeros.values()))
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("argument", ["x", "y"])
def test_only_the_gradient_asked_for(backend: str, argument: str) -> None:
    inputs = CASE.inputs()
    inputs[argument].requires_grad_()
    results = dk.add_layer_norm(**inputs)
    (grad,) = torch.autograd.grad(results, inputs[argument], CASE.grads())
    assert torch.equal(grad, CASE.operator(draws=1)[f"grad_{argument}"][0])


@KINDS
def test_a_second_derivative_is_refused(backend: str, kind: Kind) -> None:
    case = kind(CASE.shape)
    x, *y = case.inputs().values()
    *_, n = case.fused(x.requires_grad_(), *y)
    (grad,) = torch.autograd.grad(n.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        grad.sum().backward()


# The longest sum here has fewer than 2 ** 11 terms; the gradient holds products of three of them.
FLOAT64_ROUNDING = 2**13 * torch.finfo(torch.float64).eps


@KINDS
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1152)], ids=name_of)
def test_reference_is_the_formula_and_its_derivative(kind: Kind, shape: tuple[int, ...]) -> None:
    case = kind(shape, torch.float64)
    with dk.use_backend("reference"):
        explicit = case.operator()
    for name, exact in case.plain().items():
        error = (explicit[name] - exact).abs().max()
        # Of two features the gradient nearly vanishes: what cancels is of the order of one.
        assert error <= FLOAT64_ROUNDING * exact.abs().max().clamp(min=1), name


@KINDS
def test_gradcheck(kind: Kind) -> None:
    case = kind((2, 3), torch.float64)
    inputs = [x.requires_grad_() for x in case.inputs().values()]
    with dk.use_backend("reference"):
        assert torch.autograd.gradcheck(case.fused, inputs)


# --- the contract with PyTorch


@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels first", "sliced channels"])
def test_opcheck(backend: str, layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = AddLayerNormCase((2, 5, 17), *dtypes, layout=layout, grad_layout=layout)
    inputs = [x.detach().requires_grad_() for x in case.inputs().values()]
    torch.library.opcheck(torch.ops.diffit.add_layer_norm.default, (*inputs, 1e-6))
    s, n = torch.ops.diffit.add_layer_norm(*(x.detach() for x in inputs), 1e-6)
    assert s.is_contiguous()
    assert n.is_contiguous()
    torch.library.opcheck(
        torch.ops.diffit.add_layer_norm_backward.default, (*case.grads(), s, 1e-6)
    )

    torch.library.opcheck(torch.ops.diffit.layer_norm.default, (inputs[0], dtypes[1], 1e-6))
    x, grad_n = inputs[0].detach(), case.grads()[1]
    assert torch.ops.diffit.layer_norm(x, dtypes[1], 1e-6).is_contiguous()
    torch.library.opcheck(torch.ops.diffit.layer_norm_backward.default, (grad_n, x, 1e-6))


@KINDS
def test_compiled_for_any_batch(backend: str, kind: Kind) -> None:
    """One graph, forward and backward, and no other for another batch."""

    case = kind(CASE.shape, torch.float32, torch.bfloat16)

    def outputs(function: Callable[..., tuple[Tensor, ...]], batch: int) -> Tensors:
        return replace(case, shape=(batch, 5, 17))._outputs(function, draws=1)

    torch._dynamo.reset()
    compiled = torch.compile(case.fused, backend="aot_eager", fullgraph=True, dynamic=True)
    outputs(compiled, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 3):
            expected = outputs(case.fused, batch)
            for name, tensor in outputs(compiled, batch).items():
                assert torch.equal(tensor, expected[name]), name
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_inputs_as_they_are(backend: str, dtype: torch.dtype) -> None:
    """The residual stream stays float32, what the layer added says the dtype of the norm."""
    case = replace(CASE, y_dtype=dtype)
    outside = case.operator(draws=1)
    with torch.autocast("cpu", dtype):
        inside = case.operator(draws=1)
    for name, tensor in outside.items():
        assert inside[name].dtype == tensor.dtype
        assert torch.equal(inside[name], tensor), name


def test_autocast_adds_as_plain_addition_does(backend: str) -> None:
    """x in one 16-bit dtype and y in the other: the sum is float32."""
    x, y = replace(CASE, dtype=torch.float16, y_dtype=torch.bfloat16).inputs().values()
    with torch.autocast("cpu", torch.bfloat16):
        s, n = dk.add_layer_norm(x, y)
    assert torch.equal(s, x + y)
    assert n.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_norm_alone_once(backend: str, dtype: torch.dtype) -> None:
    """From float32 to its own dtype; other dtypes stay."""
    x = LayerNormCase(CASE.shape).inputs()["x"]
    n = dk.layer_norm(x)
    with torch.autocast("cpu", dtype):
        assert torch.equal(dk.layer_norm(x), n.to(dtype))
        for other in (torch.bfloat16, torch.float16):
            assert dk.layer_norm(x.to(other)).dtype == other
        with dk.use_backend("reference"):
            assert dk.layer_norm(x.double()).dtype == torch.float64


@KINDS
def test_backward_inside_autocast(backend: str, kind: Kind) -> None:
    case = kind(CASE.shape)
    inputs = [x.requires_grad_() for x in case.inputs().values()]
    results = case.fused(*inputs)
    outside = torch.autograd.grad(results, inputs, case.grads(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(results, inputs, case.grads())
    for one, two in zip(outside, inside, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def test_nothing_is_computed_on_meta() -> None:
    x = torch.empty(3, 8, device="meta")
    s, n = dk.add_layer_norm(x, x.bfloat16())
    assert s.is_meta
    assert (s.dtype, n.dtype) == (torch.float32, torch.bfloat16)
    assert s.shape == n.shape == x.shape
    assert dk.layer_norm(x).is_meta
