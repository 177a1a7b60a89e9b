"""A residual sum and its layer norm, or that alone: each tensor is read or written once.

A program holds whole rows in registers; the passes over a row for mean, deviations and variance
cost no memory traffic.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffit_kernels.problem import AddLayerNormProblem
from diffit_kernels.triton.configs import Config, Configs, choose
from diffit_kernels.triton.launch import launch
from diffit_kernels.triton.rows import as_rows
from diffit_kernels.triton.sizes import cdiv, next_power_of_2

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
    bias,
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
    """``add_layer_norm`` on ROWS rows; without y and s ``layer_norm``. s gets the bias as well."""
    row, column, inside = _inside(rows, features, ROWS, BLOCK_C)
    total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        total += tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed, _ = _normalize(total, inside, features, eps)
    out = row * features + column
    if s is not None:
        if bias is not None:
            total += tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
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
    """``add_layer_norm_backward`` on ROWS rows; without grad_s ``layer_norm_backward``."""
    row, column, inside = _inside(rows, features, ROWS, BLOCK_C)
    total = tl.load(s + row * s_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad_normed = tl.load(grad_n + row * grad_n_stride + column, mask=inside, other=0.0)
    grad_normed = grad_normed.to(tl.float32)
    normed, rstd = _normalize(total, inside, features, eps)
    mean = tl.sum(grad_normed, axis=1) / features
    along_n = tl.sum(grad_normed * normed, axis=1) / features
    grad_total = rstd * (grad_normed - mean[:, None] - normed * along_n[:, None])
    if grad_s is not None:
        grad_total += tl.load(grad_s + row * grad_s_stride + column, mask=inside, other=0.0)
    tl.store(grad + row * features + column, grad_total, mask=inside)


def add_layer_norm(
    problem: AddLayerNormProblem,
    x: Tensor,
    y: Tensor,
    eps: float,
    bias: Tensor | None = None,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference. ``configs`` gives the parameters of kernels in place of the tuned ones.

    A ``bias`` (C,) is added to s alone, before it is rounded; n is still that of x + y.
    """
    s = x.new_empty(x.shape)
    return s, _norm(problem, x, y, bias, s, eps, configs)


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
    return _norm_backward(problem, grad_s, grad_n, s, eps, configs)


def layer_norm(
    problem: AddLayerNormProblem, x: Tensor, eps: float, *, configs: Configs | None = None
) -> Tensor:
    """As the reference; with the parameters of ``add_layer_norm``."""
    return _norm(problem, x, None, None, None, eps, configs)


def layer_norm_backward(
    problem: AddLayerNormProblem,
    grad_n: Tensor,
    x: Tensor,
    eps: float,
    *,
    configs: Configs | None = None,
) -> Tensor:
    """As the reference; with the parameters of ``add_layer_norm_backward``."""
    return _norm_backward(problem, None, grad_n, x, eps, configs)


def _norm(
    problem: AddLayerNormProblem,
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    eps: float,
    configs: Configs | None,
) -> Tensor:
    """n of x, or of x + y, which is written to s, with the bias if there is one."""
    n = x.new_empty(x.shape, dtype=problem.y_dtype)
    x, y = as_rows(x), None if y is None else as_rows(y)
    config = _config("add_layer_norm", problem, x, configs)
    strides = (x.stride(0), 0 if y is None else y.stride(0))
    bias = None if bias is None else bias.contiguous()
    _launch(forward, problem, (x, y, bias, s, n), strides, eps, config)
    return n


def _norm_backward(
    problem: AddLayerNormProblem,
    grad_s: Tensor | None,
    grad_n: Tensor,
    s: Tensor,
    eps: float,
    configs: Configs | None,
) -> Tensor:
    grad = s.new_empty(s.shape)
    tensors = [None if x is None else as_rows(x) for x in (grad_s, grad_n, s)]
    config = _config("add_layer_norm_backward", problem, s, configs)
    strides = tuple([0 if x is None else x.stride(0) for x in tensors])
    _launch(backward, problem, (*tensors, grad), strides, eps, config)
    return grad


def _config(
    kernel: str, problem: AddLayerNormProblem, x: Tensor, configs: Configs | None
) -> Config:
    if configs is not None:
        return configs[kernel]
    return choose(kernel, x.device, x.itemsize, rows=problem.rows, features=problem.features)


def _launch(
    kernel: Any,
    problem: AddLayerNormProblem,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    eps: float,
    config: Config,
) -> None:
    launch(
        kernel,
        (cdiv(problem.rows, config["ROWS"]),),
        tensors,
        (*strides, problem.rows, problem.features, eps),
        config | {"BLOCK_C": next_power_of_2(problem.features)},
    )
