"""``torch.ops.diffit.layer_norm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffit_kernels.dispatch import select
from diffit_kernels.ops import autocast
from diffit_kernels.ops.registration import operator
from diffit_kernels.problem import AddLayerNormProblem, require_tensor


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``n = (x - mean(x)) / sqrt(var(x) + eps)`` over the last dimension, without parameters.

    Under autocast n has autocast's dtype where x is float32: it is rounded for the matrix product
    that takes it as it is written, not in a pass after that.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        eps: positive; added to the variance.

    Returns:
        n (..., C), contiguous, in the dtype of ``x`` or, under autocast, as above.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or eps that does not fit.
        RuntimeError: the backend chosen by ``use_backend`` cannot run this call.
    """
    if not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    require_tensor("x", x)
    cast = x.dtype == torch.float32 and autocast.is_active(x)
    return _forward(x, autocast.dtype_of(x) if cast else x.dtype, float(eps))


@operator("layer_norm")
def _forward(x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    problem = AddLayerNormProblem.of_norm(x, dtype, eps)
    return select(problem).layer_norm(problem, x, eps)


@_forward.register_fake
def _forward_fake(x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    AddLayerNormProblem.of_norm(x, dtype, eps)
    return x.new_empty(x.shape, dtype=dtype)


@operator("layer_norm_backward")
def _backward(grad_n: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient of x."""
    problem = AddLayerNormProblem.from_tensors(x, grad_n, eps)
    with autocast.disabled(x):
        return select(problem).layer_norm_backward(problem, grad_n, x, eps)


@_backward.register_fake
def _backward_fake(grad_n: Tensor, x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.eps = inputs
    ctx.save_for_backward(x)


def _autograd(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None, None]:
    grad = _backward(grad_n, *ctx.saved_tensors, ctx.eps)
    return grad, None, None


_forward.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
