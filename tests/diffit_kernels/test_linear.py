"""The kernels of linear layers, by tile registers and by vectors, and what goes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import diffit_kernels as dk
from diffit_kernels import native, products
from diffit_kernels.native import layers, library
from diffit_kernels.ops.linear import linear
from tests.backends import GRADIENT_KERNELS, LINEAR_KERNELS, linear_kernels_on, running_on
from tests.cases import MLPCase
from tests.numeric_rule import assert_numeric_rule

# rows, in_features, out_features: few rows, whole blocks, rows left over, several items, long sums
SHAPES = [
    (1, 64, 96),
    (15, 320, 32),
    (32, 32, 32),
    (33, 64, 96),
    (127, 96, 32),
    (300, 32, 608),
    (1029, 64, 128),
    (64, 4608, 64),
]
# rows, in_features, out_features of a weight's gradient: one block, chunks of rows and what is left
# of them, parts of rows, of columns and of features, a single chunk
GRADIENTS = [
    (32, 32, 32),
    (288, 64, 96),
    (1056, 32, 64),
    (5184, 32, 96),
    (64, 96, 1248),
    (64, 1248, 32),
    (1024, 160, 64),
]
OPERATORS = (torch.ops.diffit.linear, torch.ops.diffit.linear_backward)


def inputs_of(
    shape: tuple[int, int, int], *lead: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    rows, features, columns = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, rows, features), (columns, features), (columns,))
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, weight * features**-0.5, bias


def outputs(run: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of sum(y * weights)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = run(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    grads = torch.autograd.grad(y, leaves, weights.to(y.dtype))
    return {"y": y.detach()} | {f"grad_{i}": grad for i, grad in enumerate(grads)}


def calls(function: Callable[[], object]) -> list[object]:
    """The operators of linear layers that a function calls."""
    with FlopCounterMode(display=False) as counter:
        function()
    return [operator for operator in OPERATORS if operator in counter.get_flop_counts()["Global"]]


@pytest.mark.sanitizer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_numeric_rule(
    threads: Callable[[int], None],
    count: int,
    shape: tuple[int, int, int],
    bias: bool,
    linear_dtype: torch.dtype,
) -> None:
    threads(count)
    inputs = inputs_of(shape, 2, dtype=linear_dtype)[: 3 if bias else 2]
    truth = outputs(functional.linear, *(tensor.double() for tensor in inputs))
    assert_numeric_rule(outputs(linear, *inputs), outputs(functional.linear, *inputs), truth)


def operands_of(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad_y, whose columns do not add up to nearly nothing, and x."""
    rows, _, columns = shape
    x = inputs_of(shape, dtype=dtype)[0]
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return (x[:, :1] + noise).to(dtype), x


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_numeric_rule_for_the_gradient_of_a_weight(
    threads: Callable[[int], None],
    count: int,
    shape: tuple[int, int, int],
    gradient_dtype: torch.dtype,
) -> None:
    threads(count)
    operands = operands_of(shape, gradient_dtype)
    exact = (tensor.double() for tensor in operands)
    got, plain, truth = (
        dict(zip(("grad_weight", "grad_bias"), grads, strict=True))
        for grads in (
            native.weight_gradient(*operands),
            products.weight_gradient(*operands),
            products.weight_gradient(*exact),
        )
    )
    assert native.has_weight_gradient(gradient_dtype, *shape)
    assert_numeric_rule(got, plain, truth)
    (alone,) = native.weight_gradient(*operands, bias=False)
    assert torch.equal(alone, got["grad_weight"])


@pytest.mark.sanitizer
@pytest.mark.usefixtures("linear_kernels")
@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_float32_of_any_size(size: float) -> None:
    """Rows and columns of very different sizes keep the digits of their own."""
    x, weight, _ = inputs_of((96, 1216, 64), dtype=torch.float32)
    x = x * torch.logspace(0, 1, 96, size)[:, None]
    weight = weight * torch.logspace(0, 1, 64, 1 / size)[:, None]
    exact = functional.linear(x.double(), weight.double())
    unit = exact.abs().amax(dim=1, keepdim=True) * exact.abs().amax(dim=0) / exact.abs().max()
    got, plain = ((run(x, weight).double() - exact) / unit for run in (linear, functional.linear))
    assert got.abs().max() <= 2 * plain.abs().max()


