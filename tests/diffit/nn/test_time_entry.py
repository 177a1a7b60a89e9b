"""Blocks in which time enters elsewhere: each against its formula, written plainly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from diffit.nn import DiffiTBlock
from diffit.nn.time_entry import TIME_ENTRIES, TimeBiasBlock
from tests.cases import gradients, stack
from tests.numeric_rule import assert_numeric_rule
from tests.published import parameters_of, published_tmsa

GRID, WINDOW = (4, 6), (2, 3)


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, (16,), eps=1e-6)


def project(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def attend(block: DiffiTBlock, x: Tensor, table: Tensor | None = None) -> Tensor:
    """Before the output projection."""
    arguments = parameters_of(block.attn)
    arguments |= {"proj_weight": torch.eye(16, dtype=x.dtype), "proj_bias": None}
    if table is not None:
        arguments["rel_pos_table"] = table
    return published_tmsa(x, None, **arguments, num_heads=2, window_size=WINDOW, grid_size=GRID)


def mlp(block: DiffiTBlock, x: Tensor) -> Tensor:
    return project(block.mlp.fc2, gelu(project(block.mlp.fc1, x), approximate="tanh"))


def separate(block: DiffiTBlock, x: Tensor, temb: Tensor) -> Tensor:
    """The probability of a token that attends to itself is 1, so its attention is its value."""
    token = project(block.v_temb, temb)[:, None]
    x = x + project(block.attn.proj, attend(block, norm(x)) + token)
    return x + mlp(block, norm(x))


def bias(block: DiffiTBlock, x: Tensor, temb: Tensor) -> Tensor:
    """Sample by sample, each with a table of its own."""
    own = block.attn.relative_position_bias_table
    tables = [own + row.view_as(own) for row in project(block.table_temb, temb)]
    pairs = zip(norm(x).split(1), tables, strict=True)
    out = torch.cat([attend(block, sample, table) for sample, table in pairs])
    x = x + project(block.attn.proj, out)
    return x + mlp(block, norm(x))


def in_mlp(block: DiffiTBlock, x: Tensor, temb: Tensor) -> Tensor:
    x = x + project(block.attn.proj, attend(block, norm(x)))
    return x + mlp(block, norm(x) + project(block.mlp_temb, temb)[:, None])


def scale(block: DiffiTBlock, x: Tensor, temb: Tensor) -> Tensor:
    a, b, c, d = project(block.scale_temb, temb)[:, None].split(16, dim=-1)
    x = x + project(block.attn.proj, attend(block, norm(x) * (1 + a) + b))
    return x + mlp(block, norm(x) * (1 + c) + d)


FORMULAS: dict[str, Callable[[DiffiTBlock, Tensor, Tensor], Tensor]] = {
    "separate": separate,
    "bias": bias,
    "mlp": in_mlp,
    "scale": scale,
}


def make(entry: str, dtype: torch.dtype = torch.float32) -> DiffiTBlock:
    torch.manual_seed(0)
    block = TIME_ENTRIES[entry](16, 2, temb_dim=6, window_size=WINDOW)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    return block.to(dtype)


def inputs(dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, 24, 16), "temb": (2, 6)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def outputs(block: DiffiTBlock, y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradients of sum(y * weights), with the same weights in every dtype."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    leaves = leaves | dict(block.named_parameters())
    return {"y": y.detach()} | gradients(y, leaves, weights.to(y.dtype))


def test_every_entry_has_its_formula() -> None:
    """DiffiT's own is tested in test_block."""
    assert TIME_ENTRIES.keys() == FORMULAS.keys() | {"tmsa"}


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("entry", FORMULAS)
def test_equals_its_formula(
    fastest_backend: str, entry: str, dtype: torch.dtype, autocast: bool
) -> None:
    """Judged over several inputs: the largest error of the 16 numbers of a bias is luck."""
    block, formula = make(entry, dtype), FORMULAS[entry]
    exact = copy.deepcopy(block).double()
    got, plain, truth = [], [], []
    for seed in range(1, 33):
        leaves = inputs(dtype, seed)
        doubles = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            fast, slow = block(**leaves, grid_size=GRID), formula(block, **leaves)
        got.append(outputs(block, fast, leaves))
        plain.append(outputs(block, slow, leaves))
        truth.append(outputs(exact, formula(exact, **doubles), doubles))
    assert_numeric_rule(*map(stack, (got, plain, truth)))


@pytest.mark.parametrize("entry", TIME_ENTRIES)
def test_the_default_grid_is_a_square(entry: str) -> None:
    torch.manual_seed(0)
    block = TIME_ENTRIES[entry](16, 2, temb_dim=6, window_size=2)
    x, temb = torch.randn(1, 16, 16), torch.randn(1, 6)
    assert torch.equal(block(x, temb), block(x, temb, grid_size=(4, 4)))


def test_time_in_the_bias_needs_one() -> None:
    with pytest.raises(ValueError, match="rel_pos_bias: expected True"):
        TimeBiasBlock(16, 2, temb_dim=6, window_size=2, rel_pos_bias=False)
