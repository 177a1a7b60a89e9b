"""The image-space network: a symmetric U of DiffiT ResBlocks (section 3.3, appendix H.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffit.models.base import ImageNetwork, require_choice
from diffit.models.mla import MLADecoder
from diffit.nn.resblock import DiffiTResBlock, group_norm
from diffit.nn.time_entry import TIME_ENTRIES

DECODERS = ("symmetric", "mla")


class Upsample(nn.Module):
    """Nearest neighbours x 2, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class ImageDiffiT(ImageNetwork):
    """The inner network of EDM's preconditioning, on pictures.

    Args:
        img_resolution: height and width of the pictures.
        img_channels: their channels.
        label_dim: classes, 0: unconditional.
        augment_dim: width of EDM's augmentation label, 9, or 0: none.
        channels: channels at each resolution, from the full one, each half the last.
        depths: ResBlocks at each resolution, in the encoder and again in the decoder; at the
            lowest resolution, where the two meet, they stand once.
        head_dim: width of an attention head.
        window_size: height and width of the attention windows, at every resolution.
        mlp_ratio: hidden width of the MLPs over the channels.
        temb_dim: width of the time token.
        dropout: of what enters the convolution of a ResBlock.
        label_dropout: how often a label is dropped while training, for guidance.
        time_embedding: "sinusoidal" or "fourier".
        time_entry: where time enters a block: "tmsa" (the time token in q, k and v: DiffiT),
            "separate", "bias", "mlp" or "scale" (the paper's comparisons, see
            ``diffit.nn.time_entry``).
        decoder: "symmetric", or "mla": an ``MLADecoder`` on the encoder, which takes no time.
        decoder_time_entry: as ``time_entry``, in a symmetric decoder; None: as in the encoder.

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
        channels: Sequence[int] = (128, 256, 256),
        depths: Sequence[int] = (4, 4, 4),
        head_dim: int = 32,
        window_size: int = 4,
        mlp_ratio: float = 4.0,
        temb_dim: int = 512,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        time_embedding: str = "sinusoidal",
        time_entry: str = "tmsa",
        decoder: str = "symmetric",
        decoder_time_entry: str | None = None,
    ) -> None:
        for name, value, known in (
            ("time_entry", time_entry, TIME_ENTRIES),
            ("decoder", decoder, DECODERS),
            ("decoder_time_entry", decoder_time_entry or time_entry, TIME_ENTRIES),
        ):
            require_choice(name, value, known)
        if not channels or len(channels) != len(depths) or min(depths) < 1:
            raise ValueError(
                "depths: expected a positive number for each of channels "
                f"{tuple(channels)}, got {tuple(depths)}"
            )
        smallest = window_size * 2 ** (len(channels) - 1)
        if img_resolution % smallest:
            raise ValueError(
                f"img_resolution: expected a multiple of {smallest}, so that windows of "
                f"{window_size} tile each of {len(channels)} resolutions, got {img_resolution}"
            )
        for width in channels:
            if width % head_dim:
                raise ValueError(
                    f"channels: expected multiples of head_dim = {head_dim}, got {width}"
                )
        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            augment_dim,
            time_width=channels[0],
            temb_dim=temb_dim,
            label_dropout=label_dropout,
            time_embedding=time_embedding,
        )

        def level(in_channels: int, dim: int, depth: int, entry: str) -> nn.ModuleList:
            return nn.ModuleList(
                DiffiTResBlock(
                    dim if i else in_channels,
                    dim,
                    TIME_ENTRIES[entry](
                        dim,
                        dim // head_dim,
                        temb_dim=temb_dim,
                        window_size=window_size,
                        mlp_ratio=mlp_ratio,
                    ),
                    dropout=dropout,
                )
                for i in range(depth)
            )

        steps = list(pairwise(channels))
        self.stem = nn.Conv2d(img_channels, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            level(dim, dim, depth, time_entry) for dim, depth in zip(channels, depths, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in steps)
        self.mla = MLADecoder(channels, img_resolution) if decoder == "mla" else None
        width = channels[0] if self.mla is None else self.mla.out_channels
        if self.mla is None:
            self.up = nn.ModuleList(Upsample(b, a) for a, b in steps)
            self.decoder = nn.ModuleList(
                level(2 * dim, dim, depth, decoder_time_entry or time_entry)
                for dim, depth in zip(channels[:-1], depths[:-1], strict=True)
            )
        self.norm = group_norm(width)
        self.head = nn.Conv2d(width, img_channels, 3, padding=1)
        self.reset_parameters()

    def _predict(self, x: Tensor, temb: Tensor) -> Tensor:
        # Channels last: the tokens of a block are then a view of the picture.
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        features: list[Tensor] = []
        for i, blocks in enumerate(self.encoder):
            if i:
                x = self.down[i - 1](x)
            for block in blocks.children():
                x = self._run(block, x, temb)
            features.append(x)
        if self.mla is not None:
            return self.head(self.norm(self._run(self.mla, *features)))
        x = features.pop()
        for up, blocks in zip(reversed(self.up), reversed(self.decoder), strict=True):
            x = torch.cat([up(x), features.pop()], dim=1)
            for block in blocks.children():
                x = self._run(block, x, temb)
        return self.head(self.norm(x))
