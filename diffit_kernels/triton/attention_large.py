"""Attention in windows of more than 64 tokens: tiles of queries against tiles of keys.

Nothing of size M x M is stored: the backward kernels compute the probabilities again from the
log-sum-exp. Its rounding would scale whole rows of them, so the first backward kernel also sums its
row and writes 1 / sum as the ``weight`` of the row, beside ``delta = rowsum(P dP)``. That is also
rowsum(dO (out - v_row)), but from a rounded out ``dS = P (dP - delta)`` would not vanish where it
has to: where one key has all the weight, or all keys are equal. Their logits are in base e, where
those of the forward kernel are in base 2: two roundings fewer, for one more product.

Work is counted as tiles, heads, windows, samples, the first fastest: programs that run together
read the same keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffit_kernels.triton.attention_tiles import (
    LN2,
    LOG2E,
    accumulate,
    add,
    fold,
    head_of_table,
    load,
    locate,
    logits,
    position,
    product,
    scaled,
    store,
    store_sum,
    token,
    zeros,
)


@triton.jit
def _work(TILES: tl.constexpr, heads, windows):
    """Tile, head, window and sample of this program."""
    index = tl.program_id(0)
    tile, index = index % TILES, index // TILES
    head, index = index % heads, index // heads
    return tile, head, index % windows, (index // windows).to(tl.int64)


@triton.jit
def forward(
    qkv,
    table,
    q_row,
    v_row,
    out,
    lse,
    stride_b,
    stride_l,
    row_stride_b,
    tokens,
    grid_width,
    heads,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax of a tile of queries over tiles of keys."""
    tile, head, window, sample = _work(
        (WH * WW + BLOCK_M - 1) // BLOCK_M, heads, tokens // (WH * WW)
    )
    if table is not None:
        table = head_of_table(table, head, WH, WW)
    dim = heads * HEAD_DIM
    column = head * HEAD_DIM
    qkv += sample * stride_b + column

    y, x, live = locate(tile * BLOCK_M + tl.arange(0, BLOCK_M), WH, WW, WW)
    here = position(y, x, WW)
    at = token(y, x, window, grid_width, WH, WW)
    q = load(qkv, at * stride_l, HEAD_DIM, D0, D1)
    if q_row is not None:
        q = add(q, load(q_row, sample * row_stride_b + column, HEAD_DIM, D0, D1))

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = zeros(tl.zeros((BLOCK_M,), tl.float32), D0, D1)
    for key in range(0, WH * WW, BLOCK_N):
        k_y, k_x, valid = locate(key + tl.arange(0, BLOCK_N), WH, WW, WW)
        k_at = token(k_y, k_x, window, grid_width, WH, WW)
        k = load(qkv + dim, k_at * stride_l, HEAD_DIM, D0, D1)
        v = load(qkv + 2 * dim, k_at * stride_l, HEAD_DIM, D0, D1)
        s = logits(
            q,
            k,
            table,
            here[:, None] - position(k_y, k_x, WW)[None, :],
            valid[None, :],
            scale * LOG2E,
            WH * WW % BLOCK_N == 0,
            D1,
            PRECISION,
        )
        m_next = tl.maximum(m, tl.max(s, axis=1))
        # The bias may mask every key so far: -inf less -inf is no number.
        shift = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(m - shift)
        total = total * decay + tl.sum(p, axis=1)
        o = accumulate(scaled(o, decay[:, None]), p, v, D1, PRECISION)
        m = m_next

    o = scaled(o, 1 / total[:, None])
    if v_row is not None:
        o = add(o, load(v_row, sample * row_stride_b + column, HEAD_DIM, D0, D1))
    store(out, (sample * tokens + at) * dim + column, o, HEAD_DIM, D0, D1, live)
    tl.store(lse + (sample * heads + head) * tokens + at, (m + tl.log2(total)) * LN2, mask=live)


