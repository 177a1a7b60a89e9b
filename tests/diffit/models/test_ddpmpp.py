"""DDPM++ and NCSN++: their filters, their blocks by the formula, their layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, group_norm, linear, silu

from diffit.models import DDPMpp
from diffit.models.ddpmpp import ConvBlock, double, halve, smooth_double, smooth_halve
from diffit.nn import TMSA
from tests.diffit.models.networks import small_ddpmpp, stirred
from tests.numeric_rule import assert_numeric_rule
from tests.published import parameters_of, published_tmsa


@pytest.mark.parametrize(
    ("down", "up", "taps"), [(halve, double, (1, 1)), (smooth_halve, smooth_double, (1, 3, 3, 1))]
)
def test_filters(down: Any, up: Any, taps: tuple[int, ...]) -> None:
    """Each is a strided convolution with the outer product of the taps, zeros outside."""
    x = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    row = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    weight = torch.outer(row, row).expand(3, 1, -1, -1)
    options: dict[str, Any] = {"stride": 2, "padding": len(taps) // 2 - 1, "groups": 3}
    torch.testing.assert_close(down(x), conv2d(x, weight, **options))
    torch.testing.assert_close(up(x), conv_transpose2d(x, 4 * weight, **options))


def plain_block(block: ConvBlock, x: Tensor, temb: Tensor) -> Tensor:
    def norm(layer: Any, x: Tensor) -> Tensor:
        return group_norm(x, layer.num_groups, layer.weight, layer.bias, eps=1e-6)

    h = silu(norm(block.norm0, x))
    if block.resample:
        h, x = block.resample(h), block.resample(x)
    h = conv2d(h, block.conv0.weight, block.conv0.bias, padding=1)
    h = h + linear(temb, block.temb.weight, block.temb.bias)[:, :, None, None]
    h = conv2d(silu(norm(block.norm1, h)), block.conv1.weight, block.conv1.bias, padding=1)
    x = (block.shortcut(x) + h) * 0.5**0.5
    attn = block.attention
    if attn is not None:
        out = published_tmsa(
            norm(block.norm2, x).flatten(2).mT,
            None if attn.qkv_temb is None else temb,
            **parameters_of(attn),
            num_heads=attn.num_heads,
            window_size=attn.window_size,
            grid_size=attn.window_size,
        )
        x = (x + out.mT.reshape(x.shape)) * 0.5**0.5
    return x


BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 16},
    "other channels": {"in_channels": 8},
    "half": {"in_channels": 16, "resample": smooth_halve},
    "double": {"in_channels": 16, "resample": double},
    "self-attention": {"in_channels": 16, "attention": {"rel_pos_bias": False}},
    "tmsa": {"in_channels": 16, "attention": {"temb_dim": 6}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_block_equals_its_formula(
    fastest_backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    attention = options.get("attention")
    if attention is not None:
        attention = TMSA(16, 2, window_size=(4, 6), **attention)
    block = stirred(ConvBlock(**options | {"attention": attention}, channels=16, temb_dim=6))
    block = block.to(dtype)
    x = torch.randn(16, options["in_channels"], 4, 6).to(dtype)
    temb = torch.randn(16, 6).to(dtype)
    exact = copy.deepcopy(block).double()
    with torch.no_grad():
        got, plain = block(x, temb), plain_block(block, x, temb)
        truth = plain_block(exact, x.double(), temb.double())
    assert_numeric_rule({"y": got}, {"y": plain}, {"y": truth})


@pytest.mark.parametrize("ncsnpp", [False, True])
def test_the_whole(ncsnpp: bool) -> None:
    """Two resolutions, one block each, written out."""
    network = small_ddpmpp(ncsnpp=ncsnpp, tmsa=True).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    temb = torch.randn(2, 24, dtype=torch.float64)
    (first,), (down, second), (middle, last) = *network.encoder, network.middle
    (third, fourth), (up, fifth, sixth) = network.decoder
    with torch.no_grad():
        got = network._predict(x, temb)
        s0 = network.stem(x)
        s1 = plain_block(first, s0, temb)
        s2 = plain_block(down, s1, temb)
        if ncsnpp:
            s2 = (s2 + network.pyramid[0](smooth_halve(x))) * 0.5**0.5
        s3 = plain_block(second, s2, temb)
        h = plain_block(last, plain_block(middle, s3, temb), temb)
        h = plain_block(third, torch.cat([h, s3], dim=1), temb)
        h = plain_block(fourth, torch.cat([h, s2], dim=1), temb)
        h = plain_block(up, h, temb)
        h = plain_block(fifth, torch.cat([h, s1], dim=1), temb)
        h = plain_block(sixth, torch.cat([h, s0], dim=1), temb)
        torch.testing.assert_close(got, network.head(silu(network.norm(h))))
    assert [b.attention is not None for b in (first, down, second, middle, last)] == [
        *(False, False, True, True, False)
    ]
    assert [b.attention is not None for b in (third, fourth, up, fifth, sixth)] == [
        *(False, True, False, False, False)
    ]


def test_sizes() -> None:
    """EDM reports 56 M; Song et al.'s layout, with a fourth resolution, has 62 M."""
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in DDPMpp(augment_dim=9, **options).parameters())
            for options in ({}, {"channels": (128, 256, 256, 256)})
        ]
    assert [round(size / 1e6) for size in sizes] == [56, 62]


def test_starts_at_zero() -> None:
    torch.manual_seed(0)
    network = DDPMpp(8, stem_channels=8, channels=(8, 8), num_blocks=1, attn_resolutions=(4,))
    assert network(torch.randn(2, 3, 8, 8), torch.randn(2)).eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_resolution": 15}, "img_resolution: expected a multiple of 2, .* got 15"),
        ({"channels": ()}, r"channels, num_blocks: expected at least one .* got \(\), 1"),
        ({"num_blocks": 0}, r"channels, num_blocks: expected at least one .* got \(16, 24\), 0"),
        ({"num_heads": 5}, "dim: expected a multiple of num_heads = 5, got 24"),
        ({"stem_channels": 34}, "channels: expected a multiple of"),
    ],
)
def test_wrong_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_ddpmpp(**options)
