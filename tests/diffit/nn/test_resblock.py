"""DiffiTResBlock: its equation in both memory formats, its shortcut, its groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from diffit.nn import DiffiTBlock, DiffiTResBlock
from diffit.nn.resblock import group_norm


@pytest.mark.parametrize("in_channels", [16, 24])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equation(in_channels: int, memory_format: torch.memory_format) -> None:
    """``Block(Conv3x3(Swish(GN(x))), temb) + x``, tokens row by row."""
    torch.manual_seed(0)
    block = DiffiTBlock(16, 2, temb_dim=6, window_size=(2, 3))
    layer = DiffiTResBlock(in_channels, 16, block).double()
    x = torch.randn(2, in_channels, 4, 3, dtype=torch.float64).to(memory_format=memory_format)
    temb = torch.randn(2, 6, dtype=torch.float64)

    groups = x.unflatten(1, (in_channels // 4, 4)).flatten(2)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    normed = normed * layer.norm.weight.view(-1, 1, 1) + layer.norm.bias.view(-1, 1, 1)
    hidden = conv2d(silu(normed), layer.conv.weight, layer.conv.bias, padding=1)
    tokens = torch.stack(
        [hidden[:, :, i, j] for i in range(4) for j in range(3)], dim=1
    )  # (B, L, C)
    tokens = block(tokens, temb, grid_size=(4, 3))
    picture = torch.stack([tokens[:, 3 * i : 3 * i + 3] for i in range(4)], dim=1)
    shortcut = x if in_channels == 16 else layer.shortcut(x)
    torch.testing.assert_close(layer(x, temb), picture.permute(0, 3, 1, 2) + shortcut)


def test_tokens_are_a_view_where_channels_come_last() -> None:
    seen: list[Tensor] = []
    layer = DiffiTResBlock(16, 16, DiffiTBlock(16, 2, temb_dim=6, window_size=2))
    layer.conv.register_forward_hook(lambda *call: seen.append(call[2]))
    layer.block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last), torch.randn(1, 6))
    assert seen[0].data_ptr() == seen[1].data_ptr()


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (64, 16), (128, 32), (256, 32)])
def test_groups(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("channels", [2, 30, 200])
def test_channels_that_make_no_groups(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels: expected a multiple .* got {channels}"):
        group_norm(channels)
