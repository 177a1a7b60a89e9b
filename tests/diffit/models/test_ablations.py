"""Every ablation at an eighth of its width: it runs, learns, and takes time where it says so."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffit.models import (
    PRESETS,
    DDPMpp,
    DiffusionNetwork,
    ImageDiffiT,
    ViTMLA,
    create_model,
    load_model,
    save_weights,
)
from diffit.models.ablations import ABLATIONS
from tests.diffit.models.networks import stirred

TMSA_LAYER, SCALE_LAYER = "qkv_temb", "scale_temb"
# The layers through which time enters, and no others; presets not listed here are as DiffiT.
TIME_LAYERS = {
    "diffit_cifar10_32_design_a": {SCALE_LAYER},
    "diffit_cifar10_32_design_b": {SCALE_LAYER},
    "diffit_cifar10_32_design_c": {SCALE_LAYER},
    "diffit_cifar10_32_design_d": {TMSA_LAYER, SCALE_LAYER},
    "ncsnpp_cifar10_32": {"temb"},
    "ncsnpp_cifar10_32_tmsa": {"temb", TMSA_LAYER},
    "ddpmpp_cifar10_32": {"temb"},
    "ddpmpp_cifar10_32_tmsa": {"temb", TMSA_LAYER},
    "diffit_cifar10_32_time_bias": {"table_temb"},
    "diffit_cifar10_32_time_mlp": {"mlp_temb"},
    "diffit_emoji_32_time_bias": {"table_temb"},
    "diffit_emoji_32_time_mlp": {"mlp_temb"},
    "diffit_cifar10_32_separate_token": {"v_temb"},
    "diffit_ffhq_64_separate_token": {"v_temb"},
}

every = pytest.mark.parametrize("name", ABLATIONS)


@cache
def small(name: str) -> Any:
    """The preset, each width an eighth and each depth 1; windows and resolutions as they are."""
    options = PRESETS[name].options
    channels = options.get("channels", (128, 256, 256))
    sizes: dict[type[DiffusionNetwork], dict[str, Any]] = {
        ImageDiffiT: {
            "channels": [width // 64 * 8 for width in channels],
            "depths": [1] * len(channels),
            "head_dim": 8,
        },
        ViTMLA: {"hidden_size": 96, "depth": 4, "decoder_width": 32},
        DDPMpp: {"stem_channels": 16, "channels": (32, 32, 32), "num_blocks": 1},
    }
    temb_dim = options.get("temb_dim", 512) // 8
    torch.manual_seed(0)
    return stirred(create_model(name, temb_dim=temb_dim, **sizes[PRESETS[name].network]))


def inputs(network: Any, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *[network.img_resolution] * 2, generator=generator)
    noise = torch.randn(batch, generator=generator)
    labels = torch.eye(batch, network.label_dim) if network.label_dim else None
    return x, noise, labels, torch.randn(batch, 9, generator=generator)


def time_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """All that projects the time token."""
    return {k: v for k, v in network.named_modules() if k.rpartition(".")[2].endswith("temb")}


@every
def test_forward_and_backward(name: str) -> None:
    """Every parameter has a gradient; of constants in q, k and v, those in k have none."""
    network = small(name)
    y = network(*inputs(network))
    assert y.shape == (2, 3, network.img_resolution, network.img_resolution)
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(y.square().mean(), parameters)
    for parameter, gradient in zip(names, grads, strict=True):
        assert gradient.isfinite().all(), parameter
        largest = gradient.abs().max()
        assert largest > 0, parameter
        if parameter.endswith((".qkv.bias", "qkv_temb.weight", "qkv_temb.bias")):
            query, key, value = (part.abs().max() for part in gradient.chunk(3))
            assert key <= 1e-5 * largest < min(query, value), parameter


@every
def test_time_enters_where_it_says(name: str) -> None:
    network = small(name)
    x, noise, *_ = inputs(network)
    layers = time_layers(network)
    expected = TIME_LAYERS.get(name, {TMSA_LAYER})
    assert {layer.rpartition(".")[2] for layer in layers} == expected
    with torch.no_grad():
        assert not torch.allclose(network(x, noise), network(x, noise + 0.5), rtol=1e-3)
        weights = {layer: layer.weight.clone() for layer in layers.values()}
        for kept in (*expected, None):  # by each kind of layer alone, then by none
            for path, layer in layers.items():
                on = path.rpartition(".")[2] == kept
                layer.weight.copy_(weights[layer] if on else torch.zeros_like(layer.weight))
            changed = not torch.equal(network(x, noise), network(x, noise + 0.5))
            assert changed == (kept is not None), kept
        for layer, weight in weights.items():
            layer.weight.copy_(weight)


@pytest.mark.parametrize(
    "name",
    ["diffit_cifar10_32_design_a", "diffit_cifar10_32_design_b", "ncsnpp_cifar10_32_tmsa"],
)
def test_files(name: str, tmp_path: Path) -> None:
    network = small(name)
    save_weights(network, tmp_path / "network.safetensors", preset=name)
    loaded, preset = load_model(tmp_path / "network.safetensors")
    assert preset == name
    assert type(loaded) is type(network)
    assert torch.equal(loaded(*inputs(network)), network(*inputs(network)))


def test_every_kind_is_there() -> None:
    """The ablations of the paper, two of them small, and none that differs in name alone."""
    assert len(ABLATIONS) == 24
    made = {(p.network, repr(sorted(p.options.items()))) for p in PRESETS.values()}
    assert len(made) == len(PRESETS)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("diffit_cifar10_32_tokens_512_512", {(1536, 512), (768, 512)}),
        ("diffit_cifar10_32_tokens_256_256", {(768, 256), (384, 256)}),
        ("diffit_ffhq_64_tokens_512_512", {(1536, 512), (768, 512)}),
        ("diffit_ffhq_64_tokens_256_256", {(768, 256), (384, 256)}),
    ],
)
def test_channels_of_the_tokens(name: str, shapes: set[tuple[int, int]]) -> None:
    """(3 C, T) of every attention layer."""
    with torch.device("meta"):
        layers = time_layers(create_model(name)).values()
    assert {tuple(layer.weight.shape) for layer in layers} == shapes


@every
def test_windows(name: str) -> None:
    """2, 4 or 8 as the preset says; the convolutional networks and the ViT attend globally."""
    network = small(name)
    sizes = {m.window_size for m in network.modules() if hasattr(m, "window_size")}
    if isinstance(network, ImageDiffiT):
        assert sizes == {(PRESETS[name].options.get("window_size", 4),) * 2}
    else:
        assert sizes == ({(16, 16)} if isinstance(network, ViTMLA) else {(16, 16), (8, 8)})