@triton.jit
def _probabilities(
    q,
    do,
    qkv,
    table,
    here,
    row_lse,
    key,
    window,
    stride_l,
    grid_width,
    dim,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P up to the weight of its row, dP, and K: a tile of queries, the keys from ``key`` on."""
    k_y, k_x, valid = locate(key + tl.arange(0, BLOCK_N), WH, WW, WW)
    k_at = token(k_y, k_x, window, grid_width, WH, WW)
    k = load(qkv + dim, k_at * stride_l, HEAD_DIM, D0, D1)
    v = load(qkv + 2 * dim, k_at * stride_l, HEAD_DIM, D0, D1)
    s = logits(
        q,
        k,
        table,
        here[:, None] - position(k_y, k_x, WW)[None, :],
        valid[None, :],
        scale,
        WH * WW % BLOCK_N == 0,
        D1,
        PRECISION,
    )
    return tl.exp2((s - row_lse[:, None]) * LOG2E), product(do, v, D1, PRECISION), k


@triton.jit
def backward_q(
    grad_out,
    qkv,
    table,
    q_row,
    lse,
    grad_qkv,
    weight,
    delta,
    q_partial,
    v_partial,
    grad_stride_b,
    grad_stride_l,
    stride_b,
    stride_l,
    row_stride_b,
    tokens,
    grid_width,
    heads,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ of a tile of queries; their weight and delta; the tile's part of the rows' gradients.

    It goes through the keys twice: the first time for weight and delta.
    """
    TILES: tl.constexpr = (WH * WW + BLOCK_M - 1) // BLOCK_M
    tile, head, window, sample = _work(TILES, heads, tokens // (WH * WW))
    if table is not None:
        table = head_of_table(table, head, WH, WW)
    dim = heads * HEAD_DIM
    column = head * HEAD_DIM
    qkv += sample * stride_b + column

    y, x, live = locate(tile * BLOCK_M + tl.arange(0, BLOCK_M), WH, WW, WW)
    here = position(y, x, WW)
    at = token(y, x, window, grid_width, WH, WW)
    q = load(qkv, at * stride_l, HEAD_DIM, D0, D1)
    if q_row is not None:
        q = add(q, load(q_row, sample * row_stride_b + column, HEAD_DIM, D0, D1))
    start = sample * grad_stride_b + at * grad_stride_l + column
    # Slots that are not live have no gradient, and so add nothing to any sum.
    do = load(grad_out, start, HEAD_DIM, D0, D1, live)
    row = (sample * heads + head) * tokens + at
    row_lse = tl.load(lse + row)

    total = tl.zeros((BLOCK_M,), tl.float32)
    row_delta = tl.zeros((BLOCK_M,), tl.float32)
    for key in range(0, WH * WW, BLOCK_N):
        p, dp, _ = _probabilities(
            q,
            do,
            qkv,
            table,
            here,
            row_lse,
            key,
            window,
            stride_l,
            grid_width,
            dim,
            scale,
            WH,
            WW,
            HEAD_DIM,
            D0,
            D1,
            PRECISION,
            BLOCK_N,
        )
        total += tl.sum(p, axis=1)
        row_delta += tl.sum(p * dp, axis=1)
    row_weight = 1 / total
    row_delta *= row_weight

    dq = zeros(tl.zeros((BLOCK_M,), tl.float32), D0, D1)
    for key in range(0, WH * WW, BLOCK_N):
        p, dp, k = _probabilities(
            q,
            do,
            qkv,
            table,
            here,
            row_lse,
            key,
            window,
            stride_l,
            grid_width,
            dim,
            scale,
            WH,
            WW,
            HEAD_DIM,
            D0,
            D1,
            PRECISION,
            BLOCK_N,
        )
        dq = accumulate(dq, p * (dp - row_delta[:, None]), k, D1, PRECISION)

    tl.store(weight + row, row_weight, mask=live)
    tl.store(delta + row, row_delta, mask=live)
    dq = scaled(dq, (scale * row_weight)[:, None])
    store(grad_qkv, (sample * tokens + at) * (3 * dim) + column, dq, HEAD_DIM, D0, D1, live)
    windows = tokens // (WH * WW)
    row_start = ((sample * windows + window) * TILES + tile) * dim + column
    if q_partial is not None:
        store_sum(q_partial, row_start, dq, HEAD_DIM, D0, D1)
    if v_partial is not None:
        store_sum(v_partial, row_start, do, HEAD_DIM, D0, D1)


@triton.jit
def backward_kv(
    grad_out,
    qkv,
    table,
    q_row,
    lse,
    weight,
    delta,
    grad_qkv,
    grad_stride_b,
    grad_stride_l,
    stride_b,
    stride_l,
    row_stride_b,
    tokens,
    grid_width,
    heads,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of a tile of keys, with the logits transposed: (keys, queries)."""
    tile, head, window, sample = _work(
        (WH * WW + BLOCK_N - 1) // BLOCK_N, heads, tokens // (WH * WW)
    )
    if table is not None:
        table = head_of_table(table, head, WH, WW)
    dim = heads * HEAD_DIM
    column = head * HEAD_DIM
    qkv += sample * stride_b + column
    grad_out += sample * grad_stride_b + column
    row = (sample * heads + head) * tokens

    y, x, live = locate(tile * BLOCK_N + tl.arange(0, BLOCK_N), WH, WW, WW)
    here = position(y, x, WW)
    at = token(y, x, window, grid_width, WH, WW)
    k = load(qkv + dim, at * stride_l, HEAD_DIM, D0, D1)
    v = load(qkv + 2 * dim, at * stride_l, HEAD_DIM, D0, D1)
    if q_row is not None:
        q_offset = load(q_row, sample * row_stride_b + column, HEAD_DIM, D0, D1)

    dk = zeros(tl.zeros((BLOCK_N,), tl.float32), D0, D1)
    dv = zeros(tl.zeros((BLOCK_N,), tl.float32), D0, D1)
    for query in range(0, WH * WW, BLOCK_M):
        q_y, q_x, valid = locate(query + tl.arange(0, BLOCK_M), WH, WW, WW)
        q_at = token(q_y, q_x, window, grid_width, WH, WW)
        q = load(qkv, q_at * stride_l, HEAD_DIM, D0, D1)
        if q_row is not None:
            q = add(q, q_offset)
        do = load(grad_out, q_at * grad_stride_l, HEAD_DIM, D0, D1)
        row_lse = tl.load(lse + row + q_at)
        row_weight = tl.load(weight + row + q_at)
        row_delta = tl.load(delta + row + q_at)
        s = logits(
            k,
            q,
            table,
            position(q_y, q_x, WW)[None, :] - here[:, None],
            valid[None, :],
            scale,
            WH * WW % BLOCK_M == 0,
            D1,
            PRECISION,
        )
        p = tl.exp2((s - row_lse[None, :]) * LOG2E) * row_weight[None, :]
        dv = accumulate(dv, p, do, D1, PRECISION)
        ds = p * (product(v, do, D1, PRECISION) - row_delta[None, :])
        dk = accumulate(dk, ds, q, D1, PRECISION)

    start = (sample * tokens + at) * (3 * dim) + column
    store(grad_qkv + dim, start, scaled(dk, scale), HEAD_DIM, D0, D1, live)
    store(grad_qkv + 2 * dim, start, dv, HEAD_DIM, D0, D1, live)


@triton.jit
def backward_table(
    grad_out,
    qkv,
    table,
    q_row,
    lse,
    weight,
    delta,
    table_partial,
    grad_stride_b,
    grad_stride_l,
    stride_b,
    stride_l,
    row_stride_b,
    tokens,
    grid_width,
    heads,
    all_windows,
    splits,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dS of a tile of queries and one of keys, summed in registers over every ``splits``-th window.

    ``all_windows`` counts those of all samples. The sum is folded onto offsets once.
    """
    Q_TILES: tl.constexpr = (WH * ROW + BLOCK_M - 1) // BLOCK_M
    K_TILES: tl.constexpr = (WH * ROW + BLOCK_N - 1) // BLOCK_N
    k_tile = tl.program_id(0) % K_TILES
    q_tile = tl.program_id(0) // K_TILES % Q_TILES
    index = tl.program_id(0) // (K_TILES * Q_TILES)  # of heads * splits
    split = index % splits
    head = index // splits
    if table is not None:
        table = head_of_table(table, head, WH, WW)
    windows = tokens // (WH * WW)
    dim = heads * HEAD_DIM
    column = head * HEAD_DIM

    q_y, q_x, q_valid = locate(q_tile * BLOCK_M + tl.arange(0, BLOCK_M), WH, WW, ROW)
    k_y, k_x, k_valid = locate(k_tile * BLOCK_N + tl.arange(0, BLOCK_N), WH, WW, ROW)
    offset = position(q_y, q_x, WW)[:, None] - position(k_y, k_x, WW)[None, :]
    valid = q_valid[:, None] & k_valid[None, :]

    grad_logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for item in range(split, all_windows, splits):
        sample = (item // windows).to(tl.int64)
        q_at = token(q_y, q_x, item % windows, grid_width, WH, WW)
        k_at = token(k_y, k_x, item % windows, grid_width, WH, WW)
        start = sample * stride_b + column
        q = load(qkv, start + q_at * stride_l, HEAD_DIM, D0, D1)
        if q_row is not None:
            q = add(q, load(q_row, sample * row_stride_b + column, HEAD_DIM, D0, D1))
        k = load(qkv + dim, start + k_at * stride_l, HEAD_DIM, D0, D1)
        v = load(qkv + 2 * dim, start + k_at * stride_l, HEAD_DIM, D0, D1)
        grad_start = sample * grad_stride_b + q_at * grad_stride_l + column
        do = load(grad_out, grad_start, HEAD_DIM, D0, D1)
        row = (sample * heads + head) * tokens + q_at
        row_lse = tl.load(lse + row)
        row_weight = tl.load(weight + row)
        row_delta = tl.load(delta + row)
        s = logits(q, k, table, offset, valid, scale, True, D1, PRECISION)
        p = tl.exp2((s - row_lse[:, None]) * LOG2E) * row_weight[:, None]
        grad_logits += p * (product(do, v, D1, PRECISION) - row_delta[:, None])

    size: tl.constexpr = (BLOCK_M // ROW + BLOCK_N // ROW - 1) * ROW * ROW
    grad_logits = tl.where(valid, grad_logits, 0.0)
    fold(grad_logits, table_partial + tl.program_id(0).to(tl.int64) * size, ROW)