@pytest.mark.sanitizer
@pytest.mark.usefixtures("linear_kernels")
def test_float32_of_mixed_sizes() -> None:
    """Within a row too, and where large terms cancel."""
    x, weight, _ = inputs_of((96, 1216, 64), dtype=torch.float32)
    x *= 2.0 ** torch.randint(-30, 30, x.shape, generator=torch.Generator().manual_seed(2))
    x[:, 1::2], weight[:, 1::2] = x[:, ::2], -weight[:, ::2]
    x[:, 1] = 1.0
    exact = functional.linear(x.double(), weight.double())
    got, plain = (run(x, weight).double() - exact for run in (linear, functional.linear))
    assert got.abs().max() <= 2 * plain.abs().max()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_its_row(value: float, linear_dtype: torch.dtype) -> None:
    x, weight, bias = inputs_of((70, 64, 96), dtype=linear_dtype)
    expected = linear(x, weight, bias)
    x[3, 5] = value
    y = linear(x, weight, bias)
    assert not y[3].isfinite().any()
    others = torch.arange(len(x)) != 3
    assert torch.equal(y[others], expected[others])


@pytest.mark.usefixtures("linear_kernels")
def test_the_largest_number_of_float32() -> None:
    x, weight, _ = inputs_of((32, 32, 32), dtype=torch.float32)
    x[:] = torch.finfo(torch.float32).max
    weight[:] = torch.eye(32)
    assert torch.equal(linear(x, weight), x)


@pytest.mark.parametrize("shape", [(127, 96, 320), (1029, 64, 128), (70, 1216, 128)], ids=str)
def test_threads_do_not_change_a_bit(
    threads: Callable[[int], None], shape: tuple[int, int, int], linear_dtype: torch.dtype
) -> None:
    inputs = inputs_of(shape, dtype=linear_dtype)
    expected = linear(*inputs)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(linear(*inputs), expected)


@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_threads_do_not_change_a_bit_of_the_gradient_of_a_weight(
    threads: Callable[[int], None], shape: tuple[int, int, int], gradient_dtype: torch.dtype
) -> None:
    operands = operands_of(shape, gradient_dtype)
    expected = native.weight_gradient(*operands)
    for count in (2, 3, 8):
        threads(count)
        for grad, same in zip(native.weight_gradient(*operands), expected, strict=True):
            assert torch.equal(grad, same)


def test_threads_do_not_change_a_bit_of_the_mlp(
    threads: Callable[[int], None], linear_dtype: torch.dtype
) -> None:
    """With more threads than blocks of rows it is computed layer by layer."""
    for shape in ((70, 64), (515, 32)):
        inputs = MLPCase(shape, 256, 64, linear_dtype, residual=torch.float32).inputs()
        threads(1)
        expected = dk.mlp(**inputs)
        for count in (2, 3, 8):
            threads(count)
            assert torch.equal(dk.mlp(**inputs), expected)


def test_strided_inputs(linear_dtype: torch.dtype) -> None:
    x, weight, bias = inputs_of((96, 64, 32), dtype=linear_dtype)
    expected = linear(x, weight, bias)
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat(2, 1).t()[:, 0])
    assert torch.equal(linear(*strided), expected)


def test_what_goes_to_the_operator(linear_dtype: torch.dtype) -> None:
    """Whole blocks, where this instruction set has a kernel, and all that PyTorch has none for."""
    x, weight, _ = inputs_of((64, 32, 96), dtype=linear_dtype)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert calls(lambda: linear(*leaves).sum().backward()) == list(OPERATORS)
    assert not calls(lambda: linear(x.double(), weight.double()))
    slow = products.are_slow(linear_dtype, "cpu")
    assert bool(calls(lambda: linear(x[:31], weight))) == slow
    assert bool(calls(lambda: linear(x[:, :24], weight[:, :24]))) == slow
    with dk.use_backend("reference"):
        assert bool(calls(lambda: linear(x, weight))) == slow
    with running_on("cpu-generic"):
        assert bool(calls(lambda: linear(x, weight))) == slow


