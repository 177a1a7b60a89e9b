"""Layers in the place of a projection or norm: adapters, hooks, quantised layers are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn

from diffit.models import LatentDiffiT
from diffit.nn import TMSA, DiffiTBlock
from diffit.nn.fusible import are_linear, are_norms
from tests.diffit.models.networks import stirred

LINEAR = ("attn.qkv", "attn.qkv_temb", "attn.proj", "mlp.fc1", "mlp.fc2")
NORMS = ("norm1", "norm2")


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
    linear, norms = ({name: attrgetter(name)(block) for name in names} for names in (LINEAR, NORMS))
    parts = linear | norms
    assert are_linear(None, *linear.values())
    assert are_norms(*norms.values())
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
    assert are_linear(*linear.values())
    assert are_norms(*norms.values())


def test_norms_may_be_others(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """With parameters, or of another kind."""
    block.norm1, block.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
    nn.init.normal_(block.norm1.weight)
    x, temb = inputs
    x = x + block.attn(block.norm1(x), temb, grid_size=(4, 3))
    torch.testing.assert_close(run(block, inputs), x + block.mlp(block.norm2(x)))


ANOTHER_KIND: dict[str, nn.Module] = {
    "norm1": nn.Identity(),
    "norm2": nn.Softmax(dim=-1),
    "attn.softmax": nn.Identity(),
    "attn.attn_drop": nn.LayerNorm(6, elementwise_affine=False),
    "attn.proj": nn.Identity(),
    "attn.proj_drop": nn.Softmax(dim=-1),
    "mlp.drop": nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ANOTHER_KIND)
def test_another_kind_is_called(
    name: str, trained: bool, block: DiffiTBlock, inputs: tuple[Tensor, Tensor]
) -> None:
    """Also one that is fused in another place."""
    block.set_submodule(name, ANOTHER_KIND[name])
    perceptron, (x, temb) = block.mlp, inputs
    with torch.set_grad_enabled(trained):
        attended, _ = block.attn(block.norm1(x), temb, grid_size=(4, 3), return_attention=True)
        x = x + attended
        hidden = nn.functional.gelu(perceptron.fc1(block.norm2(x)), approximate="tanh")
        expected = x + perceptron.drop(perceptron.fc2(perceptron.drop(hidden)))
        torch.testing.assert_close(run(block, inputs), expected)


def test_a_norm_with_a_bias_alone_is_called(
    block: DiffiTBlock, inputs: tuple[Tensor, Tensor]
) -> None:
    block.norm1 = nn.LayerNorm(16)
    block.norm1.weight = None
    nn.init.normal_(block.norm1.bias)
    torch.testing.assert_close(block.normed(inputs[0]), block.norm1(inputs[0]))


def test_maps_by_a_hook(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """On ``softmax``; the formula gives what the operator does."""
    expected = run(block, inputs)
    maps: list[Tensor] = []
    block.attn.softmax.register_forward_hook(lambda module, arguments, out: maps.append(out))
    torch.testing.assert_close(run(block, inputs), expected)
    assert maps[0].shape[-2:] == (6, 6)


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


class Packed(nn.Module):
    """A quantised ``Linear``: no parameter, and a weight that is a method, as PyTorch's have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().max().item() / 127
        self.register_buffer("packed", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("_bias", None if layer.bias is None else layer.bias.detach())

    def weight(self) -> Tensor:
        return self.packed * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self._bias)


def test_quantised_network() -> None:
    """As the network whose weights are what the quantised ones stand for."""
    torch.manual_seed(0)
    sizes = {"input_size": 4, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    network = stirred(LatentDiffiT(**sizes, num_classes=3)).eval()
    rounded = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = put(network, name, Packed).weight()
            attrgetter(name)(rounded).weight.data = weight
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 2])
    torch.testing.assert_close(network(*inputs), rounded(*inputs))


class Twice(nn.Module):
    """A parametrisation that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


@pytest.mark.parametrize("name", LINEAR)
def test_computed_weight(name: str, block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """It is computed once."""
    other, rule = copy.deepcopy(block), Twice()
    with torch.no_grad():
        attrgetter(name)(other).weight.mul_(2)
    nn.utils.parametrize.register_parametrization(attrgetter(name)(block), "weight", rule)
    rule.calls = 0
    torch.testing.assert_close(run(block, inputs), run(other, inputs))
    assert rule.calls == 1


def test_norms_whose_weights_come_from_elsewhere(
    block: DiffiTBlock, inputs: tuple[Tensor, Tensor]
) -> None:
    """A parametrisation, and what FSDP and DataParallel do with parameters."""
    for name in ("norm1", "norm2"):
        setattr(block, name, nn.LayerNorm(16))
        nn.init.normal_(getattr(block, name).weight)
    expected = run(block, inputs)
    nn.utils.parametrize.register_parametrization(block.norm1, "weight", nn.Identity())
    weight = block.norm2.weight.detach()
    del block.norm2._parameters["weight"]
    block.norm2.weight = weight
    torch.testing.assert_close(run(block, inputs), expected)


def test_norm_over_two_dimensions(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    block.norm1 = nn.LayerNorm((12, 16), elementwise_affine=False)
    x, temb = inputs
    x = x + block.attn(block.norm1(x), temb, grid_size=(4, 3))
    torch.testing.assert_close(run(block, inputs), x + block.mlp(block.norm2(x)))


def test_dropout_has_a_mode_of_its_own(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    """Active in a network that is not in training, and not there at all."""
    expected = run(block, inputs)
    for parent, name in ((block.attn, "attn_drop"), (block.mlp, "drop")):
        setattr(parent, name, nn.Dropout(0.5))
        assert not torch.allclose(run(block, inputs), expected)
        getattr(parent, name).eval()
        assert torch.equal(run(block, inputs), expected)
        getattr(parent, name).train()
        block.eval()
        assert torch.equal(run(block, inputs), expected)
        getattr(parent, name).train()
        assert not torch.allclose(run(block, inputs), expected)
        setattr(parent, name, nn.Identity())
        assert torch.equal(run(block.train(), inputs), expected)


def test_mlp_without_a_bias(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.mlp.fc1.bias.zero_()
    block.mlp.fc1.bias = None
    torch.testing.assert_close(run(block, inputs), run(other, inputs))


def test_compiled(block: DiffiTBlock, inputs: tuple[Tensor, Tensor]) -> None:
    for name in LINEAR:
        put(block, name, Adapter)
    calls: list[int] = []
    block.norm1.register_forward_hook(lambda *_: calls.append(1))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(block, inputs))
    assert calls
