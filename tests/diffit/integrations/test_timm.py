"""timm's Swin on the fused attention: the same function, weights, names; what is left alone."""

from __future__ import annotations

import copy
import enum
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffit.integrations.timm import SwinWindowAttention, accelerate
from tests.numeric_rule import assert_numeric_rule


class StandIn(ModuleType):
    """A torchvision that timm can import where the real one does not fit PyTorch."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return enum.Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (nn.Module,), {})


PARTS = ("models", "models.feature_extraction", "ops", "ops.misc", "datasets")
PARTS += ("transforms", "transforms.functional")
TORCHVISION = ("torchvision", *(f"torchvision.{part}" for part in PARTS))


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    if "timm" in sys.modules or find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    for name in TORCHVISION:
        sys.modules[name] = StandIn(name)
    try:
        return importlib.import_module("timm")
    finally:
        for name in TORCHVISION:
            del sys.modules[name]


def small_swin(timm: ModuleType, **options: Any) -> nn.Module:
    """Grids of 14 x 14 (four windows, three masked) and 7 x 7 tokens; tables far from zero."""
    torch.manual_seed(0)
    sizes = {"img_size": 56, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 16}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=5, **{**sizes, "drop_path_rate": 0.0, **options}
    )
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    return accelerate(copy.deepcopy(model))


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and all parameters."""
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    grads = {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "grad.x": x.grad} | grads


def assert_as_timm(model: nn.Module, x: Tensor, part: Callable[[nn.Module], nn.Module]) -> None:
    """Accelerated and plain in one dtype, against plain in float64."""
    ours = accelerated(model)
    assert sum(isinstance(layer, SwinWindowAttention) for layer in ours.modules()) > 0
    assert_numeric_rule(
        results(part(ours), x),
        results(part(model), x),
        results(part(copy.deepcopy(model).double()), x.double()),
    )


def whole(model: nn.Module) -> nn.Module:
    return model


def pictures(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.skipif("CI" not in os.environ, reason="a checkout may lack timm")
def test_timm_is_there() -> None:
    assert find_spec("timm") is not None


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# --- the same function


@DTYPES
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@pytest.mark.parametrize("training", [False, True])
def test_block(
    timm: ModuleType, fastest_backend: str, dtype: torch.dtype, index: int, training: bool
) -> None:
    model = small_swin(timm).to(dtype).train(training)
    x = torch.randn(3, 14, 14, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_as_timm(model, x, lambda network: network.layers[0].blocks[index])


def test_adapted_projections(timm: ModuleType, fastest_backend: str) -> None:
    """Another module in the place of a ``Linear`` is called."""
    model = small_swin(timm)
    for block in model.layers[0].blocks:
        block.attn.qkv, block.attn.proj = (
            nn.Sequential(block.attn.qkv),
            nn.Sequential(block.attn.proj),
        )
    assert_as_timm(model, pictures(56, 56), whole)


@DTYPES
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((56, 56), {}),
        ((84, 56), {"window_size": (7, 2)}),
        ((60, 44), {"window_size": 4}),  # padded
        ((56, 84), {"always_partition": True}),  # then one row of windows: all are masked
        ((56, 56), {"head_dim": 16, "qkv_bias": False}),  # wider inside than outside
    ],
    ids=str,
)
def test_network(
    timm: ModuleType,
    fastest_backend: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    options: dict[str, Any],
) -> None:
    model = small_swin(timm, **{**options, "img_size": size, "depths": (2, 2)}).to(dtype)
    assert_as_timm(model, pictures(*size, dtype=dtype), whole)


def test_masks_that_change(timm: ModuleType) -> None:
    """Two grids of as many windows: the number of windows does not tell which are masked."""
    model = small_swin(timm, strict_img_size=False)
    ours = accelerated(model)
    for size in ((56, 224), (112, 112), (56, 224)):
        x = pictures(*size)
        truth = results(copy.deepcopy(model).double(), x.double())
        assert_numeric_rule(results(ours, x), results(model, x), truth)


