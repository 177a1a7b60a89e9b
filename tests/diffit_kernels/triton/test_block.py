"""A whole block on Triton's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.block_case import Case, judge, one_operator, run, trained
from tests.cases import Tensors
from tests.diffit_kernels.triton.device import DEVICE, DTYPES

pytest.importorskip("triton")

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_inference(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype, lambda block, inputs: {"y": run(block, inputs)}, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    def cast(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
        with torch.autocast(DEVICE, dtype, enabled=inputs["x"].dtype != torch.float64):
            return trained(block, inputs)

    judge(SMALL, torch.float32, cast, device=DEVICE)


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
        assert "block" in y.grad_fn.name()
        with one_operator(True):
            assert torch.equal(y, block(**inputs))
        block.mlp.fc1.weight.requires_grad_(False)
        assert "block" not in block(**inputs).grad_fn.name()
