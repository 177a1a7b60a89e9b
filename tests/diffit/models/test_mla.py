"""SETR-MLA's decoder and the ViT before it, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm, silu

from diffit.models import ViTMLA
from diffit.models.mla import MLADecoder
from diffit.nn.embeddings import sincos_positions
from tests.diffit.models.networks import image_inputs, small_image, small_vit, stirred


def plain_mla(decoder: MLADecoder, features: list[Tensor], size: int) -> Tensor:
    streams, above = [], None
    for lateral, stream, feature in reversed(
        list(zip(decoder.lateral, decoder.streams, features, strict=True))
    ):
        x = lateral(feature)
        if above is not None:
            x = x + interpolate(above, size=x.shape[2:], mode="bilinear")
        above = x
        for norm, _, conv in stream:
            x = conv(silu(norm(x)))
        streams.insert(0, interpolate(x, size=(size, size), mode="bilinear"))
    return torch.cat(streams, dim=1)


@pytest.mark.parametrize("sizes", [(12, 6, 3), (4, 4), (5,)])
def test_decoder(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = [8, 12, 20][: len(sizes)]
    decoder = stirred(MLADecoder(channels, 12, width=16)).double()
    features = [
        torch.randn(2, width, size, size, dtype=torch.float64)
        for width, size in zip(channels, sizes, strict=True)
    ]
    y = decoder(*features)
    assert y.shape == (2, decoder.out_channels, 12, 12) == (2, 8 * len(sizes), 12, 12)
    torch.testing.assert_close(y, plain_mla(decoder, features, 12))


def test_vit() -> None:
    """Eight blocks: the decoder takes the tokens after 2, 4, 6 and 8."""
    network = small_vit(depth=8).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    temb = torch.randn(2, 24, dtype=torch.float64)
    patches, features = network.patches.proj, []
    tokens = patches(x).flatten(2).mT + sincos_positions(4, 16)
    for i, block in enumerate(network.blocks):
        a, b, c, d = block.scale_temb(temb)[:, None].split(16, dim=-1)
        q, k, v = (
            block.attn.qkv(layer_norm(tokens, (16,), eps=1e-6) * (1 + a) + b)
            .unflatten(-1, (3, 2, 8))
            .permute(2, 0, 3, 1, 4)
        )
        out = (q @ k.mT * 8**-0.5).softmax(-1) @ v  # every token sees every other
        tokens = tokens + block.attn.proj(out.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(layer_norm(tokens, (16,), eps=1e-6) * (1 + c) + d)
        if i % 2:
            features.append(tokens.mT.reshape(2, 16, 4, 4))
    expected = network.head(network.norm(plain_mla(network.mla, features, 12)))
    torch.testing.assert_close(network._predict(x, temb), expected)


def test_vit_base() -> None:
    with torch.device("meta"):
        network = ViTMLA()
    assert len(network.blocks) == 12
    transformer = sum(
        p.numel() for name, p in network.blocks.named_parameters() if "scale_temb" not in name
    )
    assert round(transformer / 1e6) == 85  # of ViT-Base's 86 M, without patches and classifier


def test_on_the_encoder_of_the_image_network() -> None:
    """The decoder takes what every resolution ends with, and no symmetric decoder is there."""
    network, inputs = small_image(decoder="mla"), image_inputs()
    assert not hasattr(network, "up")
    assert not hasattr(network, "decoder")
    features: list[Tensor] = []
    for level in network.encoder:
        level[-1].register_forward_hook(lambda *call: features.append(call[2]))
    y = network(*inputs)
    torch.testing.assert_close(y, network.head(network.norm(plain_mla(network.mla, features, 12))))


def test_unknown_decoder() -> None:
    with pytest.raises(ValueError, match="decoder: expected one of symmetric, mla, got 'unet'"):
        small_image(decoder="unet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "img_resolution: expected a multiple of patch_size = 5, got 12"),
        ({"depth": 6}, "depth: expected a multiple of 4, got 6"),
        ({"hidden_size": 18}, "hidden_size: expected a multiple of 4, got 18"),
        ({"time_embedding": "sine"}, "time_embedding: expected one of sinusoidal, fourier"),
    ],
)
def test_wrong_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vit(**options)