def test_only_masked_windows_take_the_formula(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[tuple[int, bool]] = []
    formula = timm.models.swin_transformer.WindowAttention.forward

    def counted(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows.append((x.shape[0], mask is not None))
        return formula(self, x, mask)

    ours = accelerated(small_swin(timm, img_size=112))
    monkeypatch.setattr(timm.models.swin_transformer.WindowAttention, "forward", counted)
    ours(pictures(112, 112))
    assert windows == [(3 * 7, True)]  # of 3 x 16: the last row and the last column


def test_attention_dropout(timm: ModuleType) -> None:
    """While training it is timm's own formula, with its random numbers."""
    model = small_swin(timm, attn_drop_rate=0.5)
    ours = accelerated(model)
    outputs = []
    for network in (ours, model):
        torch.manual_seed(3)
        outputs.append(network.train()(pictures(56, 56)))
    assert torch.equal(*outputs)
    assert_as_timm(model.eval(), pictures(56, 56), whole)


def test_autocast(timm: ModuleType) -> None:
    model = small_swin(timm)
    ours, x = accelerated(model), pictures(56, 56)
    truth = {"y": copy.deepcopy(model).double()(x.double())}
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = {"y": ours(x)}, {"y": model(x)}
    assert_numeric_rule(got, plain, truth)


def test_training_after_inference(timm: ModuleType) -> None:
    """What is kept about a mask that was first seen in inference mode serves a backward pass."""
    model = small_swin(timm)
    ours, x = accelerated(model), pictures(56, 56)
    ours.set_input_size((112, 56))
    ours.set_input_size((56, 56))
    with torch.inference_mode():
        ours(x)
    assert torch.isfinite(results(ours, x)["grad.x"]).all()


# --- still timm's layer


def test_weights_and_names(timm: ModuleType) -> None:
    model = small_swin(timm)
    names, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    assert accelerate(model) is model
    assert list(model.state_dict()) == names
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [name for name, _ in model.named_buffers()] == buffers
    other = small_swin(timm)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(pictures(56, 56)), other(pictures(56, 56)))
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_numeric_rule(
        {"y": model(pictures(56, 56))},
        {"y": other(pictures(56, 56))},
        {"y": copy.deepcopy(other).double()(pictures(56, 56).double())},
    )


def test_copies_and_files(timm: ModuleType) -> None:
    ours, x = accelerated(small_swin(timm)), pictures(56, 56)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert isinstance(other.layers[0].blocks[1].attn, SwinWindowAttention)
        assert torch.equal(other(x), ours(x))


def test_new_input_size(timm: ModuleType) -> None:
    model = small_swin(timm)
    ours = accelerated(model)
    for network in (model, ours):
        network.set_input_size((80, 56), window_size=(5, 7))
    x = pictures(80, 56)
    truth = results(copy.deepcopy(model).double(), x.double())
    assert_numeric_rule(results(ours, x), results(model, x), truth)


@pytest.mark.parametrize("known", [True, False], ids=["known mask", "new mask"])
def test_compile(timm: ModuleType, default_algorithms: None, known: bool) -> None:
    """Whole graphs; they hold the fused operator, beside a mask where it was known before."""
    ours = accelerated(small_swin(timm))
    if not known:
        ours.layers[0].blocks[1]._init_buffers()
    x = torch.randn(3, 14, 14, 16, generator=torch.Generator().manual_seed(1))
    for block, fused in zip(ours.layers[0].blocks, (True, known), strict=True):
        eager = results(copy.deepcopy(block), x)
        graphs: list[torch.fx.GraphModule] = []

        def keep(
            graph: torch.fx.GraphModule,
            inputs: list[Any],
            graphs: list[torch.fx.GraphModule] = graphs,
        ) -> Callable[..., Any]:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend=keep)
        got = results(compiled, x)
        assert len(graphs) == 1
        assert (
            any("window_attention" in str(node.target) for node in graphs[0].graph.nodes) == fused
        )
        got = {name.replace("_orig_mod.", ""): tensor for name, tensor in got.items()}
        truth = results(copy.deepcopy(block).double(), x.double())
        assert_numeric_rule(got, eager, truth)


# --- what is left alone


def test_report(timm: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    model = small_swin(timm)
    layer = model.layers[1].blocks[0].attn
    layer.__class__ = type("OtherAttention", (type(layer),), {"__module__": "other"})
    with caplog.at_level(logging.INFO, "diffit.integrations.timm"):
        accelerate(accelerate(model))
    once = [
        "on the fused window attention: layers.0.blocks.0.attn",
        "on the fused window attention: layers.0.blocks.1.attn",
        "left alone: layers.1.blocks.0.attn: other.OtherAttention is not "
        "timm.models.swin_transformer.WindowAttention",
    ]
    assert caplog.messages == 2 * once


def test_cosine_attention_is_left_alone(timm: ModuleType) -> None:
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, depths=(1,), num_heads=(2,), embed_dim=16
    )
    classes = [type(layer) for layer in model.modules()]
    with pytest.warns(UserWarning, match="nothing was swapped .* has cosine attention"):
        assert accelerate(model) is model
    assert [type(layer) for layer in model.modules()] == classes


def test_other_models_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="nothing was swapped .* no attention layers"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.warns(UserWarning, match=r"torch\.nn\..*MultiheadAttention is not timm"):
        accelerate(nn.MultiheadAttention(4, 2))
