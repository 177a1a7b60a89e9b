"""Tensors as the kernels take them: as they are, or copied where they must be."""

from __future__ import annotations

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
