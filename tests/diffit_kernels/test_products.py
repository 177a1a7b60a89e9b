"""Products in half precision as on a processor that has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import diffit_kernels as dk
from diffit_kernels import products
from diffit_kernels.ops.linear import linear
from tests.cases import MLPCase
from tests.numeric_rule import assert_numeric_rule

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AVX2; three rows of the weights at a time."""
    monkeypatch.setattr(products, "_NATIVE", dict.fromkeys(HALF, False))
    monkeypatch.setattr(products, "_PART_BYTES", 3 * 4 * 24)


def outputs(run: object, *inputs: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of sum(y * weights)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = run(*leaves)  # type: ignore[operator]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(y, leaves, weights.to(y.dtype))
    return {"y": y.detach()} | {f"grad_{i}": grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (16, 9, 24)])
def test_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (40, 24), (40,)][: 3 if bias else 2]
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    truth = outputs(functional.linear, *(tensor.double() for tensor in inputs))
    assert_numeric_rule(outputs(linear, *inputs), outputs(functional.linear, *inputs), truth)


def test_strided_inputs() -> None:
    x, weight = torch.randn(24, 6).bfloat16().t(), torch.randn(24, 40).bfloat16().t()
    expected = functional.linear(x.double(), weight.double())
    error = (linear(x, weight).double() - expected).abs().max()
    assert error <= (functional.linear(x, weight).double() - expected).abs().max() * 2 + 1e-6


def test_only_the_gradients_asked_for() -> None:
    x, weight = torch.randn(3, 24).bfloat16(), torch.randn(5, 24).bfloat16()
    linear(x, weight.requires_grad_()).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_under_autocast() -> None:
    """float32 numbers are rounded to bfloat16 first, and their gradients are float32."""
    x, weight, bias = torch.randn(3, 24), torch.randn(5, 24), torch.randn(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight.requires_grad_(), bias)
    assert y.dtype == torch.bfloat16
    expected = linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    x, weight = torch.randn(3, 24).double(), torch.randn(5, 24).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_float32_is_left_alone() -> None:
    x, weight = torch.randn(3, 24), torch.randn(5, 24)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert torch.equal(products.mm(x, weight.t()), x @ weight.t())


def test_compiles() -> None:
    x, weight = torch.randn(3, 24).bfloat16(), torch.randn(5, 24).bfloat16().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    compiled(x, weight).sum().backward()
    got, weight.grad = weight.grad, None
    linear(x, weight).sum().backward()
    assert got is not None
    assert weight.grad is not None
    assert torch.equal(got, weight.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", HALF)
def test_mlp(dtype: torch.dtype) -> None:
    """The kernels around widened products keep the numeric rule."""
    if dk.available_backends()["cpu"]:
        pytest.skip("the compiled kernels are not there")
    case = MLPCase((2, 9, 24), 40, 16, dtype)
    with dk.use_backend("cpu"):
        assert_numeric_rule(case.operator(), case.plain(), case.truth())


def test_batched_gradients() -> None:
    x, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((2, 3, 24), (5, 24)))
    y = linear(x, weight)
    several = torch.randn(4, *y.shape).bfloat16()
    leaves = (x, weight)
    each = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in several]
    batched = torch.autograd.grad(y, leaves, several, is_grads_batched=True)
    for got, *expected in zip(batched, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize(("avx512", "avx512_bf16"), [(False, False), (True, False), (True, True)])
def test_what_onednn_emulates_is_slow(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, avx512_bf16: bool
) -> None:
    """It takes bfloat16 on any AVX-512, elsewhere only where there are instructions."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert products._has_bfloat16() == (avx512 == avx512_bf16)
