"""Layer norms, as the C++ kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffit_kernels.native import library
from diffit_kernels.native.library import DTYPES, optional, pointer
from diffit_kernels.problem import AddLayerNormProblem


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
    x, y = x.contiguous(), optional(y)
    n = x.new_empty(x.shape, dtype=problem.y_dtype)
    library.kernels.add_layer_norm(
        _norm_shape(problem), eps, x.data_ptr(), pointer(y), pointer(s), n.data_ptr()
    )
    return n


def _norm_backward(
    problem: AddLayerNormProblem, grad_s: Tensor | None, grad_n: Tensor, s: Tensor, eps: float
) -> Tensor:
    grad_s, grad_n, s = optional(grad_s), grad_n.contiguous(), s.contiguous()
    grad = torch.empty_like(s)
    library.kernels.add_layer_norm_backward(
        _norm_shape(problem),
        eps,
        pointer(grad_s),
        grad_n.data_ptr(),
        s.data_ptr(),
        grad.data_ptr(),
    )
    return grad


def _norm_shape(problem: AddLayerNormProblem) -> tuple[int, ...]:
    return (
        problem.rows,
        problem.features,
        DTYPES[problem.dtype],
        DTYPES[problem.y_dtype],
        torch.get_num_threads(),
    )
