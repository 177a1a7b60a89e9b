"""SETR-MLA's decoder, and ViT-Base before it: where the paper's comparison of designs begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffit.models.base import ImageNetwork
from diffit.models.latent import PatchEmbedder
from diffit.nn.embeddings import sincos_positions
from diffit.nn.resblock import group_norm
from diffit.nn.time_entry import AdaptiveScaleBlock


def _conv(in_channels: int, channels: int) -> nn.Sequential:
    """Norm, swish, 3x3 convolution."""
    return nn.Sequential(
        group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, channels, 3, padding=1)
    )


def _resize(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, C, H, W) to another H, W, bilinearly."""
    if x.shape[2:] == size:
        return x
    return interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class MLADecoder(nn.Module):
    """Multi-level feature aggregation (SETR, Zheng et al. 2021, section 3.2).

    ``s_i = Conv1x1(f_i) + s_(i + 1)`` from the deepest feature to the first; each sum goes through
    a 3x3 convolution, two more that halve its channels, and is brought to the full resolution
    bilinearly. The channels of all come out side by side.

    Args:
        in_channels: channels of each feature, the first or finest to begin with.
        resolution: height and width of the result.
        width: channels of the sums.
    """

    def __init__(self, in_channels: Sequence[int], resolution: int, *, width: int = 256) -> None:
        super().__init__()
        self.resolution = resolution
        self.out_channels = len(in_channels) * (width // 2)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.streams = nn.ModuleList(
            nn.Sequential(
                _conv(width, width), _conv(width, width // 2), _conv(width // 2, width // 2)
            )
            for _ in in_channels
        )

    def forward(self, *features: Tensor) -> Tensor:
        """(B, in_channels[i], H_i, W_i) each -> (B, out_channels, resolution, resolution)."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + _resize(maps[i + 1], maps[i].shape[2:])
        full = (self.resolution, self.resolution)
        return torch.cat(
            [_resize(stream(x), full) for stream, x in zip(self.streams, maps, strict=True)], dim=1
        )


class ViTMLA(ImageNetwork):
    """A plain transformer on patches, by default ViT-Base, with ``MLADecoder``.

    Attention is global; positions are fixed sin-cos embeddings, without a relative position bias;
    time enters by adaptive scaling. The decoder takes the tokens after every quarter of the depth.

    Args:
        img_resolution, img_channels, label_dim, augment_dim: as in ``ImageDiffiT``.
        patch_size: height and width of a patch, which becomes one token.
        hidden_size: channels of the tokens.
        depth: blocks, a multiple of 4.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        decoder_width: channels of the sums in the decoder.
        temb_dim, dropout, label_dropout, time_embedding: as in ``ImageDiffiT``; dropout acts at
            the ends of attention and MLP.

    Raises:
        ValueError: an argument that does not fit, naming it.
    """

    FEATURES = 4
    positions: Tensor

    def __init__(
        self,
        img_resolution: int = 32,
        img_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        *,
        patch_size: int = 2,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_width: int = 256,
        temb_dim: int = 512,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        time_embedding: str = "sinusoidal",
    ) -> None:
        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            augment_dim,
            time_width=hidden_size,
            temb_dim=temb_dim,
            label_dropout=label_dropout,
            time_embedding=time_embedding,
        )
        if patch_size < 1 or img_resolution % patch_size:
            raise ValueError(
                f"img_resolution: expected a multiple of patch_size = {patch_size}, "
                f"got {img_resolution}"
            )
        if depth < 1 or depth % self.FEATURES:
            raise ValueError(f"depth: expected a multiple of {self.FEATURES}, got {depth}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, got {hidden_size}")
        self.grid = img_resolution // patch_size
        self.patches = PatchEmbedder(patch_size, img_channels, hidden_size)
        self.register_buffer("positions", torch.empty(1, self.grid**2, hidden_size))
        self.blocks = nn.ModuleList(
            AdaptiveScaleBlock(
                hidden_size,
                num_heads,
                temb_dim=temb_dim,
                window_size=self.grid,
                mlp_ratio=mlp_ratio,
                rel_pos_bias=False,
                proj_drop=dropout,
            )
            for _ in range(depth)
        )
        self.mla = MLADecoder([hidden_size] * self.FEATURES, img_resolution, width=decoder_width)
        self.norm = group_norm(self.mla.out_channels)
        self.head = nn.Conv2d(self.mla.out_channels, img_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``ImageNetwork``; positions are computed again."""
        super().reset_parameters()
        with torch.no_grad():
            self.positions.copy_(sincos_positions(self.grid, self.positions.shape[-1]))

    def _predict(self, x: Tensor, temb: Tensor) -> Tensor:
        tokens = self.patches(x)
        tokens = tokens + self.positions.to(tokens.dtype)
        features: list[Tensor] = []
        for i, block in enumerate(self.blocks, start=1):
            tokens = self._run(block, tokens, temb)
            if i % (len(self.blocks) // self.FEATURES) == 0:
                features.append(tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return self.head(self.norm(self._run(self.mla, *features)))
