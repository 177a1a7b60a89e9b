"""A whole block on Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from diffit_kernels.problem import MLPProblem
from diffit_kernels.triton import configs
from diffit_kernels.triton.configs import CUBLASLT, Config
from tests.block_case import Case, Run, judge, one_operator, run, trained
from tests.cases import Tensors
from tests.diffit_kernels.triton.device import DEVICE, DTYPES

pytest.importorskip("triton")

halves = import_module("diffit_kernels.triton.block")

SMALL = Case(2, (4, 6), (2, 3), 32, 2)
TRAINED = [
    SMALL,
    Case(2, (7, 7), (7, 7), 24, 1, temb_dim=None, mlp_ratio=1),
    Case(1, (10, 9), (10, 9), 72, 1, qkv_bias=False),
    Case(2, (3, 5), (3, 5), 48, 2, rel_pos_bias=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_the_numeric_rule(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype, device=DEVICE)


def inference(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
    return {"y": run(block, inputs)}


# The perceptron's own kernels, which no table has for float32, would multiply it in TF32 on a GPU.
INFERENCE = [
    (dtype, in_place)
    for dtype in DTYPES
    for in_place in (True, False)
    if in_place or dtype != torch.float32 or DEVICE == "cpu"
]


@pytest.mark.parametrize(("dtype", "in_place"), INFERENCE, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_inference(
    monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, in_place: bool
) -> None:
    """With the second product added to the sum in place, and by the perceptron's own kernels."""
    monkeypatch.setattr(import_module("diffit_kernels.triton.mlp"), "_config", _config(in_place))
    monkeypatch.setattr(halves, "adds_in_place", lambda *_: in_place)
    with patch.object(halves, "add_mlp", wraps=halves.add_mlp) as added:
        judge(case, dtype, inference, device=DEVICE)
    assert added.called == in_place


def _config(in_place: bool) -> Callable[..., Config]:
    tiles = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 2, "num_warps": 4}
    return lambda *_: CUBLASLT if in_place else tiles | {"WHOLE_K": False}


@pytest.mark.parametrize("call", [trained, inference])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype: torch.dtype, call: Run) -> None:
    def cast(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
        with torch.autocast(DEVICE, dtype, enabled=inputs["x"].dtype != torch.float64):
            return call(block, inputs)

    judge(SMALL, torch.float32, cast, device=DEVICE)


def test_the_table_says_whose_the_second_product_is() -> None:
    problem = MLPProblem(8192, 1152, 4608, 1152, torch.bfloat16, "cuda")
    device = torch.device(DEVICE)
    assert halves.adds_in_place(replace(problem, dtype=torch.float32), device)
    with patch.object(configs, "table_of", lambda _: configs.tables()["h100"]):
        configs.nearest.cache_clear()
        assert halves.adds_in_place(problem, device)
    with patch.object(configs, "table_of", lambda _: configs.tables()["default"]):
        configs.nearest.cache_clear()
        assert not halves.adds_in_place(problem, device)
    configs.nearest.cache_clear()


@pytest.mark.skipif(DEVICE != "cuda", reason="layers take it by themselves on a GPU only")
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_take_it_by_themselves(autocast: bool) -> None:
    block = SMALL.block(torch.float32).to(DEVICE).requires_grad_()
    inputs = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in SMALL.inputs(torch.float32).items()
    }
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = block(**inputs)
        assert "block" in type(y.grad_fn).__name__
        with one_operator(True):
            assert torch.equal(y, block(**inputs))
        block.mlp.fc1.weight.requires_grad_(False)
        assert "block" not in type(block(**inputs).grad_fn).__name__
