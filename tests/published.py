"""The attention layer as it was published: the token on every q, k and v, windows cut out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import diffit_kernels as dk


def published_tmsa(
    x: Tensor,
    temb: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temb_weight: Tensor | None,
    temb_bias: Tensor | None,
    rel_pos_table: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    window_size: tuple[int, int],
    grid_size: tuple[int, int],
) -> Tensor:
    """The arguments of ``diffit_kernels.tmsa``; temb also (B, L, T)."""
    (batch, tokens, dim), (wh, ww), (height, width) = x.shape, window_size, grid_size
    qkv = linear(x, qkv_weight, qkv_bias)
    if temb is not None:
        row = linear(temb, temb_weight, temb_bias)
        if row.dim() == 2:
            row = row.repeat_interleave(batch // row.shape[0], dim=0)[:, None]
        qkv = qkv + row
    qkv = qkv.view(batch, height // wh, wh, width // ww, ww, 3, num_heads, dim // num_heads)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(-3, -2)
    logits = (q @ k.mT) * (dim // num_heads) ** -0.5
    if rel_pos_table is not None:
        index = dk.relative_position_index(window_size)
        logits = logits + rel_pos_table[index].permute(2, 0, 1).to(logits.dtype)
    out = logits.softmax(-1) @ v
    out = out.unflatten(-2, window_size).permute(0, 1, 4, 2, 5, 3, 6)
    return linear(out.reshape(batch, tokens, dim), proj_weight, proj_bias)


def parameters_of(layer: torch.nn.Module) -> dict[str, Tensor | None]:
    """The arguments of ``published_tmsa`` after x and temb, from a ``TMSA``."""
    return {
        "qkv_weight": layer.qkv.weight,
        "qkv_bias": layer.qkv.bias,
        "temb_weight": None if layer.qkv_temb is None else layer.qkv_temb.weight,
        "temb_bias": None if layer.qkv_temb is None else layer.qkv_temb.bias,
        "rel_pos_table": layer.relative_position_bias_table,
        "proj_weight": layer.proj.weight,
        "proj_bias": layer.proj.bias,
    }
