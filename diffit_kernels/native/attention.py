"""Windowed attention, as the C++ kernels take it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffit_kernels.layout import channels_contiguous, equally_spaced
from diffit_kernels.native import library
from diffit_kernels.native.library import DTYPES, optional, pointer
from diffit_kernels.problem import WindowAttentionProblem


def supports_window(head_dim: int, window_size: tuple[int, int]) -> str | None:
    """Why they cannot run attention in these windows, or None."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"head width {head_dim} is not a multiple of 8 from 8 to 128"
    if max(window_size) > 32:
        return f"window {window_size} is larger than 32 x 32"
    return None


def shape_of(problem: WindowAttentionProblem) -> tuple[int, ...]:
    """Sizes, dtype and threads, in the order of ``csrc/bindings.cpp``."""
    return (
        problem.batch,
        *problem.grid_size,
        *problem.window_size,
        problem.num_heads,
        problem.head_dim,
        DTYPES[problem.dtype],
        torch.get_num_threads(),
    )


def window_attention(
    problem: WindowAttentionProblem,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    qkv, rel_pos_table = channels_contiguous(qkv), optional(rel_pos_table)
    q_row, v_row, row_stride = equally_spaced(q_row, v_row)
    out = qkv.new_empty(problem.batch, problem.tokens, problem.dim)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.tokens, dtype=problem.table_dtype)
    library.kernels.window_attention(
        shape_of(problem),
        scale,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        pointer(rel_pos_table),
        pointer(q_row),
        pointer(v_row),
        row_stride,
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def window_attention_backward(
    problem: WindowAttentionProblem,
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    qkv, grad_out = channels_contiguous(qkv), channels_contiguous(grad_out)
    rel_pos_table = optional(rel_pos_table)
    q_row, _, row_stride = equally_spaced(q_row, None)
    grad_qkv = qkv.new_empty(problem.batch, problem.tokens, 3 * problem.dim)
    grad_table = None if rel_pos_table is None else torch.empty_like(rel_pos_table)
    grad_q_row, grad_v_row = (
        None if row is None else row.new_empty(problem.batch, problem.dim, dtype=torch.float32)
        for row in (q_row, v_row)
    )
    library.kernels.window_attention_backward(
        shape_of(problem),
        scale,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        pointer(rel_pos_table),
        pointer(q_row),
        row_stride,
        grad_out.data_ptr(),
        grad_out.stride(0),
        grad_out.stride(1),
        grad_qkv.data_ptr(),
        pointer(grad_table),
        pointer(grad_q_row),
        pointer(grad_v_row),
    )
    grad_q_row, grad_v_row = (
        None if grad is None else grad.to(problem.dtype) for grad in (grad_q_row, grad_v_row)
    )
    return grad_qkv, grad_table, grad_q_row, grad_v_row
