"""Attention in windows of at most 64 tokens: whole windows in registers, nothing to stream.

A program holds one head of WINDOWS windows: one matrix, or a batch of them where a window is too
small for the warps of a program. (One block-diagonal product of four windows would compute four
times their logits, and carry a NaN from one to another as 0 * NaN.) The whole row of logits is
there, so the backward pass computes the softmax as the forward pass did and needs neither the
output nor the log-sum-exp.
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
    transposed,
    zeros,
)


@triton.jit
def _members(first, windows, valid, WINDOWS: tl.constexpr):
    """The WINDOWS windows from ``first`` on, and which slots of them hold a token.

    One window is a number, several are (WINDOWS, 1): a leading dimension of all that follows.
    """
    if WINDOWS == 1:
        return first, valid
    else:
        window = first + tl.arange(0, WINDOWS)[:, None]
        return tl.minimum(window, windows - 1), (window < windows) & valid


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
    all_windows,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """``all_windows`` counts those of all samples; heads are neighbours, as in memory."""
    head = tl.program_id(0) % heads
    y, x, valid = locate(tl.arange(0, BLOCK_M), WH, WW, WW)
    index, live = _members(tl.program_id(0) // heads * WINDOWS, all_windows, valid, WINDOWS)
    windows = tokens // (WH * WW)
    sample = (index // windows).to(tl.int64)
    at = token(y, x, index % windows, grid_width, WH, WW)

    dim = heads * HEAD_DIM
    start = sample * stride_b + at * stride_l + head * HEAD_DIM
    row_start = sample * row_stride_b + head * HEAD_DIM
    q = load(qkv, start, HEAD_DIM, D0, D1)
    k = load(qkv + dim, start, HEAD_DIM, D0, D1)
    v = load(qkv + 2 * dim, start, HEAD_DIM, D0, D1)
    if q_row is not None:
        q = add(q, load(q_row, row_start, HEAD_DIM, D0, D1))

    if table is not None:
        table = head_of_table(table, head, WH, WW)
    here = position(y, x, WW)
    s = logits(
        q,
        k,
        table,
        here[:, None] - here[None, :],
        valid,
        scale * LOG2E,
        WH * WW == BLOCK_M,
        D1,
        PRECISION,
    )
    m = tl.max(s, axis=-1)
    p = tl.exp2(s - tl.expand_dims(m, -1))
    total = tl.sum(p, axis=-1)
    o = accumulate(zeros(tl.zeros_like(total), D0, D1), p, v, D1, PRECISION)
    o = scaled(o, tl.expand_dims(1 / total, -1))
    if v_row is not None:
        o = add(o, load(v_row, row_start, HEAD_DIM, D0, D1))
    store(out, (sample * tokens + at) * dim + head * HEAD_DIM, o, HEAD_DIM, D0, D1, live)
    tl.store(lse + (sample * heads + head) * tokens + at, (m + tl.log2(total)) * LN2, mask=live)


@triton.jit
def backward(
    grad_out,
    qkv,
    table,
    q_row,
    grad_qkv,
    table_partial,
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
    splits,
    steps,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """A program takes ``steps`` times WINDOWS windows of one head of one sample.

    Sums over its windows stay in registers: dS for the table, dQ and dO for the two rows. They
    are written once, and added up over programs in a fixed order.
    """
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads  # of batch * splits
    sample = (part // splits).to(tl.int64)
    first = part % splits * steps * WINDOWS
    windows = tokens // (WH * WW)
    y, x, valid = locate(tl.arange(0, BLOCK_M), WH, WW, ROW)
    here = position(y, x, WW)
    offset = here[:, None] - here[None, :]
    if table is not None:
        table = head_of_table(table, head, WH, WW)
    dim = heads * HEAD_DIM
    column = head * HEAD_DIM

    window, live = _members(first, windows, valid, WINDOWS)
    rows = tl.zeros(live.shape, tl.float32)
    grad_logits = tl.expand_dims(rows, -1) + tl.zeros((BLOCK_M,), tl.float32)
    none = zeros(rows, D0, D1)
    q_sum = none
    v_sum = none
    if q_row is not None:
        row = load(q_row, sample * row_stride_b + column, HEAD_DIM, D0, D1)
    for start in range(first, tl.minimum(first + steps * WINDOWS, windows), WINDOWS):
        window, live = _members(start, windows, valid, WINDOWS)
        at = token(y, x, window, grid_width, WH, WW)
        qkv_start = sample * stride_b + at * stride_l + column
        q = load(qkv, qkv_start, HEAD_DIM, D0, D1)
        k = load(qkv + dim, qkv_start, HEAD_DIM, D0, D1)
        v = load(qkv + 2 * dim, qkv_start, HEAD_DIM, D0, D1)
        if q_row is not None:
            q = add(q, row)
        # Slots that are not live have no gradient, and so add nothing to any sum.
        grad_start = sample * grad_stride_b + at * grad_stride_l + column
        do = load(grad_out, grad_start, HEAD_DIM, D0, D1, live)

        s = logits(q, k, table, offset, valid, scale * LOG2E, WH * WW == BLOCK_M, D1, PRECISION)
        p = tl.exp2(s - tl.max(s, axis=-1, keep_dims=True))
        p *= 1 / tl.sum(p, axis=-1, keep_dims=True)
        dp = product(do, v, D1, PRECISION)
        ds = p * (dp - tl.sum(p * dp, axis=-1, keep_dims=True))

        dq = scaled(accumulate(none, ds, k, D1, PRECISION), scale)
        dk = scaled(accumulate(none, transposed(ds), q, D1, PRECISION), scale)
        dv = accumulate(none, transposed(p), do, D1, PRECISION)
        grad_start = (sample * tokens + at) * (3 * dim) + column
        store(grad_qkv, grad_start, dq, HEAD_DIM, D0, D1, live)
        store(grad_qkv + dim, grad_start, dk, HEAD_DIM, D0, D1, live)
        store(grad_qkv + 2 * dim, grad_start, dv, HEAD_DIM, D0, D1, live)
        if table_partial is not None:
            grad_logits += ds
        if q_partial is not None:
            q_sum = add(q_sum, dq)
        if v_partial is not None:
            v_sum = add(v_sum, do)

    if table_partial is not None:
        size: tl.constexpr = (2 * (BLOCK_M // ROW) - 1) * ROW * ROW
        place = head.to(tl.int64) * (tl.num_programs(0) // heads) + part
        if WINDOWS > 1:
            grad_logits = tl.sum(grad_logits, axis=0)
        fold(grad_logits, table_partial + place * size, ROW)
    row_start = part.to(tl.int64) * dim + column
    if q_partial is not None:
        store_sum(q_partial, row_start, q_sum, HEAD_DIM, D0, D1)
    if v_partial is not None:
        store_sum(v_partial, row_start, v_sum, HEAD_DIM, D0, D1)
