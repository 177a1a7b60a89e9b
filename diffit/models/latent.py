"""The latent network: a plain transformer on patches, with DiffiT's attention (section 3.3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffit.models.base import DiffusionNetwork, require_images
from diffit.models.weights import Shapes, published_config
from diffit.nn.block import DiffiTBlock
from diffit.nn.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions

NORM_EPS = 1e-6


class PatchEmbedder(nn.Module):
    """A linear map of every patch to a token: (B, channels, H, W) -> (B, L, dim)."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens in row-major order."""
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """``linear(silu(LN(x)))``: (B, L, dim) -> (B, L, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        """From tokens to the values of their patches."""
        return self.linear(silu(self.norm(x)))


class LatentDiffiT(DiffusionNetwork):
    """Predicts the noise of a latent, and the range of its variance.

    Args:
        input_size: height and width of the latent: 32 for 256 pixels, 64 for 512.
        patch_size: height and width of a patch, which becomes one token.
        in_channels: channels of the latent.
        hidden_size: width C of tokens and of the time token.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over C.
        class_dropout_prob: how often a label is dropped while training.
        num_classes: classes; the id ``num_classes`` means none.
        learn_sigma: also predict the variance: twice the channels come out.

    One attention window is the whole grid. Names and shapes are those of the published weights;
    a new network starts from Xavier's weights and a zero final layer.
    """

    LABEL_KEYS = ("y_embedder.embedding_table.weight",)
    pos_embed: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if patch_size < 1 or input_size < 1 or input_size % patch_size:
            raise ValueError(
                f"input_size: expected a multiple of patch_size = {patch_size}, got {input_size}"
            )
        if hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, got {hidden_size}")
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.grid = input_size // patch_size

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.register_buffer("pos_embed", torch.empty(1, self.grid**2, hidden_size))
        self.blocks = nn.ModuleList(
            DiffiTBlock(
                hidden_size,
                num_heads,
                temb_dim=hidden_size,
                window_size=self.grid,
                mlp_ratio=mlp_ratio,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: Xavier's linear layers, normal embeddings, a zero final layer."""
        self._reset_layers()
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for weight in (w for w in self.t_embedder.parameters() if w.dim() == 2):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.final_layer.linear.weight)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.grid, self.pos_embed.shape[-1]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict at time t.

        Args:
            x: (B, in_channels, input_size, input_size), in the dtype of the parameters unless
                autocast is on.
            t: (B,), time steps 0..999, of any real dtype.
            y: (B,), int64, classes 0..num_classes.

        Returns:
            (B, out_channels, input_size, input_size): the noise, then with ``learn_sigma`` the
            variance as a number between its bounds, -1..1.

        Raises:
            ValueError, TypeError: an input that does not fit, naming it.
        """
        require_images(x, self.in_channels, self.input_size)
        for name, tensor in (("t", t), ("y", y)):
            if tensor.shape != x.shape[:1]:
                raise ValueError(
                    f"{name}: expected ({x.shape[0]},), one for each of x, "
                    f"got shape {tuple(tensor.shape)}"
                )
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = self._run(block, tokens, c)
        patches = self.final_layer(tokens).unflatten(-1, (self.patch_size, self.patch_size, -1))
        patches = patches.unflatten(1, (self.grid, self.grid))  # (B, h, w, p, p, c)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, self.input_size, self.input_size
        )

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, scale_pow: float = 4.0
    ) -> Tensor:
        """Classifier-free guidance in DiT's protocol, with the published weights' schedules.

        ``eps = eps_0 + w(t) (eps_y - eps_0)`` on the first three channels, with
        ``w = 1 + (cfg_scale - 1) (1 - cos(pi (1 - t / 1000) ** scale_pow)) / 2``; constant
        ``w = cfg_scale`` for latents of 64 and more, as published for 512 pixels, and where
        ``scale_pow`` is 0. ``diffit.diffusion.guided`` does the same, skips the second half of
        the batch where w is 1, and takes other schedules.

        Args:
            x: (2B, ...): the second half is ignored, the first counts for both.
            t: (2B,).
            y: (2B,): the classes, then the null class B times.
            cfg_scale: w at the end of the schedule.
            scale_pow: larger delays guidance.

        Returns:
            (2B, out_channels, H, W): guided noise in both halves; the other channels of the noise
            and the variance as predicted.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided, rest = out[:, :3], out[:, 3:]
        conditional, unconditional = guided.chunk(2)
        scale_pow = 0.0 if self.input_size >= 64 else scale_pow
        progress = (1 - t[: len(half)].double() / 1000) ** scale_pow
        w = 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2
        eps = unconditional + w.to(out.dtype).view(-1, 1, 1, 1) * (conditional - unconditional)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    @classmethod
    def _infer_config(cls, path: Path, shapes: Shapes) -> dict[str, Any]:
        return published_config(path, shapes)
