"""Layers in the place of a projection or norm: adapters, hooks, quantised layers are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn

from diffit.nn import TMSA, DiffiTBlock
from diffit.nn.fusible import are_fusible

LINEAR = ("attn.qkv", "attn.qkv_temb", "attn.proj", "mlp.fc1", "mlp.fc2")


class Adapter(nn.Module):
    """``base(x) + up(down(x))``, with the weight and bias of ``base`` in view, as PEFT has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.fixture
def block() -> DiffiTBlock:
    torch.manual_seed(0)
    return DiffiTBlock(16, 2, temb_dim=6, window_size=(2, 3))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 12, 16, generator=generator), torch.randn(2, 6, generator=generator)


def put(block: nn.Module, name: str, wrap: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(attrgetter(parent)(block), last, wrap(attrgetter(name)(block)))
    return attrgetter(name)(block)


def run(block: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    return block(*inputs, grid_size=(4, 3))


@pytest.mark.parametrize("name", LINEAR)
def test_adapter(name: str, block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """As if it were merged into the weight; its parameters get their gradients."""
    merged, before = copy.deepcopy(block), run(block, inputs)
    adapter = put(block, name, Adapter)
    with torch.no_grad():
        attrgetter(name)(merged).weight += adapter.up.weight @ adapter.down.weight
    expected, got = run(merged, inputs), run(block, inputs)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, before)
    expected.square().sum().backward()
    got.square().sum().backward()
    grad = attrgetter(name)(merged).weight.grad
    torch.testing.assert_close(adapter.up.weight.grad, grad @ adapter.down.weight.t())
    torch.testing.assert_close(adapter.down.weight.grad, adapter.up.weight.t() @ grad)


@pytest.mark.parametrize("name", ["qkv", "qkv_temb", "proj"])
@pytest.mark.parametrize("use_row", [False, True])
def test_adapter_with_a_token_for_several_windows(name: str, use_row: bool) -> None:
    """(windows * B, M, C), and the row that was computed elsewhere."""
    torch.manual_seed(0)
    layer = TMSA(16, 2, temb_dim=6, window_size=(2, 3))
    x, temb = torch.randn(4, 6, 16), torch.randn(2, 6)
    wrapped = nn.ModuleDict({"attn": copy.deepcopy(layer)})
    put(wrapped, f"attn.{name}", lambda base: nn.Sequential(base))
    arguments = {"row": layer.qkv_temb(temb)} if use_row else {"temb": temb}
    torch.testing.assert_close(wrapped["attn"](x, **arguments), layer(x, **arguments))


def test_every_hook_runs(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    expected = run(block, inputs)
    parts = {name: attrgetter(name)(block) for name in ("norm1", "norm2", *LINEAR)}
    assert are_fusible(None, *parts.values())
    calls: list[str] = []
    handles = [
        register(lambda *_, name=name: calls.append(name))
        for name, part in parts.items()
        for register in (part.register_forward_hook, part.register_forward_pre_hook)
    ]
    torch.testing.assert_close(run(block, inputs), expected)
    assert sorted(calls) == sorted([*parts] * 2)
    for handle in handles:
        handle.remove()
    assert are_fusible(*parts.values())


def test_norms_may_be_others(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """With parameters, or of another kind."""
    block.norm1, block.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
    nn.init.normal_(block.norm1.weight)
    x, temb = inputs
    x = x + block.attn(block.norm1(x), temb, grid_size=(4, 3))
    torch.testing.assert_close(run(block, inputs), x + block.mlp(block.norm2(x)))


@pytest.mark.parametrize("name", LINEAR)
def test_forward_of_one_layer_may_be_another(
    name: str, block: DiffiTBlock, inputs: tuple[Tensor, Tensor]
) -> None:
    """As accelerate does it where it moves weights between devices."""
    expected = run(block, inputs)
    layer = attrgetter(name)(block)
    calls: list[str] = []
    forward = layer.forward

    def watched(x: Tensor) -> Tensor:
        calls.append(name)
        return forward(x)

    layer.forward = watched
    torch.testing.assert_close(run(block, inputs), expected)
    assert calls == [name]


def test_compiled(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    for name in LINEAR:
        put(block, name, Adapter)
    calls: list[int] = []
    block.norm1.register_forward_hook(lambda *_: calls.append(1))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(block, inputs))
    assert calls
