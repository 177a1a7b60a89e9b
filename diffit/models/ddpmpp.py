"""DDPM++ and NCSN++, the convolutional networks in which the paper tries DiffiT's attention.

Architectures of Song et al. 2021 in the form of Karras et al. 2022, appendix F. DDPM++ goes with
the variance-preserving (VP) noise process, NCSN++ with the variance-exploding one (VE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from diffit.models.base import ImageNetwork, zero_
from diffit.nn.resblock import group_norm
from diffit.nn.tmsa import TMSA

SKIP_SCALE = 0.5**0.5  # keeps the variance of a sum of two


def halve(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2), means of 2 x 2."""
    return avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), nearest neighbours."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def smooth(x: Tensor) -> Tensor:
    """The filter [1, 2, 1] / 4 along both axes, zeros outside.

    Before ``halve`` and after ``double`` it makes theirs, [1, 1], into [1, 3, 3, 1].
    """
    return avg_pool2d(avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1)


def smooth_halve(x: Tensor) -> Tensor:
    """``halve`` with the filter [1, 3, 3, 1]."""
    return halve(smooth(x))


def smooth_double(x: Tensor) -> Tensor:
    """``double`` with the filter [1, 3, 3, 1]."""
    return smooth(double(x))


class ConvBlock(nn.Module):
    """Two convolutions with time between them, then attention where there is one.

    ``h = Conv(swish(GN(Conv(resample(swish(GN(x)))) + W temb)))``, ``x = (resample(x) + h) /
    sqrt 2``, ``x = (x + Attention(GN(x), temb)) / sqrt 2``.

    Args:
        in_channels: channels of x.
        channels: of the result.
        temb_dim: width of the time token.
        resample: changes the resolution, or None. Then, and where the channels change, a 1x1
            convolution brings x to the sum.
        attention: takes tokens (B, L, channels), and the token if it was made for one.
        dropout: of what enters the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        temb_dim: int,
        resample: Callable[[Tensor], Tensor] | None = None,
        attention: TMSA | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.temb = nn.Linear(temb_dim, channels)
        self.norm1 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        plain = in_channels == channels and resample is None
        self.shortcut = nn.Identity() if plain else nn.Conv2d(in_channels, channels, 1)
        self.attention = attention
        self.norm2 = None if attention is None else group_norm(channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, in_channels, H, W), temb (B, T) -> (B, channels, H', W')."""
        h = silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv0(h) + self.temb(temb)[:, :, None, None]
        h = self.conv1(self.dropout(silu(self.norm1(h))))
        x = (self.shortcut(x) + h) * SKIP_SCALE
        if self.attention is not None and self.norm2 is not None:
            tokens = self.norm2(x).flatten(2).transpose(1, 2)
            token = None if self.attention.temb_dim is None else temb
            h = self.attention(tokens, token).transpose(1, 2).unflatten(2, x.shape[2:])
            x = (x + h) * SKIP_SCALE
        return x


class DDPMpp(ImageNetwork):
    """A U of convolutional blocks with global attention at some resolutions.

    Args:
        img_resolution, img_channels, label_dim, augment_dim: as in ``ImageDiffiT``.
        channels: channels at each resolution, from the full one, each half the last. The first
            convolution gives ``stem_channels``.
        num_blocks: blocks at each resolution of the encoder; the decoder has one more.
        attn_resolutions: where the blocks have attention: all of the encoder, the last of the
            decoder. One block at the lowest resolution has it always.
        num_heads: attention heads.
        tmsa: attend as DiffiT does, with the time token and a relative position bias, in place
            of plain self-attention.
        ncsnpp: NCSN++: Fourier features of the noise level, the filter [1, 3, 3, 1] in
            place of [1, 1], and an encoder to which the picture is added at every resolution.
        temb_dim, dropout, label_dropout: as in ``ImageDiffiT``.

    Raises:
        ValueError: an argument that does not fit, naming it.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        img_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        *,
        stem_channels: int = 128,
        channels: Sequence[int] = (256, 256, 256),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        tmsa: bool = False,
        ncsnpp: bool = False,
        temb_dim: int = 512,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        if not channels or num_blocks < 1:
            raise ValueError(
                "channels, num_blocks: expected at least one resolution and one block at each, "
                f"got {tuple(channels)}, {num_blocks}"
            )
        smallest = 2 ** (len(channels) - 1)
        if img_resolution % smallest:
            raise ValueError(
                f"img_resolution: expected a multiple of {smallest}, to be halved between "
                f"{len(channels)} resolutions, got {img_resolution}"
            )
        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            augment_dim,
            time_width=2 * stem_channels if ncsnpp else stem_channels,
            temb_dim=temb_dim,
            label_dropout=label_dropout,
            time_embedding="fourier" if ncsnpp else "sinusoidal",
        )
        self.shrink, grow = (smooth_halve, smooth_double) if ncsnpp else (halve, double)

        def attend(dim: int, resolution: int) -> TMSA:
            return TMSA(
                dim,
                num_heads,
                temb_dim=temb_dim if tmsa else None,
                window_size=resolution,
                rel_pos_bias=tmsa,
            )

        def block(in_channels: int, dim: int, **options: Any) -> ConvBlock:
            return ConvBlock(in_channels, dim, temb_dim=temb_dim, dropout=dropout, **options)

        self.stem = nn.Conv2d(img_channels, stem_channels, 3, padding=1)
        self.encoder, self.pyramid, self.decoder = (nn.ModuleList() for _ in range(3))
        width, skips = stem_channels, [stem_channels]
        source, resolution = img_channels, img_resolution
        for i, dim in enumerate(channels):
            level = nn.ModuleList()
            if i:
                resolution //= 2
                level.append(block(width, width, resample=self.shrink))
                skips.append(width)
                if ncsnpp:
                    self.pyramid.append(nn.Conv2d(source, width, 3, padding=1))
                    source = width
            for _ in range(num_blocks):
                attention = attend(dim, resolution) if resolution in attn_resolutions else None
                level.append(block(width, dim, attention=attention))
                width = dim
                skips.append(width)
            self.encoder.append(level)
        self.middle = nn.ModuleList(
            [block(width, width, attention=attend(width, resolution)), block(width, width)]
        )
        for i, dim in enumerate(reversed(channels)):
            level = nn.ModuleList()
            if i:
                resolution *= 2
                level.append(block(width, width, resample=grow))
            for j in range(num_blocks + 1):
                attends = j == num_blocks and resolution in attn_resolutions
                attention = attend(dim, resolution) if attends else None
                level.append(block(width + skips.pop(), dim, attention=attention))
                width = dim
            self.decoder.append(level)
        self.norm = group_norm(width)
        self.head = nn.Conv2d(width, img_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: Xavier's weights; zero biases, head and ends of branches, as EDM does."""
        self._reset_layers()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        zero_(self.head)
        for block in self.modules():
            if isinstance(block, ConvBlock):
                zero_(block.conv1)
                if block.attention is not None:
                    zero_(block.attention.proj)

    def _predict(self, x: Tensor, temb: Tensor) -> Tensor:
        picture = x
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        skips = [x]
        for i, level in enumerate(self.encoder):
            for j, block in enumerate(level.children()):
                x = self._run(block, x, temb)
                if self.pyramid and i and j == 0:
                    x = picture = (x + self.pyramid[i - 1](self.shrink(picture))) * SKIP_SCALE
                skips.append(x)
        for block in self.middle:
            x = self._run(block, x, temb)
        for level in self.decoder:
            for block in level.children():
                if block.resample is None:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(block, x, temb)
        return self.head(silu(self.norm(x)))
