"""Linear, tanh-GELU, Linear as products that do in their tiles what else would be a pass.

Forward, the first product adds the bias and applies GELU before it stores, the second adds a bias
and the residual.
Backward, the product that gives the gradient of the activation turns it into that of the hidden
layer, recomputes the activation and sums the gradient of the bias, all in one pass over the hidden
layer. The other three products are plain and PyTorch's.

Where PyTorch's products are so much faster that a pass more costs less, these four are PyTorch's as
well, and what they would do in their tiles are two elementwise kernels. In float32 they always are:
a sum over all of K in one chain rounds more than cuBLAS does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffit_kernels.problem import MLPProblem
from diffit_kernels.triton.configs import CUBLASLT, Config, Configs, choose
from diffit_kernels.triton.launch import launch
from diffit_kernels.triton.rows import as_rows
from diffit_kernels.triton.sizes import cdiv

# 2 sqrt(2 / pi) log2(e), so that the exponential of GELU is a power of 2
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_CUBIC = tl.constexpr(0.044715)
_LN2 = tl.constexpr(math.log(2))

# Of the elementwise kernels: whole lines of memory, few enough numbers for registers.
_TILE: Config = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 4}


@triton.jit
def _gate(u):
    """``g = (1 + tanh z) / 2`` with ``z = sqrt(2 / pi) (u + 0.044715 u^3)``, and its derivative.

    GELU is ``u g``, its derivative ``g + u g'``. With ``e = exp(-2 z)`` the gate is 1 / (1 + e) and
    1 - g is e g, which keeps its digits where g is nearly 1. Beyond 10 the derivative is 0 in
    float32, and e may be inf.
    """
    e = tl.exp2(-u * _SLOPE * (1 + u * u * _CUBIC))
    gate = 1 / (1 + e)
    slope = gate * (e * gate) * (_SLOPE * _LN2) * (1 + u * u * (3 * _CUBIC))
    return gate, tl.where(tl.abs(u) > 10, 0.0, slope)


@triton.jit
def _tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile (down, across) of this program.

    GROUP tiles of rows go along the columns together: what they read is then still in L2.
    """
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0) // (GROUP * tiles_across) * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    inside = tl.program_id(0) - first * tiles_across
    return first + inside % height, inside // height


