"""Blocks in which time enters in another place, with which the paper compares its attention.

All take what ``DiffiTBlock`` takes. ``TIME_ENTRIES`` names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffit.nn.block import DiffiTBlock
from diffit_kernels import relative_position_index
from diffit_kernels.ops.window_attention import as_grid
from diffit_kernels.problem import WindowAttentionProblem
from diffit_kernels.reference.window_attention import partition, unpartition


class SeparateTokenBlock(DiffiTBlock):
    """Attention on the spatial tokens and on the time token apart, then added.

    A single token that attends to itself returns its value, so the time token reaches v alone.
    """

    def __init__(self, dim: int, num_heads: int, *, temb_dim: int, **options: Any) -> None:
        super().__init__(dim, num_heads, temb_dim=None, **options)
        self.v_temb = nn.Linear(temb_dim, dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor, *, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C)."""
        value = self.v_temb(temb)
        row = torch.cat([torch.zeros_like(value), torch.zeros_like(value), value], dim=-1)
        return super().forward(x, row=row, grid_size=grid_size)


class TimeMLPBlock(DiffiTBlock):
    """Time enters the MLP alone: ``x + MLP(LN(x) + W temb)``."""

    def __init__(self, dim: int, num_heads: int, *, temb_dim: int, **options: Any) -> None:
        super().__init__(dim, num_heads, temb_dim=None, **options)
        self.mlp_temb = nn.Linear(temb_dim, dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor, *, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C)."""
        attention = self.attn(self.normed(x), grid_size=grid_size)
        x, normed = self.add_normed(x, attention)
        return x + self.mlp(normed + self.mlp_temb(temb)[:, None])


class AdaptiveScaleBlock(DiffiTBlock):
    """Time scales and shifts what the norms give: ``LN(x) (1 + a) + b``, (a, b) = W temb."""

    def __init__(self, dim: int, num_heads: int, *, temb_dim: int, **options: Any) -> None:
        super().__init__(dim, num_heads, temb_dim=None, **options)
        self.scale_temb = nn.Linear(temb_dim, 4 * dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor, *, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C)."""
        rows = self.scale_temb(temb)[:, None].chunk(4, dim=-1)
        normed = self.normed(x)
        attention = self.attn(normed * (1 + rows[0]) + rows[1], grid_size=grid_size)
        x, normed = self.add_normed(x, attention)
        return x + self.mlp(normed * (1 + rows[2]) + rows[3])


class TimeBiasBlock(DiffiTBlock):
    """Time enters the relative position bias alone: a table per sample, ``table + W temb``.

    The fused operator has one table for all samples, so this takes the formula as written.
    """

    def __init__(self, dim: int, num_heads: int, *, temb_dim: int, **options: Any) -> None:
        super().__init__(dim, num_heads, temb_dim=None, **options)
        table = self.attn.relative_position_bias_table
        if table is None:
            raise ValueError("rel_pos_bias: expected True, this block puts time into the bias")
        self.table_temb = nn.Linear(temb_dim, table.numel())

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor, *, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C)."""
        attn = self.attn
        assert attn.relative_position_bias_table is not None
        table = attn.relative_position_bias_table + self.table_temb(temb).unflatten(
            -1, attn.relative_position_bias_table.shape
        )
        index = relative_position_index(attn.window_size).to(x.device)
        bias = table[:, index].permute(0, 3, 1, 2)[:, None]  # (B, 1, heads, M, M)

        qkv = attn.qkv(self.normed(x))
        grid = as_grid(grid_size, x.shape[1], attn.window_size)
        problem = WindowAttentionProblem.from_tensors(
            qkv, None, None, None, attn.num_heads, attn.window_size, grid, attn.scale
        )
        q, k, v = partition(problem, qkv, 3)  # (B, windows, heads, M, head_dim)
        out = scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=attn.scale)
        attention = attn.proj_drop(attn.proj(unpartition(problem, out[None])))
        x, normed = self.add_normed(x, attention)
        return x + self.mlp(normed)


TIME_ENTRIES: dict[str, type[DiffiTBlock]] = {
    "tmsa": DiffiTBlock,
    "separate": SeparateTokenBlock,
    "bias": TimeBiasBlock,
    "mlp": TimeMLPBlock,
    "scale": AdaptiveScaleBlock,
}
