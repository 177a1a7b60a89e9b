"""Linear layers, the MLP and the block, as the C++ kernels take them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffit_kernels import products
from diffit_kernels.layout import equally_spaced, thirds
from diffit_kernels.native import library
from diffit_kernels.native.attention import shape_of
from diffit_kernels.native.library import DTYPES, optional, pointer
from diffit_kernels.problem import MLPProblem, WindowAttentionProblem

# About how much of the hidden layer of an MLP exists at once in inference, and of its gradient:
# little enough to stay in cache between the products, and for the C library to reuse the memory
# instead of returning it to the system. It grows with the weights, which the products read anew
# for each part.
_HIDDEN_BYTES = 8 * 2**20

# A factor of all features that the kernels of linear layers take.
_LINEAR_BLOCK = 32


class _Limits(NamedTuple):
    """The least rows and the largest weight for which a kernel is faster than PyTorch's."""

    rows: int = 32
    weight: float = math.inf


# Of linear layers and what is around them, by what multiplies. In float32 rows make up for packing
# the weight, which is to stay near.
_FUSED = {
    ("tiles", torch.float32): _Limits(512, 2**20),
    ("tiles", torch.bfloat16): _Limits(),
    ("vectors", torch.float32): _Limits(128, 2**20),
    ("vectors", torch.bfloat16): _Limits(),
    ("vectors", torch.float16): _Limits(),
}
# Of products alone. Those in float32 by vectors are no faster than PyTorch's; in half precision a
# few rows have a kernel of their own.
_PRODUCT = {
    ("tiles", torch.float32): _FUSED["tiles", torch.float32],
    ("tiles", torch.bfloat16): _Limits(),
    ("vectors", torch.bfloat16): _Limits(rows=1),
    ("vectors", torch.float16): _Limits(rows=1),
}
# Of products with a weight (K, N), as in gradients of x: PyTorch widens it without transposing it.
_TRANSPOSED = _PRODUCT | {
    ("vectors", torch.bfloat16): _Limits(weight=2**20),
    ("vectors", torch.float16): _Limits(weight=2**20),
}

# The most time tokens that a block multiplies by a kernel of its own.
_FEW_ROWS = 16


def has_product(dtype: torch.dtype, rows: int, *features: int) -> bool:
    """Whether there is a kernel of linear layers, faster than PyTorch's, for these sizes."""
    return _is_within(_PRODUCT, dtype, rows, features)


def is_fused(dtype: torch.dtype, rows: int, *features: int) -> bool:
    """Whether linear layers and what is around them are faster as one kernel for these sizes."""
    return _is_within(_FUSED, dtype, rows, features)


def _is_within(
    kernels: dict[tuple[str, torch.dtype], _Limits],
    dtype: torch.dtype,
    rows: int,
    features: tuple[int, ...],
) -> bool:
    product = library.kernels.linear_product(DTYPES[dtype]) if dtype in DTYPES else ""
    if product == "vectors" and dtype.itemsize == 2 and not products.are_slow(dtype, "cpu"):
        return False
    limits = kernels.get((product, dtype))
    if limits is None or rows < limits.rows or not _are_whole_blocks(features):
        return False
    return all(n * k <= limits.weight for n, k in pairwise(features))