@triton.jit
def _places(down, first_column, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of (rows, columns): columns, where its first row begins, places, which exist."""
    row, column = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    first_row = down * BLOCK_M
    inside = (first_row + row < rows)[:, None] & (column < columns)[None, :]
    # From the first element of these rows, 32 bits are enough.
    return column, first_row.to(tl.int64) * columns, row[:, None] * columns + column, inside


@triton.jit
def _product(
    a,
    b,
    a_inside,
    b_inside,
    inner,
    b_stride_k,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """The tile of a b in float32, from pointers to their first tiles along ``inner``."""
    total = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if WHOLE_K:
            a_tile = tl.load(a, mask=a_inside, other=0.0)
            b_tile = tl.load(b, mask=b_inside, other=0.0)
        else:
            left = tl.arange(0, BLOCK_K) < inner - start
            a_tile = tl.load(a, mask=a_inside & left[None, :], other=0.0)
            b_tile = tl.load(b, mask=b_inside & left[:, None], other=0.0)
        total = tl.dot(a_tile, b_tile, total)
        a += BLOCK_K
        b += BLOCK_K * b_stride_k
    return total


@triton.jit
def linear(
    x,
    weight,
    bias,
    residual,
    hidden,
    y,
    x_stride,
    residual_stride,
    rows,
    columns,
    inner,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """``x weight^T + bias``, with GELU its GELU, plus ``residual`` if there, rounded once.

    ``hidden``, if there, gets ``x weight^T``.
    """
    down, across = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row, column = down * BLOCK_M + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    b = weight + column.to(tl.int64)[None, :] * inner + k[:, None]
    a_inside, b_inside = (row < rows)[:, None], (column < columns)[None, :]
    total = _product(a, b, a_inside, b_inside, inner, 1, BLOCK_K, WHOLE_K)
    _, first, out, inside = _places(down, across * BLOCK_N, rows, columns, BLOCK_M, BLOCK_N)
    if hidden is not None:
        tl.store(hidden + first + out, total, mask=inside)
    total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        gate, _ = _gate(total)
        total *= gate
    if residual is not None:
        added = residual + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        total += tl.load(added, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + first + out, total, mask=inside)


@triton.jit
def _gelu_backward(grad, tensors, down, first_column, rows, columns):
    """The epilogue of ``gelu_backward`` on a tile of the gradient of the activation."""
    bias, hidden, activation, grad_hidden, grad_bias = tensors
    column, first, out, inside = _places(
        down, first_column, rows, columns, grad.shape[0], grad.shape[1]
    )
    u = tl.load(hidden + first + out, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    gate, slope = _gate(u)
    tl.store(activation + first + out, u * gate, mask=inside)
    grad *= gate + u * slope
    tl.store(grad_hidden + first + out, grad, mask=inside)
    # Rows outside are 0 in grad.
    partial = grad_bias + down.to(tl.int64) * columns + column
    tl.store(partial, tl.sum(grad, axis=0), mask=column < columns)


@triton.jit
def gelu_backward(
    grad_y,
    weight,
    bias,
    hidden,
    activation,
    grad_hidden,
    grad_bias,
    grad_y_stride,
    rows,
    columns,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """``(grad_y weight) gelu'(u)`` and ``gelu(u)``, u = hidden + bias; sums of the first by tile.

    ``grad_bias`` (tiles down, columns) holds the sum over the rows of each tile.
    """
    down, across = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row, column = down * BLOCK_M + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = grad_y + row.to(tl.int64)[:, None] * grad_y_stride + k[None, :]
    b = weight + k.to(tl.int64)[:, None] * columns + column[None, :]
    a_inside, b_inside = (row < rows)[:, None], (column < columns)[None, :]
    grad = _product(a, b, a_inside, b_inside, inner, columns, BLOCK_K, WHOLE_K)
    # One half after the other: what the epilogue of a whole tile needs does not fit in registers.
    left, right = tl.split(grad.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    first, tensors = across * BLOCK_N, (bias, hidden, activation, grad_hidden, grad_bias)
    _gelu_backward(left, tensors, down, first, rows, columns)
    _gelu_backward(right, tensors, down, first + BLOCK_N // 2, rows, columns)


@triton.jit
def activate(hidden, bias, activation, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``activation = gelu(hidden + bias)``, which may be written over ``hidden``."""
    down, across = _tile(rows, columns, BLOCK_M, BLOCK_N, 1)
    column, first, out, inside = _places(down, across * BLOCK_N, rows, columns, BLOCK_M, BLOCK_N)
    u = tl.load(hidden + first + out, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate(u)
    tl.store(activation + first + out, u * gate, mask=inside)


@triton.jit
def activate_backward(
    grad,
    bias,
    hidden,
    activation,
    grad_hidden,
    grad_bias,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As ``gelu_backward``, from the gradient of the activation; may write over that."""
    down, across = _tile(rows, columns, BLOCK_M, BLOCK_N, 1)
    _, first, out, inside = _places(down, across * BLOCK_N, rows, columns, BLOCK_M, BLOCK_N)
    tile = tl.load(grad + first + out, mask=inside, other=0.0).to(tl.float32)
    tensors = (bias, hidden, activation, grad_hidden, grad_bias)
    _gelu_backward(tile, tensors, down, across * BLOCK_N, rows, columns)


def mlp(
    problem: MLPProblem,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    save_hidden: bool,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones.

    Those may be ``{"impl": "cublaslt"}``, and in float32 always are: PyTorch's product. It has the
    bias in its epilogue and, in 16 bits, where the hidden layer is not stored as well, the GELU.
    """
    hidden = x.new_empty(problem.rows, problem.hidden_features) if save_hidden else None
    activation = _activation(as_rows(x), fc1_weight, fc1_bias, hidden, configs)
    added = None if residual is None else as_rows(residual)
    y = _output(activation, fc2_weight, fc2_bias, added, configs)
    return y.view(*x.shape[:-1], problem.out_features), hidden


def adds_in_place(problem: MLPProblem, device: torch.device) -> bool:
    """Whether ``add_mlp`` takes no pass to add: where the second product is PyTorch's."""
    sizes = (problem.rows, problem.out_features)
    return _chosen("mlp_bias", problem.dtype, device, *sizes) == CUBLASLT


def add_mlp(
    s: Tensor, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor
) -> Tensor:
    """``gelu(x W1^T + b1) W2^T + s``, in place of s, in inference."""
    activation = _activation(as_rows(x), fc1_weight, fc1_bias, None, None)
    as_rows(s).addmm_(activation, fc2_weight.t())
    return s


def _activation(
    x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor | None, configs: Configs | None
) -> Tensor:
    """``gelu(x weight^T + bias)``; ``hidden``, if there, gets ``x weight^T``."""
    kernel, columns = "mlp_gelu" if hidden is None else "mlp_gelu_hidden", weight.shape[0]
    config = _config(kernel, x, columns, configs)
    if config == CUBLASLT and hidden is None and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    activation = x.new_empty(x.shape[0], columns)
    if config == CUBLASLT:
        product = activation if hidden is None else hidden
        torch.mm(x, weight.t(), out=product)
        tensors = (product, bias.contiguous(), activation)
        launch(activate, _grid(x, columns, _TILE), tensors, (x.shape[0], columns), _TILE)
    else:
        _linear(x, weight, bias, None, hidden, activation, config | {"GELU": True})
    return activation


def _output(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, configs: Configs | None
) -> Tensor:
    """``x weight^T + bias``, plus ``residual`` if there."""
    config = _config("mlp_bias", x, weight.shape[0], configs)
    if config == CUBLASLT:
        y = torch.addmm(bias, x, weight.t())
        if residual is None:
            return y
        return y.add_(residual) if residual.dtype == y.dtype else residual + y
    y = (x if residual is None else residual).new_empty(x.shape[0], weight.shape[0])
    _linear(x, weight, bias, residual, None, y, config | {"GELU": False})
    return y


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    hidden: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    columns = weight.shape[0]
    residual_stride = 0 if residual is None else residual.stride(0)
    launch(
        linear,
        _grid(x, columns, config),
        (x, weight.contiguous(), bias.contiguous(), residual, hidden, y),
        (x.stride(0), residual_stride, x.shape[0], columns, x.shape[1]),
        config,
    )


def mlp_backward(
    problem: MLPProblem,
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    hidden: Tensor,
    weights: bool,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, ...]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones."""
    x_rows, grad_rows = as_rows(x), as_rows(grad_y)
    columns = problem.hidden_features
    config = _config("mlp_gelu_backward", grad_rows, columns, configs)
    elementwise = config == CUBLASLT
    if elementwise:
        config, grad_hidden = _TILE, grad_rows @ fc2_weight
    else:
        grad_hidden = x.new_empty(problem.rows, columns)
    activation = torch.empty_like(grad_hidden)
    tiles_down = cdiv(problem.rows, config["BLOCK_M"])
    grad_bias = x.new_empty(tiles_down, columns, dtype=torch.float32)
    tensors = (fc1_bias.contiguous(), hidden.contiguous(), activation, grad_hidden, grad_bias)
    grid = _grid(grad_rows, columns, config)
    if elementwise:
        inputs = (grad_hidden, *tensors)
        launch(activate_backward, grid, inputs, (problem.rows, columns), config)
    else:
        factors = (grad_rows, fc2_weight.contiguous(), *tensors)
        sizes = (grad_rows.stride(0), problem.rows, columns, problem.out_features)
        launch(gelu_backward, grid, factors, sizes, config)
    grad_x = (grad_hidden @ fc1_weight).view(x.shape)
    if not weights:
        return (grad_x,)
    return (
        grad_x,
        grad_hidden.t() @ x_rows,
        grad_bias.sum(dim=0).to(x.dtype),
        grad_rows.t() @ activation,
        grad_rows.sum(dim=0),
    )


def _config(kernel: str, x: Tensor, columns: int, configs: Configs | None) -> Config:
    """``CUBLASLT``, or what a launch passes by name."""
    rows, inner = x.shape
    if configs is None or x.dtype == torch.float32:
        chosen = _chosen(kernel, x.dtype, x.device, rows, columns)
    else:
        chosen = configs[kernel]
    return chosen if chosen == CUBLASLT else {**chosen, "WHOLE_K": inner % chosen["BLOCK_K"] == 0}


def _chosen(
    kernel: str, dtype: torch.dtype, device: torch.device, rows: int, columns: int
) -> Config:
    """``CUBLASLT``, or parameters from the device's table."""
    if dtype == torch.float32:
        return CUBLASLT
    return choose(kernel, device, dtype.itemsize, rows=rows, features=columns)


def _grid(x: Tensor, columns: int, config: Config) -> tuple[int]:
    return (cdiv(x.shape[0], config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"]),)
