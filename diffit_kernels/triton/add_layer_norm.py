"""A residual sum and its layer norm: each tensor is read or written once.

A program holds whole rows in registers; the passes over a row for mean, deviations and variance
cost no memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffit_kernels.problem import AddLayerNormProblem
from diffit_kernels.triton.configs import Config, Configs, choose
from diffit_kernels.triton.rows import as_rows

# A longer row does not fit in the registers of one program.
MAX_FEATURES = 8192


@triton.jit
def _inside(rows, features, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of this program, and which of them exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], inside


@triton.jit
def _normalize(s, inside, features, eps):
    """n and 1 / sqrt(var + eps) of rows that are 0 outside; centred twice as in the reference."""
    for _ in tl.static_range(2):
        mean = tl.sum(s, axis=1) / features
        s = tl.where(inside, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / features + eps)[:, None]
    return s * rstd, rstd


@triton.jit
def forward(
    x,
    y,
    s,
    n,
    x_stride,
    y_stride,
    rows,
    features,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``add_layer_norm`` on ROWS rows."""
    row, column, inside = _inside(rows, features, ROWS, BLOCK_C)
    total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed, _ = _normalize(total, inside, features, eps)
    out = row * features + column
    tl.store(s + out, total, mask=inside)
    tl.store(n + out, normed, mask=inside)


@triton.jit
def backward(
    grad_s,
    grad_n,
    s,
    grad,
    grad_s_stride,
    grad_n_stride,
    s_stride,
    rows,
    features,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``add_layer_norm_backward`` on ROWS rows."""
    row, column, inside = _inside(rows, features, ROWS, BLOCK_C)
    total = tl.load(s + row * s_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad_normed = tl.load(grad_n + row * grad_n_stride + column, mask=inside, other=0.0)
    grad_normed = grad_normed.to(tl.float32)
    grad_total = tl.load(grad_s + row * grad_s_stride + column, mask=inside, other=0.0)
    normed, rstd = _normalize(total, inside, features, eps)
    mean = tl.sum(grad_normed, axis=1) / features
    along_n = tl.sum(grad_normed * normed, axis=1) / features
    through_n = rstd * (grad_normed - mean[:, None] - normed * along_n[:, None])
    tl.store(grad + row * features + column, grad_total + through_n, mask=inside)


def add_layer_norm(
    problem: AddLayerNormProblem,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones."""
    s, n = x.new_empty(x.shape), y.new_empty(y.shape)
    x, y = as_rows(x), as_rows(y)
    config = _config("add_layer_norm", problem, x, configs)
    with torch.cuda.device_of(x):
        forward[_grid(problem, config)](
            *(x, y, s, n, x.stride(0), y.stride(0), problem.rows, problem.features, eps),
            BLOCK_C=triton.next_power_of_2(problem.features),
            **config,
        )
    return s, n


def add_layer_norm_backward(
    problem: AddLayerNormProblem,
    grad_s: Tensor,
    grad_n: Tensor,
    s: Tensor,
    eps: float,
    *,
    configs: Configs | None = None,
) -> Tensor:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones."""
    grad = s.new_empty(s.shape)
    tensors = [as_rows(tensor) for tensor in (grad_s, grad_n, s)]
    config = _config("add_layer_norm_backward", problem, s, configs)
    with torch.cuda.device_of(s):
        backward[_grid(problem, config)](
            *(*tensors, grad, *(tensor.stride(0) for tensor in tensors)),
            *(problem.rows, problem.features, eps),
            BLOCK_C=triton.next_power_of_2(problem.features),
            **config,
        )
    return grad


def _config(
    kernel: str, problem: AddLayerNormProblem, x: Tensor, configs: Configs | None
) -> Config:
    if configs is not None:
        return configs[kernel]
    return choose(kernel, x.device, x.itemsize, rows=problem.rows, features=problem.features)


def _grid(problem: AddLayerNormProblem, config: Config) -> tuple[int]:
    return (triton.cdiv(problem.rows, config["ROWS"]),)