def _are_whole_blocks(sizes: tuple[int, ...]) -> bool:
    return all(size > 0 and size % _LINEAR_BLOCK == 0 for size in sizes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (rows, K), (N, K), (N,) -> (rows, N)."""
    if has_product(x.dtype, x.shape[0], *weight.shape):
        return _linear(x, weight.contiguous(), bias, weight.shape[0], transposed=False)
    return products.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``a b``, in their dtype, in ``out`` if given, which is contiguous."""
    if _is_within(_TRANSPOSED, a.dtype, a.shape[0], b.shape):
        return _linear(a, b.contiguous(), None, b.shape[1], transposed=True, out=out)
    return products.mm(a, b, out=out)


def has_weight_gradient(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether there is a kernel of the gradient of a weight for so many rows and features."""
    if dtype not in DTYPES or not library.kernels.has_weight_gradient(DTYPES[dtype]):
        return False
    return _are_whole_blocks(sizes)


def weight_gradient(
    grad_y: Tensor, x: Tensor, bias: bool = True, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """``grad_y^T x``, and unless without ``bias`` the sum of grad_y's rows.

    (rows, N), (rows, K) -> (N, K), (N,), in their dtype; or in ``dtype`` float32, where
    ``has_weight_gradient``.
    """
    (rows, columns), features = grad_y.shape, x.shape[1]
    if not has_weight_gradient(x.dtype, rows, columns, features):
        return products.weight_gradient(grad_y, x, bias)
    dtype = dtype or x.dtype
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_weight = x.new_empty(columns, features, dtype=dtype)
    grad_bias = torch.empty(columns, dtype=torch.float32) if bias else None
    library.kernels.weight_gradient(
        (rows, features, columns, DTYPES[x.dtype], DTYPES[dtype], torch.get_num_threads()),
        grad_y.data_ptr(),
        x.data_ptr(),
        grad_weight.data_ptr(),
        pointer(grad_bias),
    )
    return (grad_weight,) if grad_bias is None else (grad_weight, grad_bias.to(dtype))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    transposed: bool,
    out: Tensor | None = None,
) -> Tensor:
    """With ``transposed`` the weight is (K, N)."""
    x, bias = x.contiguous(), optional(bias)
    y = x.new_empty(x.shape[0], columns) if out is None else out
    library.kernels.linear(
        (*x.shape, columns, DTYPES[x.dtype], transposed, torch.get_num_threads()),
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        y.data_ptr(),
    )
    return y


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
    fused = is_fused(problem.dtype, problem.rows, *features)
    hidden = (_fused_mlp if fused else _mlp_in_parts)(problem, y, save_hidden, *inputs)
    return y.reshape(*x.shape[:-1], problem.out_features), hidden


def _rows_of_a_part(fc1_weight: Tensor) -> int:
    """Rows of the hidden layer that are computed at once where it is taken in parts."""
    row_bytes = fc1_weight.shape[0] * fc1_weight.itemsize
    rows = max(_HIDDEN_BYTES, 2 * fc1_weight.nbytes) // row_bytes
    return max(rows // _LINEAR_BLOCK, 1) * _LINEAR_BLOCK


def _fused_mlp(
    problem: MLPProblem, y: Tensor, save_hidden: bool, x: Tensor, *others: Tensor | None
) -> Tensor | None:
    """Writes y, and returns the hidden layer if it is saved."""
    hidden = x.new_empty(problem.rows, problem.hidden_features) if save_hidden else None
    contiguous = [optional(tensor) for tensor in (x, *others)]
    library.kernels.mlp(
        (
            problem.rows,
            problem.in_features,
            problem.hidden_features,
            problem.out_features,
            DTYPES[problem.dtype],
            DTYPES[y.dtype],
            torch.get_num_threads(),
        ),
        *map(pointer, contiguous),
        pointer(hidden),
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
    """The same, some rows after the others; GELU runs in place where no hidden layer is saved.

    The residual is added to a part of the result that is still in cache, and not as the start of
    the second product: residual + bias, rounded, would have the error of the larger of the two.
    """
    bias, step = fc1_bias.contiguous(), min(problem.rows, _rows_of_a_part(fc1_weight))
    saved = x.new_empty(problem.rows, problem.hidden_features) if save_hidden else None
    memory = x.new_empty(step, problem.hidden_features)
    for start in range(0, problem.rows, step):
        part = slice(start, start + step)
        rows = min(step, problem.rows - start)
        activation = memory[:rows]
        hidden = activation if saved is None else saved[part]
        products.linear(x[part], fc1_weight, out=hidden)
        library.kernels.bias_gelu(
            (rows, problem.hidden_features, DTYPES[problem.dtype], torch.get_num_threads()),
            hidden.data_ptr(),
            bias.data_ptr(),
            activation.data_ptr(),
        )
        if residual is None:
            products.linear(activation, fc2_weight, fc2_bias, out=y[part])
        else:
            added = products.linear(activation, fc2_weight, fc2_bias)
            torch.add(residual[part], added, out=y[part])
    return saved


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
    """As the reference. Of a large hidden layer some rows after the others."""
    x_rows = x.reshape(problem.rows, -1)
    grad_rows = grad_y.reshape(problem.rows, -1)
    hidden, bias = hidden.contiguous(), fc1_bias.contiguous()
    grad_x = x.new_empty(x_rows.shape)
    rows = (grad_rows, x_rows, hidden, grad_x)
    weights_and_bias = (fc1_weight, bias, fc2_weight)
    if hidden.nbytes <= _HIDDEN_BYTES or not _has_exact_gradients(problem):
        memory = (x.new_empty(hidden.shape), x.new_empty(hidden.shape))
        grads = _backward_of_rows(*rows, *weights_and_bias, *memory, weights, x.dtype)
        return grad_x.view(x.shape), *grads
    step = min(problem.rows, _rows_of_a_part(fc1_weight))
    # Not one piece of twice the size, which the C library might return to the system.
    memory = (hidden.new_empty(step, hidden.shape[1]), hidden.new_empty(step, hidden.shape[1]))
    sums: tuple[Tensor, ...] = ()
    for part in zip(*(tensor.split(step) for tensor in rows), strict=True):
        activation, grad_hidden = (piece[: len(part[0])] for piece in memory)
        grads = _backward_of_rows(
            *(*part, *weights_and_bias, activation, grad_hidden, weights, torch.float32)
        )
        sums = tuple(a.add_(b) for a, b in zip(sums, grads, strict=True)) if sums else grads
    return grad_x.view(x.shape), *(grad.to(x.dtype) for grad in sums)


def _has_exact_gradients(problem: MLPProblem) -> bool:
    """Whether there are sums over rows in float32, so that those of parts can be added."""
    if problem.dtype == torch.float32:
        return True
    features = (problem.in_features, problem.hidden_features, problem.out_features)
    return has_weight_gradient(problem.dtype, problem.rows, *features)


def _backward_of_rows(
    grad_y: Tensor,
    x: Tensor,
    hidden: Tensor,
    grad_x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    activation: Tensor,
    grad_hidden: Tensor,
    weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Writes grad_x, activation and grad_hidden; with ``weights`` their gradients, in ``dtype``.

    One pass over the hidden layer, in place on its gradient.
    """
    rows, features = hidden.shape
    mm(grad_y, fc2_weight, out=grad_hidden)
    grad_fc1_bias = torch.empty(features, dtype=torch.float32)
    library.kernels.bias_gelu_backward(
        (rows, features, DTYPES[x.dtype], torch.get_num_threads()),
        hidden.data_ptr(),
        fc1_bias.data_ptr(),
        activation.data_ptr(),
        grad_hidden.data_ptr(),
        grad_fc1_bias.data_ptr(),
    )
    mm(grad_hidden, fc1_weight, out=grad_x)
    if not weights:
        return ()
    (grad_fc1_weight,) = weight_gradient(grad_hidden, x, bias=False, dtype=dtype)
    grad_fc2 = weight_gradient(grad_y, activation, dtype=dtype)
    return grad_fc1_weight, grad_fc1_bias.to(dtype), *grad_fc2


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
    """A block in inference whose layers are fused; ``weights`` as the operator takes them."""
    _, qkv_bias, temb_weight, temb_bias, *_ = weights
    if temb is not None and temb_weight is not None and problem.batch > _FEW_ROWS:
        row, temb = linear(temb, temb_weight, temb_bias), None
    if temb is None and qkv_bias is not None:
        row = qkv_bias.expand(problem.batch, -1) if row is None else row + qkv_bias
    q_row, _, v_row = thirds(row)
    q_row, v_row, row_stride = equally_spaced(q_row, v_row)
    contiguous = [optional(tensor) for tensor in (x, temb, *weights)]
    y = x.new_empty(x.shape)
    library.kernels.block(
        shape_of(problem),
        scale,
        eps,
        (0 if temb is None else temb.shape[1], hidden_features),
        pointer(q_row),
        pointer(v_row),
        row_stride,
        *map(pointer, contiguous),
        y.data_ptr(),
    )
    return y
