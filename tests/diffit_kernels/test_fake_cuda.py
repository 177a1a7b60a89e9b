"""The operators and a block on CUDA tensors without data: what a compiler sees, without a GPU.

PyTorch's builds for the CPU have no guard that switches to such a device, and stop where a view is
taken or a leaf wants a gradient: the block gets one that does nothing. Even then the engine of
autograd runs no node there, so the backward operators are called themselves.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import diffit_kernels as dk
from diffit.nn import DiffiTBlock
from diffit_kernels.block import Saved, Weights
from diffit_kernels.ops.block import is_fused
from tests.cuda_emulator.build import compiler

BATCH, GRID, WINDOW, HEADS, WIDTH = 3, (6, 10), (3, 5), 2, 24
TOKENS, DIM, TEMB = prod(GRID), HEADS * WIDTH, 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ops = torch.ops.diffit


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend is asked for, and every tensor is a fake."""

    def refuse(problem: object) -> None:
        raise AssertionError(f"computed: {problem}")

    for name in ("add_layer_norm", "layer_norm", "mlp", "window_attention"):
        monkeypatch.setattr(import_module(f"diffit_kernels.ops.{name}"), "select", refuse)
    monkeypatch.setattr(import_module("diffit_kernels.block"), "select", refuse)
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def assert_is(x: Tensor, *shape: int, dtype: torch.dtype) -> None:
    assert isinstance(x, FakeTensor)
    assert x.device == torch.device("cuda", 0)
    assert (x.shape, x.dtype) == (shape, dtype)
    assert x.is_contiguous()


