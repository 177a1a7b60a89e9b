"""Windowed attention with a relative position bias, as its equations."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffit_kernels.problem import WindowAttentionProblem


@lru_cache(maxsize=32)
def _index(wh: int, ww: int, device: torch.device | str) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(wh, device=device), torch.arange(ww, device=device), indexing="ij"
    )
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None, :] + wh - 1
    dx = x[:, None] - x[None, :] + ww - 1
    return dy * (2 * ww - 1) + dx


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """Row of the bias table for each (query, key) of a window: (M, M), int64, on the CPU.

    ``index(i, j) = (yi - yj + wh - 1) (2 ww - 1) + (xi - xj + ww - 1)``
    """
    return _index(*window_size, "cpu").clone()


def partition(problem: WindowAttentionProblem, x: Tensor, parts: int) -> Tensor:
    """(B, L, parts * C) -> (parts, B, windows, heads, M, d)."""
    (height, width), (wh, ww) = problem.grid_size, problem.window_size
    x = x.reshape(-1, height // wh, wh, width // ww, ww, parts, problem.num_heads, problem.head_dim)
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(
        parts, -1, problem.windows, problem.num_heads, problem.window_tokens, problem.head_dim
    )


def unpartition(problem: WindowAttentionProblem, x: Tensor) -> Tensor:
    """(parts, B, windows, heads, M, d) -> (B, L, parts * C), contiguous."""
    (height, width), (wh, ww) = problem.grid_size, problem.window_size
    parts = x.shape[0]
    x = x.reshape(parts, -1, height // wh, width // ww, problem.num_heads, wh, ww, problem.head_dim)
    x = x.permute(1, 2, 5, 3, 6, 0, 4, 7)
    return x.reshape(-1, problem.tokens, parts * problem.dim).contiguous()


def _head_row(problem: WindowAttentionProblem, row: Tensor) -> Tensor:
    """(B, C) -> (B, 1, heads, 1, d)."""
    return row.reshape(-1, 1, problem.num_heads, 1, problem.head_dim)


def _logits(
    problem: WindowAttentionProblem,
    q: Tensor,
    k: Tensor,
    rel_pos_table: Tensor | None,
    scale: float,
) -> Tensor:
    logits = (q @ k.transpose(-1, -2)) * scale
    if rel_pos_table is not None:
        index = _index(*problem.window_size, rel_pos_table.device)
        bias = rel_pos_table[index.flatten()]
        bias = bias.reshape(problem.window_tokens, problem.window_tokens, problem.num_heads)
        logits = logits + bias.permute(2, 0, 1).to(logits.dtype)
    return logits


def window_attention(
    problem: WindowAttentionProblem,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``softmax((q + q_row) k^T * scale + B) (v + v_row)`` in each window, and its log-sum-exp.

    Returns ``out`` (B, L, C) in the dtype of ``qkv`` and ``lse`` (B, heads, L) in the dtype of
    the table: the logarithm of the softmax denominator of each query.
    """
    q, k, v = partition(problem, qkv, 3)
    if q_row is not None:
        q = q + _head_row(problem, q_row)
    if v_row is not None:
        v = v + _head_row(problem, v_row)
    logits = _logits(problem, q, k, rel_pos_table, scale)
    out = logits.softmax(dim=-1) @ v
    lse = logits.to(problem.table_dtype).logsumexp(dim=-1, keepdim=True)
    return unpartition(problem, out[None]), _unpartition_rows(problem, lse)


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
    """Gradients of qkv, the table, q_row and v_row (None where there is none).

    With ``P = softmax(logits)`` and ``dO`` the gradient of the output::

        dV = P^T dO          dP = dO V^T          dS = P (dP - rowsum(P dP))
        dQ = dS K * scale    dK = dS^T Q * scale  dtable[r] = sum of dS over index(i, j) = r
        dq_row = sum of dQ over tokens            dv_row = sum of dV over tokens

    ``v_row`` shifts every dP of a row by the same number, which dS does not see.
    """
    q, k, v = partition(problem, qkv, 3)
    (grad,) = partition(problem, grad_out, 1)
    if q_row is not None:
        q = q + _head_row(problem, q_row)
    prob = _logits(problem, q, k, rel_pos_table, scale).softmax(dim=-1)

    grad_v = prob.transpose(-1, -2) @ grad
    grad_prob = grad @ v.transpose(-1, -2)
    # P (dP - rowsum(P dP)), rounded once
    grad_logits = torch.ops.aten._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
    grad_q = (grad_logits @ k) * scale
    grad_k = (grad_logits.transpose(-1, -2) @ q) * scale
    grad_qkv = unpartition(problem, torch.stack((grad_q, grad_k, grad_v)))

    grad_table = None
    if rel_pos_table is not None:
        summed = grad_logits.to(problem.table_dtype).sum(dim=(0, 1))
        summed = summed.unflatten(-1, problem.window_size).unflatten(-3, problem.window_size)
        by_x = _sum_diagonals(summed.transpose(-2, -3))  # (heads, yi, yj, dx)
        by_y = _sum_diagonals(by_x.movedim(-1, 1))  # (heads, dx, dy)
        grad_table = by_y.permute(2, 1, 0).reshape(rel_pos_table.shape)
    grad_q_row = grad_q.sum(dim=(1, 3)).flatten(1) if q_row is not None else None
    grad_v_row = grad_v.sum(dim=(1, 3)).flatten(1) if v_row is not None else None
    return grad_qkv, grad_table, grad_q_row, grad_v_row


def _sum_diagonals(x: Tensor) -> Tensor:
    """(..., n, n) -> (..., 2 n - 1): entry i - j + n - 1 is the sum of all x[i, j].

    Deterministic on every device. Padded to 2 n columns and read as 2 n - 1, each row starts one
    column further right than the one before.
    """
    n = x.shape[-1]
    skewed = pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return skewed.unflatten(-1, (n, 2 * n - 1)).sum(dim=-2)


def _unpartition_rows(problem: WindowAttentionProblem, rows: Tensor) -> Tensor:
    """(B, windows, heads, M, 1) -> (B, heads, L), contiguous."""
    (height, width), (wh, ww) = problem.grid_size, problem.window_size
    rows = rows.reshape(-1, height // wh, width // ww, problem.num_heads, wh, ww)
    rows = rows.permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, problem.num_heads, problem.tokens).contiguous()