ALL = {torch.float32, torch.bfloat16, torch.float16}
HAVE = {
    "avx2": ALL,
    "avx512": ALL,
    "avx512_bf16": {torch.float32, torch.float16},
    "amx": {torch.float32, torch.bfloat16},
}


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_what_has_kernels(instruction_set: str) -> None:
    with native.use_instruction_set(instruction_set):
        found = {d for d, i in native.DTYPES.items() if library.kernels.linear_product(i)}
    assert found == HAVE.get(instruction_set, set())


@contextmanager
def as_in_use(instruction_set: str) -> Iterator[None]:
    """With the sizes that are faster, on a processor that has no more than it."""
    limits = {name: getattr(layers, name) for name in ("_FUSED", "_PRODUCT", "_TRANSPOSED")}
    with linear_kernels_on(instruction_set), patch.multiple(layers, **limits):
        yield


# The least rows, and whether weights of more than 2^20 numbers are taken, by tiles and by vectors.
FUSED = {
    ("tiles", torch.float32): (512, False),
    ("tiles", torch.bfloat16): (32, True),
    ("vectors", torch.float32): (128, False),
    ("vectors", torch.bfloat16): (32, True),
    ("vectors", torch.float16): (32, True),
}
ALONE = {
    ("tiles", torch.float32): (512, False),
    ("tiles", torch.bfloat16): (32, True),
    ("vectors", torch.bfloat16): (1, True),
    ("vectors", torch.float16): (1, True),
}


@pytest.mark.parametrize(("instruction_set", "dtype"), LINEAR_KERNELS, ids=str)
@pytest.mark.parametrize(
    ("is_taken", "sizes"), [(native.is_fused, FUSED), (native.has_product, ALONE)]
)
def test_what_is_faster_by_kernels(
    is_taken: Callable[..., bool],
    sizes: dict[tuple[str, torch.dtype], tuple[int, bool]],
    instruction_set: str,
    dtype: torch.dtype,
) -> None:
    with as_in_use(instruction_set):
        product = library.kernels.linear_product(native.DTYPES[dtype])
        rows, any_weight = sizes.get((product, dtype), (0, False))
        assert is_taken(dtype, 512, 1024, 1024) == bool(rows)
        assert is_taken(dtype, 512, 1024, 1056) == any_weight
        assert is_taken(dtype, rows, 32, 64) == bool(rows)
        assert not is_taken(dtype, rows - 1, 32, 64)
        assert not is_taken(dtype, 512, 32, 72)


@pytest.mark.parametrize(("instruction_set", "dtype"), LINEAR_KERNELS, ids=str)
def test_half_precision_by_vectors_is_for_want_of_instructions(
    instruction_set: str, dtype: torch.dtype
) -> None:
    with as_in_use(instruction_set), patch.object(products, "_NATIVE", {}):
        by_vectors = library.kernels.linear_product(native.DTYPES[dtype]) == "vectors"
        assert native.is_fused(dtype, 512, 32, 64) == (not by_vectors or dtype.itemsize == 4)


@pytest.mark.parametrize(("instruction_set", "dtype"), LINEAR_KERNELS, ids=str)
def test_gradients_of_x_that_the_kernel_computes(instruction_set: str, dtype: torch.dtype) -> None:
    """It cannot read a transposed weight where rows are few."""
    with (
        as_in_use(instruction_set),
        patch.object(layers, "_linear", side_effect=layers._linear) as kernel,
    ):
        product = library.kernels.linear_product(native.DTYPES[dtype])
        for rows, columns in ((31, 32), (32, 32), (512, 1024), (512, 1056)):
            kernel.reset_mock()
            native.mm(torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, columns, dtype=dtype))
            least, _ = FUSED[product, dtype]
            small = columns < 1056 or (product, dtype) == ("tiles", torch.bfloat16)
            alone = (product, dtype) in ALONE
            assert kernel.called == (alone and rows >= least and small)


