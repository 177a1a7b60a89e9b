"""Time-dependent multi-head self-attention: the projections around ``window_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffit_kernels.layout import thirds, token_row
from diffit_kernels.ops import autocast
from diffit_kernels.ops.linear import linear
from diffit_kernels.ops.window_attention import window_attention
from diffit_kernels.problem import (
    Described,
    remembered,
    require_floating,
    require_like,
    require_shape,
    require_tensor,
    shape,
)


def tmsa(
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
    window_size: int | tuple[int, int],
    grid_size: tuple[int, int] | None = None,
    scale: float | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """Self-attention whose q, k and v see the time token (DiffiT, equations 3 to 6).

    ``q, k, v = x W_s + b_s + temb W_t + b_t``, windowed attention with the relative position
    bias, output projection. The token adds a constant row to q, k and v of a sample. The row of k
    does not change the softmax and the rows of q and v enter inside ``window_attention``, so the
    token costs no pass over q, k and v.

    Args:
        x: (B, L, C).
        temb: (B, T), or None: attention without a time token (``temb_weight`` is not used).
            (b, T) with b a divisor of B: x holds B / b partitioned windows of each sample.
        qkv_weight: (3C, C); rows packed as (3, heads, head_dim), as those of ``temb_weight``.
        qkv_bias: (3C,) or None.
        temb_weight: (3C, T).
        temb_bias: (3C,) or None.
        rel_pos_table: ((2 wh - 1) (2 ww - 1), heads) or None.
        proj_weight: (C, C).
        proj_bias: (C,) or None.
        num_heads, window_size, grid_size, scale: as in ``window_attention``.
        row: (B, 3C), the projection ``temb W_t + b_t`` itself, in place of ``temb``: what
            ``time_rows`` gives for one of its layers. (b, 3C) as for ``temb``.

    Returns:
        (B, L, C).

    Raises:
        TypeError, ValueError, RuntimeError: as in ``window_attention``.
    """
    require_tensor("x", x)
    if temb is None:
        temb_weight = temb_bias = None
    weights = (qkv_weight, qkv_bias, temb_weight, temb_bias, proj_weight, proj_bias)
    check_tmsa(x, temb, row, *weights, autocast.is_active(x))
    row = token_row(linear, x.shape[0], temb, row, qkv_bias, temb_weight, temb_bias)
    out = attend_with_row(
        linear(x, qkv_weight),
        row,
        rel_pos_table,
        num_heads=num_heads,
        window_size=window_size,
        grid_size=grid_size,
        scale=scale,
    )
    return linear(out, proj_weight, proj_bias)


@remembered
def check_tmsa(
    x: Described,
    temb: Described | None,
    row: Described | None,
    qkv_weight: Described,
    qkv_bias: Described | None,
    temb_weight: Described | None,
    temb_bias: Described | None,
    proj_weight: Described,
    proj_bias: Described | None,
    cast: bool,
) -> None:
    """Of the arguments of ``tmsa``; with ``cast`` autocast gives them one dtype."""
    require_floating("x", x)
    if len(x.shape) != 3 or x.shape[0] == 0:
        raise ValueError(f"x: expected (B, L, C) with at least one sample, got shape {shape(x)}")
    require_tensor("qkv_weight", qkv_weight)
    require_tensor("proj_weight", proj_weight)
    batch, _, dim = x.shape
    if temb is not None and temb_weight is None:
        raise ValueError("temb_weight: expected (3C, T) because temb is given, got None")
    if temb is not None and row is not None:
        raise ValueError("row: it stands in place of temb, got both")
    for name, tensor, columns in (("temb", temb, "T"), ("row", row, "3C")):
        if tensor is not None and (
            len(tensor.shape) != 2 or tensor.shape[0] == 0 or batch % tensor.shape[0]
        ):
            raise ValueError(
                f"{name}: expected (B, {columns}) with B = {batch} or a divisor of it, "
                f"got shape {shape(tensor)}"
            )
    tokens, width = (0, 0) if temb is None else temb.shape
    for name, tensor, expected in (
        ("temb", temb, (tokens, width)),
        ("row", row, (0 if row is None else row.shape[0], 3 * dim)),
        ("qkv_weight", qkv_weight, (3 * dim, dim)),
        ("qkv_bias", qkv_bias, (3 * dim,)),
        ("temb_weight", temb_weight, (3 * dim, width)),
        ("temb_bias", temb_bias, (3 * dim,)),
        ("proj_weight", proj_weight, (dim, dim)),
        ("proj_bias", proj_bias, (dim,)),
    ):
        if tensor is not None:
            require_like(name, tensor, tensor.dtype if cast else x.dtype, x)
            require_shape(name, tensor, expected)


def attend_with_row(
    qkv: Tensor, row: Tensor | None, rel_pos_table: Tensor | None, **options: Any
) -> Tensor:
    """``window_attention`` of q, k and v with a row added to those of all tokens of a sample.

    Args:
        qkv: (B, L, 3C), without the row.
        row: (b, 3C) with b a divisor of B, as in ``tmsa``, or None.
        rel_pos_table, options: as in ``window_attention``.

    Returns:
        (B, L, C).
    """
    if row is None:
        return window_attention(qkv, rel_pos_table, **options)
    if row.shape[0] != qkv.shape[0]:
        row = row.repeat_interleave(qkv.shape[0] // row.shape[0], dim=0)
    q_row, _, v_row = thirds(row)
    return window_attention(qkv, rel_pos_table, q_row=q_row, v_row=v_row, **options)


def time_rows(temb: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``temb W_t + b_t`` of every layer of a network, by one product.

    The products of single layers are too small to fill a device. Each layer's part is what its
    ``tmsa`` takes as ``row``.

    Args:
        temb: (B, T); float32, bfloat16, float16 or float64.
        weight: (layers, 3C, T), the ``temb_weight`` of every layer.
        bias: (layers, 3C) or None, the ``temb_bias`` of every layer.

    Returns:
        (layers, B, 3C).

    Raises:
        TypeError: a dtype or device that is not supported or differs from that of ``temb``.
        ValueError: a shape that does not fit.
    """
    require_floating("temb", temb)
    if temb.dim() != 2 or 0 in temb.shape:
        raise ValueError(f"temb: expected (B, T), got shape {tuple(temb.shape)}")
    if weight.dim() != 3 or 0 in weight.shape or weight.shape[1] % 3:
        raise ValueError(f"weight: expected (layers, 3C, T), got shape {tuple(weight.shape)}")
    layers, rows, _ = weight.shape
    for name, tensor, expected in (
        ("weight", weight, (layers, rows, temb.shape[1])),
        ("bias", bias, (layers, rows)),
    ):
        if tensor is not None:
            dtype = tensor.dtype if autocast.is_active(temb) else temb.dtype
            require_like(name, tensor, dtype, temb)
            require_shape(name, tensor, expected)
    out = linear(temb, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(1, (layers, rows)).transpose(0, 1)
