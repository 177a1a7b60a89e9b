"""Tensors as the kernels take them: as they are, or copied where they must be."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def channels_contiguous(x: Tensor) -> Tensor:
    """(..., C) whose last stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def equally_spaced(
    q_row: Tensor | None, v_row: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Rows (B, C) that lie equally far apart, and how far.

    Parts of one projection do as they are.
    """
    rows = [row for row in (q_row, v_row) if row is not None]
    if not rows:
        return None, None, 0
    first, last = rows[0].stride(), rows[-1].stride()
    if first == last and first[1] == 1:
        return q_row, v_row, first[0]
    q_row, v_row = (None if row is None else row.contiguous() for row in (q_row, v_row))
    return q_row, v_row, rows[0].shape[1]


def token_row(
    linear: Callable[..., Tensor],
    batch: int,
    temb: Tensor | None,
    row: Tensor | None,
    qkv_bias: Tensor | None,
    temb_weight: Tensor | None,
    temb_bias: Tensor | None,
) -> Tensor | None:
    """(B or b, 3C): what biases and time token add to every token's q, k and v.

    The part of k is computed too: one product is rounded once, and its gradient needs no slices.
    """
    bias = qkv_bias
    if temb is not None and temb_weight is not None:
        if temb_bias is not None:
            bias = temb_bias if bias is None else bias + temb_bias
        row = linear(temb, temb_weight, bias)
    elif row is None:
        return None if bias is None else bias.expand(batch, -1)
    elif bias is not None:
        row = row + bias
    return row


def thirds(row: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(B, 3C) -> the parts (B, C) of q, k and v, or what there is of them: None."""
    if row is None:
        return None, None, None
    q_row, k_row, v_row = row.chunk(3, dim=1)
    return q_row, k_row, v_row
