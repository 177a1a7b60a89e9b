"""The compiled CPU kernels of ``csrc``, as a backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffit_kernels import products
from diffit_kernels.layout import channels_contiguous, equally_spaced
from diffit_kernels.problem import (
    AddLayerNormProblem,
    MLPProblem,
    Problem,
    WindowAttentionProblem,
)

# torch is imported first: the extension then shares its OpenMP pool.
_module: Any = None
_import_error: str | None = None
try:
    _module = import_module("diffit_kernels._native")
except ImportError as error:
    _import_error = (
        f"the compiled module could not be loaded ({error}); "
        "reinstall with a C++17 compiler on the path"
    )

# About how much of the hidden layer of an MLP exists at once in inference: little enough to stay in
# cache between the products, and for the C library to reuse the memory instead of returning it to
# the system. It grows with the weights, which the products read anew for each part.
_HIDDEN_BYTES = 8 * 2**20

# A factor of all features that the kernels of linear layers take.
_LINEAR_BLOCK = 32
# The least rows that they take, and the largest weight, by dtype: in float32 rows make up for
# packing the weight, whose three parts are to stay near.
_LEAST_ROWS = {torch.float32: 512, torch.bfloat16: 32}
_LARGEST_WEIGHT = {torch.float32: 2**20, torch.bfloat16: math.inf}

# The most time tokens that a block multiplies by a kernel of its own.
_FEW_ROWS = 16

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable() -> str | None:
    """Why the compiled kernels cannot run in this process, or None."""
    return _import_error


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this build and this processor have, slowest first."""
    return () if _module is None else tuple(_module.instruction_sets())


def instruction_set() -> str | None:
    """The instruction set in use, or None without the compiled kernels."""
    return None if _module is None else _module.instruction_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels on one of ``instruction_sets()`` inside the ``with`` block.

    Raises:
        ValueError: it is not one of them.
    """
    if name not in instruction_sets():
        raise ValueError(f"name: expected one of {instruction_sets()}, got {name!r}")
    previous = instruction_set()
    _module.set_instruction_set(name)
    try:
        yield
    finally:
        _module.set_instruction_set(previous)


def supports(problem: Problem) -> str | None:
    """Why the compiled kernels cannot run this problem, or None."""
    if problem.device_type != "cpu":
        return f"the tensors are on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not one of float32, bfloat16, float16"
    if isinstance(problem, WindowAttentionProblem):
        return supports_window(problem.head_dim, problem.window_size)
    return None


def supports_window(head_dim: int, window_size: tuple[int, int]) -> str | None:
    """Why they cannot run attention in these windows, or None."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"head width {head_dim} is not a multiple of 8 from 8 to 128"
    if max(window_size) > 32:
        return f"window {window_size} is larger than 32 x 32"
    return None


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(problem: WindowAttentionProblem) -> tuple[int, ...]:
    return (
        problem.batch,
        *problem.grid_size,
        *problem.window_size,
        problem.num_heads,
        problem.head_dim,
        _DTYPES[problem.dtype],
        torch.get_num_threads(),
    )


def has_product(dtype: torch.dtype, rows: int, *features: int) -> bool:
    """Whether there is a kernel of linear layers, faster than PyTorch's, for these sizes."""
    if rows < _LEAST_ROWS.get(dtype, math.inf) or not _module.has_linear(_DTYPES[dtype]):
        return False
    if not _are_whole_blocks(features):
        return False
    return all(n * k <= _LARGEST_WEIGHT[dtype] for n, k in pairwise(features))