@pytest.mark.parametrize("rows", [pytest.param(517, marks=pytest.mark.sanitizer), 2085])
def test_an_mlp_layer_by_layer(rows: int, linear_dtype: torch.dtype) -> None:
    """128 rows of its hidden layer are larger than a cache, and 2085 are taken in two parts."""
    case = MLPCase((rows, 32), 4128, 512, linear_dtype)
    inputs = case.inputs()
    exact = {name: tensor.double() for name, tensor in inputs.items() if tensor is not None}
    with dk.use_backend("reference"):
        plain, truth = dk.mlp(**inputs), dk.mlp(**exact)
    assert_numeric_rule({"y": dk.mlp(**inputs)}, {"y": plain}, {"y": truth})


@pytest.mark.skipif(not GRADIENT_KERNELS, reason="no kernels of weights' gradients here")
def test_float32_takes_any_weight_whose_gradient_is_needed() -> None:
    x, weight, _ = inputs_of((64, 32, 96), dtype=torch.float32)
    weight.requires_grad_()
    assert calls(lambda: linear(x, weight).sum().backward()) == list(OPERATORS)
    assert not calls(lambda: linear(x[:31], weight))
    with torch.no_grad():
        assert not calls(lambda: linear(x, weight))


def test_a_layer_without_columns(linear_dtype: torch.dtype) -> None:
    x, weight, bias = inputs_of((64, 32, 0), dtype=linear_dtype)
    got = outputs(linear, x, weight, bias)
    assert {name: tensor.shape for name, tensor in got.items()} == {
        "y": (64, 0),
        "grad_0": (64, 32),
        "grad_1": (0, 32),
        "grad_2": (0,),
    }
    assert not got["grad_0"].any()


def test_the_backend_may_change_before_the_backward_pass(linear_dtype: torch.dtype) -> None:
    x, weight, _ = inputs_of((64, 32, 96), dtype=linear_dtype)
    y = linear(x.requires_grad_(), weight)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with dk.use_backend("reference"):
        (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("rows", [64, 7])
def test_opcheck(rows: int, linear_dtype: torch.dtype) -> None:
    inputs = [
        tensor.requires_grad_() for tensor in inputs_of((rows, 32, 96), 2, dtype=linear_dtype)
    ]
    torch.library.opcheck(torch.ops.diffit.linear.default, inputs)
    torch.library.opcheck(torch.ops.diffit.linear.default, (*inputs[:2], None))
    x, weight, _ = (tensor.detach() for tensor in inputs)
    grad = torch.randn(2, rows, 96).to(linear_dtype)
    for weights in (True, False):
        torch.library.opcheck(torch.ops.diffit.linear_backward.default, (grad, x, weight, weights))


def test_compilers_leave_float32_to_pytorch() -> None:
    x, weight, bias = inputs_of((64, 32, 96), dtype=torch.float32)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, bias), functional.linear(x, weight, bias))
    torch._dynamo.reset()


def test_compiles_once_for_all_batches() -> None:
    x, weight, bias = inputs_of((64, 32, 96), 2)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            rows = torch.cat([x] * batch)
            assert torch.equal(compiled(rows, weight, bias), linear(rows, weight, bias))
    torch._dynamo.reset()


def test_under_autocast() -> None:
    x, weight, bias = (tensor.float() for tensor in inputs_of((64, 32, 96)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight.requires_grad_(), bias)
    assert torch.equal(y, linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, b: (x[:, :16], w, b), ValueError, r"weight: expected shape \(96, 16\)"),
        (lambda x, w, b: (x, w.float(), b), TypeError, "weight: expected torch.bfloat16"),
        (lambda x, w, b: (x, w, b[:5]), ValueError, r"bias: expected shape \(96,\)"),
        (lambda x, w, b: (x[:0], w, b), ValueError, "x: expected at least one row"),
        (lambda x, w, b: (x.long(), w, b), TypeError, "x: expected float32"),
    ],
)
def test_wrong_arguments(
    change: Callable[..., tuple[Tensor, ...]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        torch.ops.diffit.linear(*change(*inputs_of((64, 32, 96))))
