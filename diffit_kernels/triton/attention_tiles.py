"""What the attention kernels share: tokens of a window, tiles of a head, the table's gradient.

A tile is some slots of a window by the width of a head. Slot t lies in row t // ROW and column
t % ROW of the window. With ROW = ww each of the first M slots holds a token; with ROW the next
power of two, tiles consist of whole rows. The width of a head is a pair of chunks, D0 + D1 columns:
powers of two, as Triton wants them, so that 72 costs 64 + 16 and not 128. D1 may be 0; the second
chunk of a pair is then never looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(slot, WH: tl.constexpr, WW: tl.constexpr, ROW: tl.constexpr):
    """Row and column in the window, and whether the slot holds a token.

    A slot that holds none reads its nearest neighbour that does: loads need no mask.
    """
    y = slot // ROW
    x = slot % ROW
    valid = (y < WH) & (x < WW)
    return tl.minimum(y, WH - 1), tl.minimum(x, WW - 1), valid


@triton.jit
def token(y, x, window, grid_width, WH: tl.constexpr, WW: tl.constexpr):
    """Which token of the sample stands in row y and column x of a window."""
    across = grid_width // WW
    return ((window // across * WH + y) * grid_width + window % across * WW + x).to(tl.int64)


@triton.jit
def _pointers(tensor, start, live, D: tl.constexpr, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where a chunk (..., D) of the rows that begin at ``start`` is, and its mask."""
    column = FIRST + tl.arange(0, D)
    mask = column < HEAD_DIM
    if live is not None:
        mask = mask & tl.expand_dims(live, -1)
    return tensor + tl.expand_dims(start, -1) + column, mask


@triton.jit
def load(tensor, start, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, live=None):
    """The rows (..., head_dim) that begin at ``start``, 0 where they are not ``live``."""
    pointers, mask = _pointers(tensor, start, live, D0, 0, HEAD_DIM)
    first = tl.load(pointers, mask=mask, other=0.0)
    second = first
    if D1:
        pointers, mask = _pointers(tensor, start, live, D1, D0, HEAD_DIM)
        second = tl.load(pointers, mask=mask, other=0.0)
    return first, second


@triton.jit
def store(
    tensor, start, tile, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, live=None
):
    """Write ``tile`` to the rows that begin at ``start`` and are ``live``."""
    dtype = tensor.dtype.element_ty
    pointers, mask = _pointers(tensor, start, live, D0, 0, HEAD_DIM)
    tl.store(pointers, tile[0].to(dtype), mask=mask)
    if D1:
        pointers, mask = _pointers(tensor, start, live, D1, D0, HEAD_DIM)
        tl.store(pointers, tile[1].to(dtype), mask=mask)


