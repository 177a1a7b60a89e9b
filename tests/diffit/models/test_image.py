"""ImageDiffiT: its formula, its shape, its labels, checks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout, group_norm, interpolate, linear, silu

from diffit.models import ImageDiffiT
from diffit.nn import DiffiTResBlock
from diffit.nn.embeddings import sinusoidal_embedding
from tests.diffit.models.networks import image_inputs, plain_block, small_image
from tests.numeric_rule import assert_numeric_rule


def plain_resblock(block: DiffiTResBlock, x: Tensor, temb: Tensor) -> Tensor:
    norm, conv = block.norm, block.conv
    hidden = silu(group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=1e-6))
    hidden = conv2d(hidden, conv.weight, conv.bias, padding=1)
    batch, dim, height, width = hidden.shape
    tokens = hidden.reshape(batch, dim, -1).mT
    tokens = plain_block(block.block, tokens, temb, (height, width))
    shortcut = x if x.shape[1] == dim else block.shortcut(x)
    return tokens.mT.reshape(batch, dim, height, width) + shortcut


def plain_image(
    network: ImageDiffiT, x: Tensor, noise: Tensor, classes: Tensor, augment: Tensor
) -> Tensor:
    """The U of two resolutions, written out."""
    time = network.time
    embedding = sinusoidal_embedding(noise, time.width).to(x.dtype)
    embedding = embedding + linear(classes * 4**0.5, time.label.weight, time.label.bias)
    embedding = embedding + augment @ time.augment.weight.T
    temb = silu(linear(embedding, time.mlp[0].weight, time.mlp[0].bias))
    temb = silu(linear(temb, time.mlp[2].weight, time.mlp[2].bias))

    x = conv2d(x, network.stem.weight, network.stem.bias, padding=1)
    x = skip = plain_resblock(network.encoder[0][0], x, temb)
    x = conv2d(x, network.down[0].weight, network.down[0].bias, stride=2, padding=1)
    for block in network.encoder[1]:
        x = plain_resblock(block, x, temb)
    up = network.up[0].conv
    x = conv2d(interpolate(x, scale_factor=2.0), up.weight, up.bias, padding=1)
    x = plain_resblock(network.decoder[0][0], torch.cat([x, skip], dim=1), temb)
    norm = network.norm
    x = group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=1e-6)
    return conv2d(x, network.head.weight, network.head.bias, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_formula(fastest_backend: str, dtype: torch.dtype) -> None:
    inputs = image_inputs(dtype=dtype)
    network = small_image().to(dtype)
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        got, plain = network(*inputs), plain_image(network, *inputs)
        truth = plain_image(exact, *(tensor.double() for tensor in inputs))
    assert_numeric_rule({"y": got}, {"y": plain}, {"y": truth})


def test_gradients_in_float64() -> None:
    network, inputs = small_image().double(), image_inputs(dtype=torch.float64)
    names, parameters = zip(*network.named_parameters(), strict=True)
    got, plain = network(*inputs), plain_image(network, *inputs)
    weights = torch.randn(got.shape, dtype=torch.float64)
    grads = torch.autograd.grad(got, parameters, weights)
    truth = torch.autograd.grad(plain, parameters, weights)
    for name, gradient, exact in zip(names, grads, truth, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-11, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("resolution", "depths", "window", "millions"),
    [
        (32, (4, 4, 4), 4, 29),
        (32, (2, 2, 2), 4, 16),
        (64, (4, 4, 4, 4), 8, 45),
        (64, (1, 2, 2, 2), 8, 24),
    ],
)
def test_sizes(resolution: int, depths: tuple[int, ...], window: int, millions: int) -> None:
    channels = (128, 256, 256, 256)[: len(depths)]
    with torch.device("meta"):
        network = ImageDiffiT(resolution, channels=channels, depths=depths, window_size=window)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_resolutions_and_channels() -> None:
    """What every ResBlock of the default network gives, from the first to the last."""
    with torch.device("meta"):
        network = ImageDiffiT(depths=(1, 2, 3))
        shapes: list[tuple[int, ...]] = []
        for block in network.modules():
            if isinstance(block, DiffiTResBlock):
                block.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:])))
        y = network(torch.empty(2, 3, 32, 32), torch.empty(2))
    assert y.shape == (2, 3, 32, 32)
    full, half, lowest = (128, 32, 32), (256, 16, 16), (256, 8, 8)
    assert shapes == [full, half, half, lowest, lowest, lowest, half, half, full]


def test_starts_at_zero() -> None:
    """Whatever comes in; and every DiffiT block starts as the identity."""
    torch.manual_seed(0)
    network = ImageDiffiT(12, channels=(16, 32), depths=(1, 1), head_dim=8, window_size=3)
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(network(x, torch.randn(2)), torch.zeros_like(x))
    block = network.encoder[0][0].block
    tokens = torch.randn(2, 144, 16)
    assert torch.equal(block(tokens, torch.randn(2, 512), grid_size=(12, 12)), tokens)


def test_no_labels_count_as_zeros() -> None:
    network, (x, noise, classes, augment) = small_image(), image_inputs()
    zeros = network(x, noise, torch.zeros_like(classes), torch.zeros_like(augment))
    assert torch.equal(network(x, noise), zeros)
    assert not torch.allclose(network(x, noise, classes), zeros)
    assert not torch.allclose(network(x, noise, None, augment), zeros)


def test_label_dropout() -> None:
    network, (x, noise, classes, _) = small_image(label_dropout=1.0), image_inputs()
    assert not torch.allclose(network(x, noise, classes), network(x, noise))
    torch.testing.assert_close(network.train()(x, noise, classes), network.eval()(x, noise))


def test_dropout_enters_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its probability, in every ResBlock, while training alone."""
    seen: list[float] = []

    def record(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        seen.append(p * training)
        return dropout(x, p, training)

    monkeypatch.setattr(nn.functional, "dropout", record)
    network, inputs = small_image(dropout=0.25), image_inputs()
    network.train()(*inputs)
    assert seen.count(0.25) == 4
    seen.clear()
    network.eval()(*inputs)
    assert set(seen) == {0.0}


@pytest.mark.parametrize("time_embedding", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("time_entry", ["tmsa", "separate", "bias", "mlp", "scale"])
def test_time_enters_everywhere(time_embedding: str, time_entry: str) -> None:
    network = small_image(time_embedding=time_embedding, time_entry=time_entry)
    x, noise, *_ = image_inputs()
    assert not torch.allclose(network(x, noise), network(x, noise + 0.5))


def test_time_of_the_decoder() -> None:
    network = small_image(decoder_time_entry="scale")
    assert hasattr(network.decoder[0][0].block, "scale_temb")
    assert not hasattr(network.encoder[0][0].block, "scale_temb")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 16, 16)}, r"x: expected \(B, 3, 12, 12\), got shape"),
        ({"x": torch.zeros(3, 1, 12, 12)}, r"x: expected \(B, 3, 12, 12\), got shape"),
        ({"noise_labels": torch.zeros(2)}, r"noise_labels: expected \(3,\), one for each of x"),
        ({"class_labels": torch.zeros(3, 5)}, r"class_labels: expected \(3, 4\), got .*\(3, 5\)"),
        ({"class_labels": torch.zeros(3)}, r"class_labels: expected \(3, 4\), got shape \(3,\)"),
        ({"augment_labels": torch.zeros(2, 9)}, r"augment_labels: expected \(3, 9\), got shape"),
    ],
)
def test_wrong_inputs(change: dict[str, Tensor], message: str) -> None:
    names = ("x", "noise_labels", "class_labels", "augment_labels")
    with pytest.raises(ValueError, match=message):
        small_image()(**dict(zip(names, image_inputs(), strict=True)) | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_resolution": 15}, "img_resolution: expected a multiple of 6, .* got 15"),
        ({"depths": (1,)}, r"depths: expected a positive number for each of channels \(16, 32\)"),
        ({"depths": (1, 0)}, r"depths: expected a positive number .* got \(1, 0\)"),
        ({"channels": (), "depths": ()}, "depths: expected a positive number"),
        ({"channels": (16, 36)}, "channels: expected multiples of head_dim = 8, got 36"),
        ({"time_embedding": "sine"}, "time_embedding: expected one of sinusoidal, fourier, got"),
        ({"time_entry": "qkv"}, "time_entry: expected one of tmsa, separate, bias, mlp, scale"),
        ({"decoder_time_entry": "x"}, "decoder_time_entry: expected one of tmsa"),
    ],
)
def test_wrong_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_image(**options)
