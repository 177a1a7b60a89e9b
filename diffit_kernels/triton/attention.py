"""Launches the kernels of windowed attention: small windows whole, large ones in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs

from diffit_kernels.layout import channels_contiguous, equally_spaced
from diffit_kernels.problem import WindowAttentionProblem
from diffit_kernels.triton import attention_large as large
from diffit_kernels.triton import attention_small as small
from diffit_kernels.triton import attention_tiles as tiles
from diffit_kernels.triton.configs import Config, Configs, Entry, is_listed, nearest
from diffit_kernels.triton.launch import launch
from diffit_kernels.triton.sizes import cdiv, next_power_of_2

# Slots of a window, and bytes of a head's part of q, up to which a program holds a window whole:
# 64 x 64 logits fit in registers, and so do the sums of two tiles besides in the backward pass.
_SMALL = 64
_SMALL_BYTES = 8192

# Tokens of a window and head width from which plain PyTorch was seen to use TF32 where it is
# allowed; in smaller products it may not.
_TF32_TOKENS, _TF32_WIDTH = 64, 32
# Head width up to which parts of float32 fit in registers.
_WIDEST_IN_PARTS = 72
_IN_PARTS = "_in_parts"

# Programs that keep any GPU busy, where work may be cut at will. The same on every device, so that
# the sums are.
_PROGRAMS = 1024

# Numbers that a program of ``add_partials`` reads at once; parts and columns, of ``add_rows``.
_PARTIALS = 4096
_ROWS_PARTS, _ROWS_BLOCK = 8, 128


def window_attention(
    problem: WindowAttentionProblem,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    scale: float,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones."""
    qkv, (q_row, v_row, row_stride) = channels_contiguous(qkv), equally_spaced(q_row, v_row)
    out = qkv.new_empty(problem.batch, problem.tokens, problem.dim)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.tokens, dtype=torch.float32)
    windows = problem.batch * problem.windows
    tensors = (qkv, _scaled_table(rel_pos_table), q_row, v_row, out, lse)
    sizes = (
        *(qkv.stride(0), qkv.stride(1), row_stride),
        *(problem.tokens, problem.grid_size[1], problem.num_heads),
    )
    block = _block(problem.window_tokens)
    if block <= _SMALL and block * problem.head_dim * qkv.itemsize <= _SMALL_BYTES:
        config = _config("small_forward", problem.window_tokens, problem, qkv, configs)
        programs = problem.num_heads * cdiv(windows, config["WINDOWS"])
        config["BLOCK_M"] = block
        launch(small.forward, (programs,), tensors, (*sizes, windows, scale), config)
    else:
        config = _config("large_forward", problem.window_tokens, problem, qkv, configs)
        programs = problem.num_heads * windows * cdiv(problem.window_tokens, config["BLOCK_M"])
        launch(large.forward, (programs,), tensors, (*sizes, scale), config)
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
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones."""
    qkv, grad_out = channels_contiguous(qkv), channels_contiguous(grad_out)
    q_row, v_row, row_stride = equally_spaced(q_row, v_row)
    strides = (grad_out.stride(0), grad_out.stride(1), qkv.stride(0), qkv.stride(1), row_stride)
    grad_qkv = qkv.new_empty(problem.batch, problem.tokens, 3 * problem.dim)
    slots = problem.window_size[0] * _row(problem)
    size = slots * problem.head_dim * qkv.itemsize
    if slots <= _SMALL and size <= _SMALL_BYTES:
        table = _scaled_table(rel_pos_table)
        sums = _small_backward(
            *(problem, grad_out, qkv, table, q_row, v_row, grad_qkv),
            *(strides, scale, configs),
        )
    else:
        table = None if rel_pos_table is None else rel_pos_table.t().contiguous()
        sums = _large_backward(
            *(problem, grad_out, qkv, table, q_row, v_row, lse.contiguous(), grad_qkv),
            *(strides, scale, configs),
        )
    return grad_qkv, *sums


Sums = tuple[Tensor | None, Tensor | None, Tensor | None]


def _small_backward(
    problem: WindowAttentionProblem,
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    grad_qkv: Tensor,
    strides: tuple[int, ...],
    scale: float,
    configs: Configs | None,
) -> Sums:
    """Fill ``grad_qkv``; gradients of the table and the rows."""
    batch, heads, row = problem.batch, problem.num_heads, _row(problem)
    block = _block(problem.window_size[0] * row)
    config = _config("small_backward", block, problem, qkv, configs)
    groups = cdiv(problem.windows, config["WINDOWS"])
    steps = cdiv(groups, cdiv(_PROGRAMS, batch * heads))
    splits = cdiv(groups, steps)
    table_partial = _table_partial(table, batch * splits, 1, 1, block // row, block // row, row)
    q_partial, v_partial = (_row_partial(problem, x, splits) for x in (q_row, v_row))
    launch(
        small.backward,
        (batch * splits * heads,),
        (grad_out, qkv, table, q_row, grad_qkv, table_partial, q_partial, v_partial),
        (*strides, problem.tokens, problem.grid_size[1], heads, splits, steps, scale),
        config | {"ROW": row, "BLOCK_M": block},
    )
    grad_table = _grad_table(problem, table_partial, block // row, block // row)
    return grad_table, *_row_sums(problem, q_partial, v_partial, qkv)


def _large_backward(
    problem: WindowAttentionProblem,
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    lse: Tensor,
    grad_qkv: Tensor,
    strides: tuple[int, ...],
    scale: float,
    configs: Configs | None,
) -> Sums:
    """Fill ``grad_qkv``; gradients of the table and the rows."""
    heads, row, windows = problem.num_heads, _row(problem), problem.batch * problem.windows
    sizes = (*strides, problem.tokens, problem.grid_size[1], heads)
    weight, delta = torch.empty_like(lse), torch.empty_like(lse)

    config = _config("large_backward_q", problem.window_tokens, problem, qkv, configs)
    q_tiles = cdiv(problem.window_tokens, config["BLOCK_M"])
    parts = problem.windows * q_tiles
    q_partial, v_partial = (_row_partial(problem, x, parts) for x in (q_row, v_row))
    launch(
        large.backward_q,
        (q_tiles * heads * windows,),
        (grad_out, qkv, table, q_row, lse, grad_qkv, weight, delta, q_partial, v_partial),
        (*sizes, scale),
        config,
    )

    saved = (grad_out, qkv, table, q_row, lse, weight, delta)
    config = _config("large_backward_kv", problem.window_tokens, problem, qkv, configs)
    k_tiles = cdiv(problem.window_tokens, config["BLOCK_N"])
    programs = k_tiles * heads * windows
    launch(large.backward_kv, (programs,), (*saved, grad_qkv), (*sizes, scale), config)

    grad_table = None
    if table is not None:
        slots = problem.window_size[0] * row
        config = _config("large_backward_table", slots, problem, qkv, configs)
        block_m, block_n = (max(config.pop(name), row) for name in ("BLOCK_M", "BLOCK_N"))
        q_tiles, k_tiles = cdiv(slots, block_m), cdiv(slots, block_n)
        splits = min(windows, cdiv(_PROGRAMS, heads * q_tiles * k_tiles))
        rows = (block_m // row, block_n // row)
        partial = _table_partial(table, splits, q_tiles, k_tiles, *rows, row)
        launch(
            large.backward_table,
            (heads * splits * q_tiles * k_tiles,),
            (*saved, partial),
            (*sizes, windows, splits, scale),
            config | {"ROW": row, "BLOCK_M": block_m, "BLOCK_N": block_n},
        )
        grad_table = _grad_table(problem, partial, *rows)
    return grad_table, *_row_sums(problem, q_partial, v_partial, qkv)


def _config(
    kernel: str, slots: int, problem: WindowAttentionProblem, qkv: Tensor, configs: Configs | None
) -> dict[str, Any]:
    """What a launch passes by name: the tuned parameters and those of the problem."""
    (wh, ww), width = problem.window_size, problem.head_dim
    d0 = max(16, 1 << (width.bit_length() - 1))
    d1 = max(16, next_power_of_2(width - d0)) if width > d0 else 0
    if d0 == d1:
        d0, d1 = 2 * d0, 0
    precision = _precision(kernel, problem, qkv.device)
    name = _entry_name(kernel, precision)
    if configs is None:
        entry = nearest(
            name, qkv.device, problem.dtype.itemsize, window_tokens=slots, head_dim=width
        )
        parameters = _fitting(entry, slots, width)
    else:
        parameters = configs[name]
    return {
        **parameters,
        "WH": wh,
        "WW": ww,
        "HEAD_DIM": width,
        "D0": d0,
        "D1": d1,
        "PRECISION": precision,
        "enable_fp_fusion": True,
    }


def named(kernel: str, problem: WindowAttentionProblem, device: torch.device) -> str:
    """What tables call it: where it cuts numbers in parts it has parameters of its own."""
    return _entry_name(kernel, _precision(kernel, problem, device))


def _entry_name(kernel: str, precision: str) -> str:
    return kernel if precision == "ieee" else kernel + _IN_PARTS


def _precision(kernel: str, problem: WindowAttentionProblem, device: torch.device) -> str:
    """How Triton multiplies: float32 in parts of bfloat16, on tensor cores, if a table says how.

    Two parts of a number, by three products, have 16 of its bits where TF32 has 11; they take its
    place, which came out wrong on an H200 (Triton 3.6) where heads are wider than 32. Three parts,
    by six products, have all 24, but spill registers in the backward passes.
    """
    width = problem.head_dim
    if problem.dtype != torch.float32 or width > _WIDEST_IN_PARTS or knobs.runtime.interpret:
        return "ieee"
    if not is_listed(kernel + _IN_PARTS, device):
        return "ieee"
    if (
        torch.backends.cuda.matmul.fp32_precision == "tf32"
        and torch.version.hip is None  # there PyTorch may multiply in float32 all the same
        and problem.window_tokens >= _TF32_TOKENS
        and width >= _TF32_WIDTH
    ):
        return "bf16x3"
    return "bf16x6" if kernel.endswith("forward") else "ieee"


def _fitting(entry: Entry, slots: int, width: int) -> Config:
    """Its parameters, for so few windows that a program holds no more than the entry's does."""
    parameters: Config = entry["parameters"]
    if "WINDOWS" not in parameters:
        return parameters
    size = _block(slots) * width
    held = parameters["WINDOWS"] * _block(entry["window_tokens"]) * entry["head_dim"]
    windows = 1 << (max(1, held // size).bit_length() - 1)
    return {**parameters, "WINDOWS": min(windows, parameters["WINDOWS"])}


def _block(slots: int) -> int:
    """Slots of a tile that holds a whole window."""
    return max(16, next_power_of_2(slots))


def _row(problem: WindowAttentionProblem) -> int:
    """Slots of a row of the window where rows must be whole."""
    return next_power_of_2(problem.window_size[1])


def _scaled_table(table: Tensor | None) -> Tensor | None:
    """(heads, rows), for logits in base 2."""
    if table is None:
        return None
    return torch.mul(table.t(), tiles.LOG2E.value, out=table.new_empty(table.t().shape))


def _table_partial(
    table: Tensor | None, splits: int, q_tiles: int, k_tiles: int, ry: int, ky: int, row: int
) -> Tensor | None:
    """What ``fold`` writes to, for tiles of ``ry`` rows of queries and ``ky`` rows of keys."""
    if table is None:
        return None
    return table.new_empty(table.shape[0], splits, q_tiles, k_tiles, ry + ky - 1, row, row)


def _grad_table(
    problem: WindowAttentionProblem, partial: Tensor | None, ry: int, ky: int
) -> Tensor | None:
    if partial is None:
        return None
    heads, splits, q_tiles, k_tiles = partial.shape[:4]
    (wh, ww), row = problem.window_size, _row(problem)
    grad_table = partial.new_empty(problem.table_rows, heads)
    constants = {"Q_TILES": q_tiles, "K_TILES": k_tiles, "RY": ry, "KY": ky, "WH": wh, "WW": ww}
    constants |= {"ROW": row, "BLOCK": max(1, _PARTIALS // (2 * row * row))}
    launch(
        tiles.add_partials,
        (2 * wh - 1, heads),
        (partial, grad_table),
        (heads, splits),
        constants | {"enable_fp_fusion": True},
    )
    return grad_table


def _row_partial(problem: WindowAttentionProblem, row: Tensor | None, parts: int) -> Tensor | None:
    """Sums over parts of the tokens of a sample."""
    if row is None:
        return None
    return row.new_empty(problem.batch, parts, problem.dim, dtype=torch.float32)


def _row_sums(
    problem: WindowAttentionProblem, q_partial: Tensor | None, v_partial: Tensor | None, qkv: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows from what ``_row_partial`` made room for."""
    parts = [partial.shape[1] for partial in (q_partial, v_partial) if partial is not None]
    if not parts:
        return None, None
    grad_q_row, grad_v_row = (
        None if partial is None else qkv.new_empty(problem.batch, problem.dim)
        for partial in (q_partial, v_partial)
    )
    launch(
        tiles.add_rows,
        (problem.batch, cdiv(problem.dim, _ROWS_BLOCK)),
        (q_partial, v_partial, grad_q_row, grad_v_row),
        (parts[0], problem.dim),
        {"PARTS": _ROWS_PARTS, "BLOCK": _ROWS_BLOCK, "enable_fp_fusion": True},
    )
    return grad_q_row, grad_v_row