def assert_like(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Each as its input, but contiguous."""
    for grad, x in zip(grads, inputs, strict=True):
        assert_is(grad, *x.shape, dtype=x.dtype)


def test_window_attention(dtype: torch.dtype) -> None:
    qkv = fake(TOKENS, BATCH, 3 * DIM, dtype=dtype).transpose(0, 1)
    table = fake((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1), HEADS)
    rows = [fake(BATCH, DIM, dtype=dtype) for _ in range(2)]
    inputs, sizes = (qkv, table, *rows), (HEADS, WINDOW, GRID, 0.2)
    out, lse = ops.window_attention(*inputs, *sizes)
    assert_is(out, BATCH, TOKENS, DIM, dtype=dtype)
    assert_is(lse, BATCH, HEADS, TOKENS, dtype=torch.float32)
    assert_like(ops.window_attention_backward(out, *inputs, lse, *sizes), inputs)
    grads = ops.window_attention_backward(out, qkv, None, None, None, lse, *sizes)
    assert [grad.numel() for grad in grads[1:]] == [0, 0, 0]


@pytest.mark.parametrize("residual", [True, False])
def test_mlp(dtype: torch.dtype, residual: bool) -> None:
    shapes = ((BATCH, TOKENS, DIM), (99, DIM), (99,), (33, 99), (33,))
    inputs = tuple(fake(*shape, dtype=dtype) for shape in shapes)
    added = fake(BATCH, TOKENS, 33) if residual else None
    y, hidden = ops.mlp(*inputs, added, True)
    assert_is(y, BATCH, TOKENS, 33, dtype=torch.float32 if residual else dtype)
    assert hidden.device == y.device
    assert_like(ops.mlp_backward(y.to(dtype), *inputs, hidden, True), inputs)


def test_add_layer_norm(dtype: torch.dtype) -> None:
    x, y = fake(BATCH, TOKENS, DIM, dtype=dtype), fake(TOKENS, BATCH, DIM, dtype=dtype)
    s, n = ops.add_layer_norm(x, y.transpose(0, 1), 1e-6)
    assert_like((s, n), (x, x))
    assert_is(ops.add_layer_norm_backward(s, n, s, 1e-6), *x.shape, dtype=dtype)


def test_layer_norm(dtype: torch.dtype) -> None:
    x = fake(TOKENS, BATCH, DIM).transpose(0, 1)
    n = ops.layer_norm(x, dtype, 1e-6)
    assert_is(n, *x.shape, dtype=dtype)
    assert_is(ops.layer_norm_backward(n, x, 1e-6), *x.shape, dtype=x.dtype)


@pytest.mark.parametrize("stream", [torch.float32, None], ids=str)
@pytest.mark.parametrize("present", [True, False])
def test_block(dtype: torch.dtype, stream: torch.dtype | None, present: bool) -> None:
    x = fake(TOKENS, BATCH, DIM, dtype=stream or dtype).transpose(0, 1)
    shapes = [(BATCH, TEMB), None, (3 * DIM, DIM), (3 * DIM,), (3 * DIM, TEMB), (3 * DIM,)]
    shapes = [size if present or size == (3 * DIM, DIM) else None for size in shapes]
    given = [None if size is None else fake(*size, dtype=dtype) for size in shapes]
    table = fake((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1), HEADS) if present else None
    shapes = [(DIM, DIM), (DIM,), (99, DIM), (99,), (DIM, 99), (DIM,)]
    inputs = [x, *given, table, *(fake(*size, dtype=dtype) for size in shapes)]
    sizes = (HEADS, WINDOW, GRID, 0.2, 1e-6, 1e-6)
    assert_is(ops.block(*inputs, *sizes), BATCH, TOKENS, DIM, dtype=x.dtype)
    y, *saved = ops.block_training(*inputs, *sizes)
    assert_is(y, BATCH, TOKENS, DIM, dtype=x.dtype)
    kept = Saved(*saved)
    assert_is(kept.row, *((BATCH, 3 * DIM) if present else (0,)), dtype=dtype)
    assert_is(kept.qkv, BATCH, TOKENS, 3 * DIM, dtype=dtype)
    assert_is(kept.attention, BATCH, TOKENS, DIM, dtype=dtype)
    assert_is(kept.lse, BATCH, HEADS, TOKENS, dtype=torch.float32)
    assert_is(kept.s, BATCH, TOKENS, DIM, dtype=x.dtype)
    assert_is(kept.hidden, BATCH * TOKENS, 99, dtype=dtype)
    grads = ops.block_backward(y, *saved, *inputs, *sizes, True)
    for grad, tensor in zip(grads, inputs, strict=True):
        if tensor is None:
            assert grad.numel() == 0
        else:
            assert_like((grad,), (tensor,))


def test_when_a_block_is_one_operator() -> None:
    """In inference, and in training where all weights or none are trained."""
    x = fake(BATCH, TOKENS, DIM)
    weights = Weights(*[fake(3) for _ in Weights._fields])

    def fused(x: Tensor = x) -> bool:
        return is_fused(x, weights, HEADS, WINDOW)

    assert fused()
    assert not fused(fake(TOKENS, DIM))
    with torch.enable_grad():
        assert fused()
        weights.proj.requires_grad = True
        assert not fused()
        for weight in weights:
            weight.requires_grad = True
        assert fused()
    # torch.autocast leaves it off where there is no device
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        taken = [fused(fake(BATCH, TOKENS, DIM, dtype=dtype)) for dtype in (*DTYPES, torch.float64)]
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert taken == [True, True, False, True]


def test_time_rows(dtype: torch.dtype) -> None:
    layers = 5
    rows = dk.time_rows(
        fake(BATCH, TEMB, dtype=dtype),
        fake(layers, 3 * DIM, TEMB, dtype=dtype),
        fake(layers, 3 * DIM, dtype=dtype),
    )
    assert (rows.shape, rows.dtype) == ((layers, BATCH, 3 * DIM), dtype)


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void set_guard(bool there) {
  static const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, there ? &guard : nullptr);
}
"""


@pytest.fixture(scope="module")
def device_guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where PyTorch has none for CUDA."""
    if torch.backends.cuda.is_built():
        yield
        return
    if compiler() is None:
        pytest.skip("no C++ compiler")
    torch_path, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard") / "guard.so"
    command = [compiler(), "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    command += [f"-I{torch_path / 'include'}", f"-L{torch_path / 'lib'}", "-lc10"]
    subprocess.run(command, input=GUARD, text=True, check=True)
    set_guard = ctypes.CDLL(str(library)).set_guard
    set_guard(True)
    yield
    set_guard(False)


@pytest.mark.parametrize("training", [False, True])
def test_a_block_is_one_graph(
    device_guard: None, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random numbers come from the device's own generator, which is not there.
    for name in ("kaiming_uniform_", "trunc_normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda x, *_, **__: x)
    options = {"temb_dim": TEMB, "window_size": WINDOW, "dtype": dtype}
    block = DiffiTBlock(DIM, HEADS, device="cuda", **options).requires_grad_(training)
    called: set[str] = set()

    def capture(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(block, backend=capture, fullgraph=True)
    try:
        x, temb = fake(BATCH, TOKENS, DIM, dtype=dtype), fake(BATCH, TEMB, dtype=dtype)
        with torch.set_grad_enabled(training):
            y = compiled(x, temb, grid_size=GRID)
    finally:
        torch._dynamo.reset()
    assert_is(y, BATCH, TOKENS, DIM, dtype=dtype)
    assert y.requires_grad == training
    names = {name.removeprefix("diffit.").partition(".")[0] for name in called if "diffit" in name}
    assert names >= {"window_attention", "mlp", "add_layer_norm", "layer_norm"}