def _are_whole_blocks(sizes: tuple[int, ...]) -> bool:
    return all(size > 0 and size % _LINEAR_BLOCK == 0 for size in sizes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (rows, K), (N, K), (N,) -> (rows, N)."""
    if has_product(x.dtype, x.shape[0], *weight.shape):
        return _linear(x, weight.contiguous(), bias, weight.shape[0], transposed=False)
    return products.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, in their dtype."""
    if has_product(a.dtype, a.shape[0], *b.shape):
        return _linear(a, b.contiguous(), None, b.shape[1], transposed=True)
    return products.mm(a, b)


def has_weight_gradient(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether there is a kernel of the gradient of a weight for so many rows and features."""
    if dtype not in _LEAST_ROWS or not _module.has_linear(_DTYPES[dtype]):
        return False
    return _are_whole_blocks(sizes)


def weight_gradient(grad_y: Tensor, x: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
    """``grad_y^T x``, and unless without ``bias`` the sum of grad_y's rows.

    (rows, N), (rows, K) -> (N, K), (N,)
    """
    (rows, columns), features = grad_y.shape, x.shape[1]
    if not has_weight_gradient(x.dtype, rows, columns, features):
        return products.weight_gradient(grad_y, x, bias)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_weight = x.new_empty(columns, features)
    grad_bias = torch.empty(columns, dtype=torch.float32) if bias else None
    _module.weight_gradient(
        (rows, features, columns, _DTYPES[x.dtype], torch.get_num_threads()),
        grad_y.data_ptr(),
        x.data_ptr(),
        grad_weight.data_ptr(),
        _pointer(grad_bias),
    )
    return (grad_weight,) if grad_bias is None else (grad_weight, grad_bias.to(x.dtype))


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: int, transposed: bool
) -> Tensor:
    """With ``transposed`` the weight is (K, N)."""
    x, bias = x.contiguous(), _optional(bias)
    y = x.new_empty(x.shape[0], columns)
    _module.linear(
        (*x.shape, columns, _DTYPES[x.dtype], transposed, torch.get_num_threads()),
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        y.data_ptr(),
    )
    return y


def window_attention(
    problem: WindowAttentionProblem,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    qkv, rel_pos_table = channels_contiguous(qkv), _optional(rel_pos_table)
    q_row, v_row, row_stride = equally_spaced(q_row, v_row)
    out = qkv.new_empty(problem.batch, problem.tokens, problem.dim)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.tokens, dtype=problem.table_dtype)
    _module.window_attention(
        _shape(problem),
        scale,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        _pointer(rel_pos_table),
        _pointer(q_row),
        _pointer(v_row),
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
    rel_pos_table = _optional(rel_pos_table)
    q_row, _, row_stride = equally_spaced(q_row, None)
    grad_qkv = qkv.new_empty(problem.batch, problem.tokens, 3 * problem.dim)
    grad_table = None if rel_pos_table is None else torch.empty_like(rel_pos_table)
    grad_q_row, grad_v_row = (
        None if row is None else row.new_empty(problem.batch, problem.dim, dtype=torch.float32)
        for row in (q_row, v_row)
    )
    _module.window_attention_backward(
        _shape(problem),
        scale,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        _pointer(rel_pos_table),
        _pointer(q_row),
        row_stride,
        grad_out.data_ptr(),
        grad_out.stride(0),
        grad_out.stride(1),
        grad_qkv.data_ptr(),
        _pointer(grad_table),
        _pointer(grad_q_row),
        _pointer(grad_v_row),
    )
    grad_q_row, grad_v_row = (
        None if grad is None else grad.to(problem.dtype) for grad in (grad_q_row, grad_v_row)
    )
    return grad_qkv, grad_table, grad_q_row, grad_v_row


def mlp(
    problem: MLPProblem,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    save_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the reference, in one kernel if there is one for these sizes."""
    x_rows = x.reshape(problem.rows, -1)
    if residual is not None:
        residual = residual.reshape(problem.rows, -1)
    y = (x if residual is None else residual).new_empty(problem.rows, problem.out_features)
    features = (problem.in_features, problem.hidden_features, problem.out_features)
    inputs = (x_rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    fused = has_product(problem.dtype, problem.rows, *features)
    hidden = (_fused_mlp if fused else _mlp_in_parts)(problem, y, save_hidden, *inputs)
    return y.reshape(*x.shape[:-1], problem.out_features), hidden


def _fused_mlp(
    problem: MLPProblem, y: Tensor, save_hidden: bool, x: Tensor, *others: Tensor | None
) -> Tensor | None:
    """Writes y, and returns the hidden layer if it is saved."""
    hidden = x.new_empty(problem.rows, problem.hidden_features) if save_hidden else None
    contiguous = [_optional(tensor) for tensor in (x, *others)]
    _module.mlp(
        (
            problem.rows,
            problem.in_features,
            problem.hidden_features,
            problem.out_features,
            _DTYPES[problem.dtype],
            _DTYPES[y.dtype],
            torch.get_num_threads(),
        ),
        *map(_pointer, contiguous),
        _pointer(hidden),
        y.data_ptr(),
    )
    return hidden


def _mlp_in_parts(
    problem: MLPProblem,
    y: Tensor,
    save_hidden: bool,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
) -> Tensor | None:
    """The same; GELU runs in place on a part of the hidden layer where none is saved.

    The residual is added to a part of the result that is still in cache, and not as the start of
    the second product: residual + bias, rounded, would have the error of the larger of the two.
    """
    bias = fc1_bias.contiguous()
    step = problem.rows
    if not save_hidden:
        part_bytes = max(_HIDDEN_BYTES, 2 * fc1_weight.nbytes)
        step = min(step, max(1, part_bytes // (problem.hidden_features * x.itemsize)))
    hidden = x.new_empty(step, problem.hidden_features)
    activation = torch.empty_like(hidden) if save_hidden else hidden
    for start in range(0, problem.rows, step):
        part = slice(start, start + step)
        rows = min(step, problem.rows - start)
        products.linear(x[part], fc1_weight, out=hidden[:rows])
        _module.bias_gelu(
            (rows, problem.hidden_features, _DTYPES[problem.dtype], torch.get_num_threads()),
            hidden.data_ptr(),
            bias.data_ptr(),
            activation.data_ptr(),
        )
        if residual is None:
            products.linear(activation[:rows], fc2_weight, fc2_bias, out=y[part])
        else:
            added = products.linear(activation[:rows], fc2_weight, fc2_bias)
            torch.add(residual[part], added, out=y[part])
    return hidden if save_hidden else None


def mlp_backward(
    problem: MLPProblem,
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    hidden: Tensor,
    weights: bool,
) -> tuple[Tensor, ...]:
    """As the reference; one pass over the hidden layer, in place on the incoming gradient."""
    x_rows = x.reshape(problem.rows, -1)
    grad_rows = grad_y.reshape(problem.rows, -1)
    hidden = hidden.contiguous()
    grad_hidden = mm(grad_rows, fc2_weight).contiguous()
    bias = fc1_bias.contiguous()
    activation = torch.empty_like(hidden)
    grad_fc1_bias = torch.empty(problem.hidden_features, dtype=torch.float32)
    _module.bias_gelu_backward(
        (problem.rows, problem.hidden_features, _DTYPES[problem.dtype], torch.get_num_threads()),
        hidden.data_ptr(),
        bias.data_ptr(),
        activation.data_ptr(),
        grad_hidden.data_ptr(),
        grad_fc1_bias.data_ptr(),
    )
    grad_x = mm(grad_hidden, fc1_weight).reshape(x.shape)
    if not weights:
        return (grad_x,)
    (grad_fc1_weight,) = weight_gradient(grad_hidden, x_rows, bias=False)
    grad_fc2 = weight_gradient(grad_rows, activation)
    return grad_x, grad_fc1_weight, grad_fc1_bias.to(x.dtype), *grad_fc2


def block(
    problem: WindowAttentionProblem,
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hidden_features: int,
    scale: float,
    eps: tuple[float, float],
) -> Tensor:
    """A block in inference whose layers ``has_product``; ``weights`` as the operator takes them."""
    _, qkv_bias, temb_weight, temb_bias, *_ = weights
    if temb is not None and temb_weight is not None and problem.batch > _FEW_ROWS:
        row, temb = linear(temb, temb_weight, temb_bias), None
    if temb is None and qkv_bias is not None:
        row = qkv_bias.expand(problem.batch, -1) if row is None else row + qkv_bias
    q_row, _, v_row = (None,) * 3 if row is None else row.chunk(3, dim=1)
    q_row, v_row, row_stride = equally_spaced(q_row, v_row)
    contiguous = [_optional(tensor) for tensor in (x, temb, *weights)]
    y = x.new_empty(x.shape)
    _module.block(
        _shape(problem),
        scale,
        eps,
        (0 if temb is None else temb.shape[1], hidden_features),
        _pointer(q_row),
        _pointer(v_row),
        row_stride,
        *map(_pointer, contiguous),
        y.data_ptr(),
    )
    return y


def add_layer_norm(
    problem: AddLayerNormProblem, x: Tensor, y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    s = x.new_empty(x.shape)
    return s, _norm(problem, x, y, s, eps)


def add_layer_norm_backward(
    problem: AddLayerNormProblem, grad_s: Tensor, grad_n: Tensor, s: Tensor, eps: float
) -> Tensor:
    """As the reference."""
    return _norm_backward(problem, grad_s, grad_n, s, eps)


def layer_norm(problem: AddLayerNormProblem, x: Tensor, eps: float) -> Tensor:
    """As the reference."""
    return _norm(problem, x, None, None, eps)


def layer_norm_backward(
    problem: AddLayerNormProblem, grad_n: Tensor, x: Tensor, eps: float
) -> Tensor:
    """As the reference."""
    return _norm_backward(problem, None, grad_n, x, eps)


def _norm(
    problem: AddLayerNormProblem, x: Tensor, y: Tensor | None, s: Tensor | None, eps: float
) -> Tensor:
    """n of x, or of x + y, which is written to s."""
    x, y = x.contiguous(), _optional(y)
    n = x.new_empty(x.shape, dtype=problem.y_dtype)
    _module.add_layer_norm(
        _norm_shape(problem), eps, x.data_ptr(), _pointer(y), _pointer(s), n.data_ptr()
    )
    return n


def _norm_backward(
    problem: AddLayerNormProblem, grad_s: Tensor | None, grad_n: Tensor, s: Tensor, eps: float
) -> Tensor:
    grad_s, grad_n, s = _optional(grad_s), grad_n.contiguous(), s.contiguous()
    grad = torch.empty_like(s)
    _module.add_layer_norm_backward(
        _norm_shape(problem),
        eps,
        _pointer(grad_s),
        grad_n.data_ptr(),
        s.data_ptr(),
        grad.data_ptr(),
    )
    return grad


def _norm_shape(problem: AddLayerNormProblem) -> tuple[int, ...]:
    return (
        problem.rows,
        problem.features,
        _DTYPES[problem.dtype],
        _DTYPES[problem.y_dtype],
        torch.get_num_threads(),
    )
