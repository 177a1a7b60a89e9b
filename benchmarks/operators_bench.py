"""The operators under pytest-benchmark, on every backend of the CPU that runs here.

``pytest benchmarks/operators_bench.py``; plain ``pytest`` does not collect this file. A result is
verified by the numeric rule before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import linear

import diffit_kernels
from harness import worst_error
from operations import DIRECTIONS, TABLE, Contestant, judge, layer_data
from shapes import QUICK, Shape

CPU = torch.device("cpu")
BACKENDS = [
    name for name in ("reference", "cpu") if diffit_kernels.available_backends()[name] is None
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Operators run on it."""
    with diffit_kernels.use_backend(request.param):
        yield request.param


def arguments(operator: str, shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a call by the names of their arguments, and the gradient of its result."""
    block, x, temb, grad = layer_data(shape, shape.problem(dtype, CPU))
    attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
    assert attn.qkv_temb is not None
    q_row, _, v_row = (attn.qkv_temb(temb) + attn.qkv.bias).chunk(3, dim=1)
    tensors = {
        "window_attention": {
            "qkv": linear(x, attn.qkv.weight),
            "rel_pos_table": attn.get_parameter(TABLE),
            "q_row": q_row,
            "v_row": v_row,
        },
        "tmsa": {
            "x": x,
            "temb": temb,
            "qkv_weight": attn.qkv.weight,
            "qkv_bias": attn.qkv.bias,
            "temb_weight": attn.qkv_temb.weight,
            "temb_bias": attn.qkv_temb.bias,
            "rel_pos_table": attn.get_parameter(TABLE),
            "proj_weight": attn.proj.weight,
            "proj_bias": attn.proj.bias,
        },
        "mlp": {
            "x": x,
            "fc1_weight": fc1.weight,
            "fc1_bias": fc1.bias,
            "fc2_weight": fc2.weight,
            "fc2_bias": fc2.bias,
        },
    }
    return tensors[operator], grad


def contestant(operator: str, shape: Shape, tensors: dict[str, Tensor], grad: Tensor) -> Contestant:
    """A call of the operator on these tensors."""
    options: dict[str, Any] = {}
    if operator != "mlp":
        options = {"num_heads": shape.num_heads, "window_size": shape.window}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    function = getattr(diffit_kernels, operator)
    return Contestant(operator, lambda: (function(**leaves, **options),), leaves, (grad,), {})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("operator", ["window_attention", "tmsa", "mlp"])
def test_operator(
    benchmark: BenchmarkFixture,
    backend: str,
    operator: str,
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
) -> None:
    """Backends of one operator, shape, dtype and direction form a group."""
    tensors, grad = arguments(operator, shape, dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    ours = contestant(operator, shape, tensors, grad)
    truth, plain_errors = judge(contestant(operator, shape, exact, grad.double()), ours)
    call = ours.call(direction)
    error, where = worst_error(call(), truth[direction], plain_errors[direction])
    assert error <= 1, f"{where}: {error:.3g} times what the numeric rule allows"
    benchmark.group = f"{operator} {shape.name} {str(dtype).removeprefix('torch.')} {direction}"
    benchmark(call)