@triton.jit
def _column_sums(x):
    x = x.to(tl.float32)
    if len(x.shape) == 3:
        x = tl.sum(x, axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def store_sum(tensor, start, tile, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write the sum of all rows of ``tile``."""
    sums = _column_sums(tile[0]), _column_sums(tile[1])
    store(tensor, start, sums, HEAD_DIM, D0, D1)


@triton.jit
def transposed(x):
    """Each matrix of one or of a batch, transposed."""
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.permute(x, (1, 0))


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """``a b + c``."""
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def product(a, b, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T``, summed over the width of the head."""
    c = _dot(a[0], transposed(b[0]), None, PRECISION)
    if D1:
        c = _dot(a[1], transposed(b[1]), c, PRECISION)
    return c


@triton.jit
def accumulate(tile, weights, x, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``tile + weights x``, with the weights rounded to the dtype of x."""
    weights = weights.to(x[0].dtype)
    first = _dot(weights, x[0], tile[0], PRECISION)
    second = tile[1]
    if D1:
        second = _dot(weights, x[1], tile[1], PRECISION)
    return first, second


@triton.jit
def zeros(rows, D0: tl.constexpr, D1: tl.constexpr):
    """A tile of float32 to accumulate in; ``rows`` are zeros of its leading shape."""
    first = tl.expand_dims(rows, -1) + tl.zeros((D0,), tl.float32)
    second = first
    if D1:
        second = tl.expand_dims(rows, -1) + tl.zeros((D1,), tl.float32)
    return first, second


@triton.jit
def add(a, b):
    """The sum of two tiles, or of a tile and a row."""
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def scaled(tile, factor):
    """``tile`` times a number, or a number for each of its rows."""
    return tile[0] * factor, tile[1] * factor


@triton.jit
def logits(
    a,
    b,
    table,
    offset,
    valid,
    factor,
    FULL: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a b^T factor + table[offset]``, -inf where ``valid`` is false (FULL: it never is)."""
    s = product(a, b, D1, PRECISION) * factor
    if table is not None:
        s += tl.load(table + offset)
    if not FULL:
        s = tl.where(valid, s, float("-inf"))
    return s


@triton.jit
def position(y, x, WW: tl.constexpr):
    """Numbers p such that query i and key j meet in row p(i) - p(j) + center of the table."""
    return y * (2 * WW - 1) + x


@triton.jit
def head_of_table(table, head, WH: tl.constexpr, WW: tl.constexpr):
    """The center of a head's part of a (heads, rows) table: where a token looks at itself."""
    rows: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    return table + head * rows + rows // 2


@triton.jit
def fold(ds, partial, ROW: tl.constexpr):
    """Sum a tile (queries, keys) of dS over its rows of equal dy, into (dy, x, x') at ``partial``.

    Rows of slots are whole, so the tile is (RY, ROW, KY, ROW) and each dy one masked sum.
    """
    RY: tl.constexpr = ds.shape[0] // ROW
    KY: tl.constexpr = ds.shape[1] // ROW
    ds = tl.reshape(ds, (RY, ROW, KY, ROW))
    dy = tl.arange(0, RY)[:, None, None, None] - tl.arange(0, KY)[None, None, :, None]
    x = tl.arange(0, ROW)
    pointers = partial + x[:, None] * ROW + x[None, :]
    for step in range(RY + KY - 1):
        same = tl.where(dy == step - KY + 1, ds, 0.0)
        tl.store(pointers + step * ROW * ROW, tl.sum(tl.sum(same, axis=2), axis=0))


@triton.jit
def add_partials(
    partial,
    grad_table,
    heads,
    splits,
    Q_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    RY: tl.constexpr,
    KY: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the table from ``partial`` (heads, splits, Q_TILES, K_TILES, dy, x, x').

    A program adds what one head has for one dy, in a fixed order. It reads (x, x') along
    diagonals: dx = x - x'.
    """
    dy = tl.program_id(0) - (WH - 1)
    head = tl.program_id(1)
    # Keys dy rows above a tile of queries fill RY rows, which are in at most MEETING tiles.
    MEETING: tl.constexpr = min(K_TILES, (RY + KY - 2) // KY + 1)
    column = tl.arange(0, 2 * ROW)
    x = tl.arange(0, ROW)[:, None]
    key_x = x - column + ROW - 1
    inside = ((key_x >= 0) & (key_x < ROW))[None, :, :]

    total = tl.zeros((BLOCK, ROW, 2 * ROW), tl.float32)
    for start in range(0, splits * Q_TILES * MEETING, BLOCK):
        item = start + tl.arange(0, BLOCK)
        q_tile = item // MEETING % Q_TILES
        split = item // (MEETING * Q_TILES)
        # Moved up by all tiles: a division rounds down only what is not negative.
        k_tile = (q_tile * RY - dy + K_TILES * KY) // KY - K_TILES
        k_tile = tl.minimum(tl.maximum(k_tile, 0), K_TILES - MEETING) + item % MEETING
        step = dy - q_tile * RY + k_tile * KY + KY - 1
        live = (split < splits) & (step >= 0) & (step < RY + KY - 1)
        tile = ((head * splits + split) * Q_TILES + q_tile) * K_TILES + k_tile
        where = (tile.to(tl.int64) * (RY + KY - 1) + step) * (ROW * ROW)
        total += tl.load(
            partial + where[:, None, None] + (x * ROW + key_x)[None, :, :],
            mask=live[:, None, None] & inside,
            other=0.0,
        )
    dx = column - (ROW - WW)
    pointers = grad_table + ((dy + WH - 1) * (2 * WW - 1) + dx) * heads + head
    sums = tl.sum(tl.sum(total, axis=0), axis=0)
    tl.store(pointers, sums, mask=(dx >= 0) & (dx < 2 * WW - 1))


@triton.jit
def add_rows(
    q_partial,
    v_partial,
    grad_q_row,
    grad_v_row,
    parts,
    dim,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the rows (B, C) from partials (B, parts, C), PARTS at a time."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if q_partial is not None:
        _add_row(q_partial, grad_q_row, sample, column, parts, dim, PARTS)
    if v_partial is not None:
        _add_row(v_partial, grad_v_row, sample, column, parts, dim, PARTS)


@triton.jit
def _add_row(partial, grad_row, sample, column, parts, dim, PARTS: tl.constexpr):
    total = tl.zeros((PARTS, column.shape[0]), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(
            partial + (sample * parts + part)[:, None] * dim + column[None, :],
            mask=(part < parts)[:, None] & (column < dim)[None, :],
            other=0.0,
        )
    total = tl.sum(total, axis=0)
    tl.store(grad_row + sample * dim + column, total.to(grad_row.dtype.element_ty), column < dim)
