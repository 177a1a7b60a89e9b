"""DiffiTBlock: its equation, its names, its dropout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

import diffit_kernels as dk
from diffit.nn import MLP, DiffiTBlock
from tests.cases import stack
from tests.numeric_rule import assert_numeric_rule
from tests.published import parameters_of, published_tmsa

GRID = (4, 3)


@pytest.fixture
def block() -> DiffiTBlock:
    torch.manual_seed(0)
    return DiffiTBlock(16, 2, temb_dim=6, window_size=(2, 3))


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, temb = torch.randn(2, 12, 16, generator=generator), torch.randn(2, 6, generator=generator)
    return x.to(dtype), temb.to(dtype)


def equation(block: DiffiTBlock, x: Tensor, temb: Tensor | None) -> Tensor:
    """``x = x + TMSA(LN(x), temb)``, ``x = x + MLP(LN(x))``."""
    x = x + published_tmsa(
        layer_norm(x, (16,), eps=1e-6),
        temb,
        **parameters_of(block.attn),
        num_heads=2,
        window_size=(2, 3),
        grid_size=GRID,
    )
    hidden = linear(layer_norm(x, (16,), eps=1e-6), block.mlp.fc1.weight, block.mlp.fc1.bias)
    hidden = gelu(hidden, approximate="tanh")
    return x + linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


def outputs(block: DiffiTBlock, y: Tensor, *leaves: Tensor) -> dict[str, Tensor]:
    """y and the gradients of sum(y * weights), with the same weights in every dtype."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    names = ["x", "temb", *(name for name, _ in block.named_parameters())]
    grads = torch.autograd.grad(y, [*leaves, *block.parameters()], weights.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_equation(backend: str, block: DiffiTBlock, dtype: torch.dtype) -> None:
    """Judged over several inputs: the largest error of the 16 numbers of a bias is luck."""
    block = block.to(dtype)
    exact = copy.deepcopy(block).double()
    got, plain, truth = [], [], []
    for seed in range(1, 9):
        leaves = [tensor.requires_grad_() for tensor in inputs(dtype, seed)]
        exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
        got.append(outputs(block, block(*leaves, grid_size=GRID), *leaves))
        plain.append(outputs(block, equation(block, *leaves), *leaves))
        truth.append(outputs(exact, equation(exact, *exact_leaves), *exact_leaves))
    assert_numeric_rule(*map(stack, (got, plain, truth)))


def test_a_row_in_place_of_the_token(block: DiffiTBlock) -> None:
    block, (x, temb) = block.double(), inputs(torch.float64)
    row = block.attn.qkv_temb(temb)
    torch.testing.assert_close(block(x, row=row, grid_size=GRID), block(x, temb, grid_size=GRID))


def test_without_a_token() -> None:
    torch.manual_seed(0)
    block = DiffiTBlock(16, 2, window_size=(2, 3), dtype=torch.float64)
    x, _ = inputs(torch.float64)
    torch.testing.assert_close(block(x, grid_size=GRID), equation(block, x, None))


def test_names(block: DiffiTBlock) -> None:
    """The published keys; the norms have eps 1e-6 and none."""
    assert {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()} == {
        "attn.qkv.weight": (48, 16),
        "attn.qkv.bias": (48,),
        "attn.qkv_temb.weight": (48, 6),
        "attn.qkv_temb.bias": (48,),
        "attn.proj.weight": (16, 16),
        "attn.proj.bias": (16,),
        "attn.relative_position_bias_table": (15, 2),
        "mlp.fc1.weight": (64, 16),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (16, 64),
        "mlp.fc2.bias": (16,),
    }
    assert block.norm1.eps == block.norm2.eps == 1e-6
    index = dk.relative_position_index((2, 3))
    block.load_state_dict(block.state_dict() | {"attn.relative_position_index": index})


def test_options_reach_the_layers() -> None:
    block = DiffiTBlock(
        16,
        2,
        window_size=2,
        mlp_ratio=2.5,
        qkv_bias=False,
        rel_pos_bias=False,
        attn_drop=0.1,
        proj_drop=0.2,
        dtype=torch.bfloat16,
    )
    assert block.mlp.fc1.out_features == 40
    assert block.attn.qkv.bias is None
    assert block.attn.relative_position_bias_table is None
    assert block.attn.attn_drop.p == 0.1
    assert block.attn.proj_drop.p == block.mlp.drop.p == 0.2
    assert all(parameter.dtype == torch.bfloat16 for parameter in block.parameters())


def test_mlp_dropout() -> None:
    """After both layers; the mean of many samples is the result without it, to 5 errors of it."""
    torch.manual_seed(0)
    mlp = MLP(16, 64, drop=0.5).double()
    x = torch.randn(1, 16, dtype=torch.float64).expand(4000, 16)
    exact, y = mlp.eval()(x[:1]), mlp.train()(x)
    assert 0 < (y == 0).sum() < y.numel()
    standard_error = y.std(dim=0) / len(x) ** 0.5
    assert ((y.mean(dim=0) - exact[0]).abs() <= 5 * standard_error).all()


def test_made_on_meta_and_copied(block: DiffiTBlock) -> None:
    x, temb = inputs()
    y = block(x, temb, grid_size=GRID)
    empty = DiffiTBlock(16, 2, temb_dim=6, window_size=(2, 3), device="meta")
    assert empty(x.to("meta"), temb.to("meta"), grid_size=GRID).shape == x.shape
    empty.load_state_dict(block.state_dict(), assign=True)
    for other in (empty, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x, temb, grid_size=GRID), y)
