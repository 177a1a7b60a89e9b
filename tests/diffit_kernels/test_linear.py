"""Products in bfloat16 where PyTorch's are not the fastest: the kernel on tile registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import diffit_kernels as dk
from diffit_kernels import native
from diffit_kernels.ops.linear import linear
from tests.backends import running_on
from tests.cases import MLPCase
from tests.numeric_rule import assert_numeric_rule

# rows, in_features, out_features: whole blocks, rows left over, several items, a long sum
SHAPES = [
    (32, 32, 32),
    (33, 64, 96),
    (127, 96, 32),
    (300, 32, 608),
    (1029, 64, 128),
    (64, 4608, 64),
]
OPERATORS = (torch.ops.diffit.linear, torch.ops.diffit.linear_backward)


@pytest.fixture(autouse=True)
def fastest_instructions() -> None:
    """As users have them; elsewhere these tests would be PyTorch against itself."""
    if native.unavailable() or not native.has_product(torch.bfloat16, 32, 32):
        pytest.skip("no faster products than PyTorch's for this processor")


def inputs_of(shape: tuple[int, int, int], *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    rows, features, columns = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, rows, features), (columns, features), (columns,))
    x, weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    return x, weight * features**-0.5, bias


def outputs(run: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of sum(y * weights)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = run(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
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
    threads: Callable[[int], None], count: int, shape: tuple[int, int, int], bias: bool
) -> None:
    threads(count)
    inputs = inputs_of(shape, 2)[: 3 if bias else 2]
    truth = outputs(functional.linear, *(tensor.double() for tensor in inputs))
    assert_numeric_rule(outputs(linear, *inputs), outputs(functional.linear, *inputs), truth)


@pytest.mark.parametrize("shape", [(127, 96, 320), (1029, 64, 128)], ids=str)
def test_threads_do_not_change_a_bit(
    threads: Callable[[int], None], shape: tuple[int, int, int]
) -> None:
    inputs = inputs_of(shape)
    expected = linear(*inputs)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(linear(*inputs), expected)


def test_threads_do_not_change_a_bit_of_the_mlp(threads: Callable[[int], None]) -> None:
    """With more threads than blocks of rows it is computed layer by layer."""
    for shape in ((70, 64), (515, 32)):
        inputs = MLPCase(shape, 256, 64, torch.bfloat16, residual=torch.float32).inputs()
        threads(1)
        expected = dk.mlp(**inputs)
        for count in (2, 3, 8):
            threads(count)
            assert torch.equal(dk.mlp(**inputs), expected)


def test_strided_inputs() -> None:
    x, weight, bias = inputs_of((96, 64, 32))
    expected = linear(x, weight, bias)
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat(2, 1).t()[:, 0])
    assert torch.equal(linear(*strided), expected)


def test_what_goes_to_the_kernel() -> None:
    """bfloat16 in whole blocks, on this backend and this instruction set."""
    x, weight, _ = inputs_of((64, 32, 96))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert calls(lambda: linear(*leaves).sum().backward()) == list(OPERATORS)
    assert not calls(lambda: linear(x[:31], weight))
    assert not calls(lambda: linear(x[:, :24], weight[:, :24]))
    assert not calls(lambda: linear(x.float(), weight.float()))
    assert not calls(lambda: linear(x.half(), weight.half()))
    with dk.use_backend("reference"):
        assert not calls(lambda: linear(x, weight))
    with running_on("cpu-generic"):
        assert not calls(lambda: linear(x, weight))


def test_the_backend_may_change_before_the_backward_pass() -> None:
    x, weight, _ = inputs_of((64, 32, 96))
    y = linear(x.requires_grad_(), weight)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with dk.use_backend("reference"):
        (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("rows", [64, 7])
def test_opcheck(rows: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in inputs_of((rows, 32, 96), 2)]
    torch.library.opcheck(torch.ops.diffit.linear.default, inputs)
    torch.library.opcheck(torch.ops.diffit.linear.default, (*inputs[:2], None))
    x, weight, _ = (tensor.detach() for tensor in inputs)
    grad = torch.randn(2, rows, 96).bfloat16()
    for weights in (True, False):
        torch.library.opcheck(torch.ops.diffit.linear_backward.default, (grad, x, weight, weights))


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
