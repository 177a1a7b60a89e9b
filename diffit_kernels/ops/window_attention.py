"""``torch.ops.diffit.window_attention``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffit_kernels.dispatch import select
from diffit_kernels.ops import autocast
from diffit_kernels.ops.registration import operator
from diffit_kernels.problem import (
    WindowAttentionProblem,
    require_floating,
    require_like,
    require_shape,
    require_tensor,
)

_INTEGER = (int, torch.SymInt)
_NUMBER_OR_NONE = (int, float, type(None))
_SEQUENCE = (tuple, Sequence)  # a tuple is found out at once


def window_attention(
    qkv: Tensor,
    rel_pos_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    grid_size: tuple[int, int] | None = None,
    q_row: Tensor | None = None,
    v_row: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with a relative position bias inside the windows of a grid.

    ``out = softmax((q + q_row) k^T * scale + B) (v + v_row)`` in each window, with
    ``B[h, i, j] = rel_pos_table[index(i, j), h]`` and ``index(i, j) =
    (yi - yj + wh - 1) (2 ww - 1) + (xi - xj + ww - 1)``. The rows carry what is constant over the
    tokens of a sample: the bias of the projection and the time token (DiffiT, section 3.2). A row
    for k would change nothing, since softmax does not see it.

    Args:
        qkv: (B, L, 3C), packed on the last dimension as (3, heads, head_dim); float32, bfloat16,
            float16 or float64. Tokens are in row-major order of the grid.
        rel_pos_table: ((2 wh - 1) (2 ww - 1), heads); computed with in float32 (float64 for
            float64 inputs). None: no bias.
        num_heads: heads; C = num_heads * head_dim.
        window_size: tokens of a window, (wh, ww) or one number for both; windows tile the grid.
        grid_size: (H, W) with H * W = L. Default: the window if it has L tokens, else a square.
        q_row: (B, C), added to every query of a sample.
        v_row: (B, C), added to every value of a sample.
        scale: factor of the logits. Default: head_dim ** -0.5.

    Returns:
        (B, L, C), contiguous, in the dtype of ``qkv``.

    Raises:
        TypeError: a dtype or device that is not supported or differs from that of ``qkv``.
        ValueError: a shape, window, grid or scale that does not fit.
        RuntimeError: the backend chosen by ``use_backend`` cannot run this call.
    """
    require_tensor("qkv", qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv: expected (B, L, 3C), got shape {tuple(qkv.shape)}")
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an integer, got {num_heads!r}")
    if not isinstance(scale, _NUMBER_OR_NONE):
        raise TypeError(f"scale: expected a number or None, got {scale!r}")
    window = as_pair("window_size", window_size)
    grid = as_grid(grid_size, qkv.shape[1], window)
    if scale is None:
        head_dim = qkv.shape[-1] // (3 * max(num_heads, 1))
        scale = max(head_dim, 1) ** -0.5
    if rel_pos_table is not None:
        rel_pos_table = as_table(rel_pos_table, qkv.dtype)
    out, _ = _forward(qkv, rel_pos_table, q_row, v_row, num_heads, window, grid, float(scale))
    return out


def as_pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    if isinstance(size, _INTEGER):
        return size, size
    if not isinstance(size, _SEQUENCE) or not all(isinstance(n, _INTEGER) for n in size):
        raise TypeError(f"{name}: expected one or two integers, got {size}")
    if len(size) != 2:
        raise ValueError(f"{name}: expected one or two integers, got {size}")
    return size[0], size[1]


def as_table(rel_pos_table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table as it is computed with where q, k and v have this dtype."""
    require_floating("rel_pos_table", rel_pos_table)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return rel_pos_table if rel_pos_table.dtype == dtype else rel_pos_table.to(dtype)


def as_grid(
    grid_size: tuple[int, int] | None, tokens: int, window: tuple[int, int]
) -> tuple[int, int]:
    """The grid; where none is given, the one that is meant: the window itself, else a square."""
    if grid_size is not None:
        return as_pair("grid_size", grid_size)
    if window[0] * window[1] == tokens:
        return window
    side = int(math.sqrt(tokens))  # not isqrt, which compilers cannot trace
    if side * side != tokens:
        raise ValueError(
            f"grid_size: L = {tokens} is neither the window {window} nor a square; "
            "pass grid_size=(height, width)"
        )
    return side, side


@operator("window_attention")
def _forward(
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    problem = WindowAttentionProblem.from_tensors(
        qkv, rel_pos_table, q_row, v_row, num_heads, window_size, grid_size, scale
    )
    return select(problem).window_attention(problem, qkv, rel_pos_table, q_row, v_row, scale)


@_forward.register_fake
def _forward_fake(
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    problem = WindowAttentionProblem.from_tensors(
        qkv, rel_pos_table, q_row, v_row, num_heads, window_size, grid_size, scale
    )
    return (
        qkv.new_empty(problem.batch, problem.tokens, problem.dim),
        qkv.new_empty(problem.batch, problem.num_heads, problem.tokens, dtype=problem.table_dtype),
    )


@operator("window_attention_backward")
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, table, q_row, v_row; an absent input's gradient has no elements."""
    problem = WindowAttentionProblem.from_tensors(
        qkv, rel_pos_table, q_row, v_row, num_heads, window_size, grid_size, scale
    )
    require_like("grad_out", grad_out, qkv.dtype, qkv)
    require_shape("grad_out", grad_out, (problem.batch, problem.tokens, problem.dim))
    require_like("lse", lse, problem.table_dtype, qkv)
    require_shape("lse", lse, (problem.batch, problem.num_heads, problem.tokens))
    with autocast.disabled(qkv):
        grad_qkv, grad_table, grad_q_row, grad_v_row = select(problem).window_attention_backward(
            problem, grad_out, qkv, rel_pos_table, q_row, v_row, lse, scale
        )
    return (
        grad_qkv,
        qkv.new_empty(0, dtype=problem.table_dtype) if grad_table is None else grad_table,
        qkv.new_empty(0) if grad_q_row is None else grad_q_row,
        qkv.new_empty(0) if grad_v_row is None else grad_v_row,
    )


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        qkv.new_empty(qkv.shape),
        lse.new_empty(0 if rel_pos_table is None else rel_pos_table.shape),
        qkv.new_empty(0 if q_row is None else q_row.shape),
        qkv.new_empty(0 if v_row is None else v_row.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.arguments = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made for what has no gradient


def _autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    *inputs, lse = ctx.saved_tensors
    grads = _backward(grad_out, *inputs, lse, *ctx.arguments)
    present = (None if tensor is None else grad for tensor, grad in zip(inputs, grads, strict=True))
    return *present, *(None for _ in ctx.arguments)


_forward.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
_forward.register_autocast(keep=(1,))


@register_flop_formula(torch.ops.diffit.window_attention)
def attention_flops(
    qkv: Any, table: Any, q_row: Any, v_row: Any, heads: Any, window: Any, *_: Any, **__: Any
) -> int:
    """Of the products for logits and values, from the shapes of the arguments."""
    batch, tokens, channels = qkv
    return 4 * batch * tokens * math.prod(window) * (channels // 3)


@register_flop_formula(torch.ops.diffit.window_attention_backward)
def _backward_flops(
    grad_out: Any,
    qkv: Any,
    table: Any,
    q_row: Any,
    v_row: Any,
    lse: Any,
    *sizes: Any,
    **_: Any,
) -> int:
    """The logits again, and the gradients of values, probabilities, q and k."""
    return attention_flops(qkv, table, q_row, v_row, *sizes) * 5 // 2
