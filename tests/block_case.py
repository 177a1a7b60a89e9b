"""Transformer blocks, what they are called with, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import diffit_kernels as dk
from diffit.nn import DiffiTBlock
from tests.cases import Tensors, gradients, stack
from tests.numeric_rule import assert_numeric_rule

# The package's name of it would be the operator's.
_BLOCK = import_module("diffit.nn.block")


@dataclass(frozen=True)
class Case:
    """A block and what it is called with."""

    batch: int
    grid: tuple[int, int]
    window: tuple[int, int]
    dim: int
    heads: int
    temb_dim: int | None = 24
    qkv_bias: bool = True
    rel_pos_bias: bool = True
    mlp_ratio: float = 4

    def block(self, dtype: torch.dtype) -> DiffiTBlock:
        torch.manual_seed(0)
        block = DiffiTBlock(
            self.dim,
            self.heads,
            temb_dim=self.temb_dim,
            window_size=self.window,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            rel_pos_bias=self.rel_pos_bias,
        )
        for parameter in block.parameters():  # as large as what they are added to
            if parameter.dim() == 1 or parameter is block.attn.relative_position_bias_table:
                nn.init.normal_(parameter)
        return block.to(dtype).requires_grad_(False)

    def inputs(self, dtype: torch.dtype, draw: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1 + draw)
        shape = (self.batch, self.grid[0] * self.grid[1], self.dim)
        x = torch.randn(shape, generator=generator).to(dtype) * 2 + 1
        temb = None
        if self.temb_dim is not None:
            temb = torch.randn(self.batch, self.temb_dim, generator=generator).to(dtype)
        return {"x": x, "temb": temb, "grid_size": self.grid}


CASES = [
    Case(3, (16, 32), (4, 8), 64, 2),  # a row of windows in a part
    Case(2, (32, 8), (2, 4), 96, 4, temb_dim=19),  # some rows of windows of a sample
    Case(25, (4, 4), (2, 2), 32, 1),  # eight and nine samples
    Case(9, (4, 4), (2, 2), 32, 1, temb_dim=7, qkv_bias=False),  # all samples
    Case(5, (3, 11), (3, 11), 64, 8, rel_pos_bias=False),  # rows of a product left over
    Case(2, (7, 7), (1, 7), 32, 2, temb_dim=None, mlp_ratio=1),
    Case(1, (16, 16), (16, 16), 64, 1, temb_dim=None, qkv_bias=False),
    Case(1, (10, 26), (5, 13), 544, 17, mlp_ratio=2),  # long sums
    Case(2, (17, 8), (1, 8), 32, 1),  # parts would be too small
    Case(1, (27, 27), (27, 27), 576, 18, mlp_ratio=1),  # and too large
]


def run(block: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return block(**inputs)


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Of ``torch.ops.diffit.block``."""
    block, inputs = case.block(dtype), case.inputs(dtype)
    attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
    return {
        "x": inputs["x"],
        "temb": inputs["temb"],
        "row": None,
        "qkv_weight": attn.qkv.weight,
        "qkv_bias": attn.qkv.bias,
        "temb_weight": attn.qkv_temb.weight,
        "temb_bias": attn.qkv_temb.bias,
        "rel_pos_table": attn.relative_position_bias_table.float(),
        "proj_weight": attn.proj.weight,
        "proj_bias": attn.proj.bias,
        "fc1_weight": fc1.weight,
        "fc1_bias": fc1.bias,
        "fc2_weight": fc2.weight,
        "fc2_bias": fc2.bias,
        "num_heads": case.heads,
        "window_size": case.window,
        "grid_size": case.grid,
        "scale": attn.scale,
        "eps1": 1e-6,
        "eps2": 1e-6,
    }


Run = Callable[[nn.Module, dict[str, Any]], Tensors]


def one_operator(fused: bool) -> Any:
    """A context in which blocks are one operator, or never are."""
    return patch.object(_BLOCK, "is_fused", lambda *_: fused)


def trained(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
    """y and the gradients of what is a floating tensor of the inputs, and of all parameters."""
    leaves = dict(block.named_parameters())
    inputs = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            leaves[name] = inputs[name] = value.detach()
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = block(**inputs)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return {"y": y.detach()} | gradients(y, leaves, grad_y.to(y))


def judge(
    case: Case, dtype: torch.dtype, call: Run = trained, draws: int = 4, device: str = "cpu"
) -> None:
    """The numeric rule, for a block by one operator on the backend in use."""
    got, plain, truth = [], [], []
    block = case.block(dtype).to(device)
    exact = deepcopy(block).double()
    for draw in range(draws):
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in case.inputs(dtype, draw).items()
        }
        doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with one_operator(True):
            got.append(call(block, inputs))
        with one_operator(False), dk.use_backend("reference"):
            plain.append(call(block, inputs))
            truth.append(call(exact, doubles))
    assert_numeric_rule(*map(stack, (got, plain, truth)))
