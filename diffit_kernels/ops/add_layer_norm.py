"""``torch.ops.diffit.add_layer_norm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffit_kernels.dispatch import select
from diffit_kernels.ops import autocast
from diffit_kernels.ops.registration import operator
from diffit_kernels.problem import AddLayerNormProblem, require_like, require_shape, require_tensor


def add_layer_norm(x: Tensor, y: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``s = x + y`` and ``n = (s - mean(s)) / sqrt(var(s) + eps)`` over the last dimension.

    The step between two layers of a transformer, the residual sum and the next layer's norm
    (without parameters), in one pass. n is that of the sum before it is rounded.

    Args:
        x: (..., C), the residual stream; float32, bfloat16, float16 or float64.
        y: (..., C), what a layer adds to it; in the dtype of ``x``, or bfloat16 or float16 where
            that is float32, as under autocast.
        eps: positive; added to the variance.

    Returns:
        s (..., C) in the dtype of ``x`` and n (..., C) in the dtype of ``y``, contiguous.

    Raises:
        TypeError: a dtype or device that is not supported or does not fit that of ``x``.
        ValueError: a shape or eps that does not fit.
        RuntimeError: the backend chosen by ``use_backend`` cannot run this call.
    """
    if not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    require_tensor("x", x)
    require_tensor("y", y)
    if autocast.is_active(x):
        x = x.to(torch.promote_types(x.dtype, y.dtype))  # the dtype of x + y
    s, n = _forward(x, y, float(eps))
    return s, n


@operator("add_layer_norm")
def _forward(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    problem = AddLayerNormProblem.from_tensors(x, y, eps)
    return select(problem).add_layer_norm(problem, x, y, eps)


@_forward.register_fake
def _forward_fake(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    AddLayerNormProblem.from_tensors(x, y, eps)
    return x.new_empty(x.shape), y.new_empty(y.shape)


@operator("add_layer_norm_backward")
def _backward(grad_s: Tensor, grad_n: Tensor, s: Tensor, eps: float) -> Tensor:
    """Gradient of x, and of y in the dtype of x."""
    problem = AddLayerNormProblem.from_tensors(s, grad_n, eps)
    require_like("grad_s", grad_s, s.dtype, s)
    require_shape("grad_s", grad_s, tuple(s.shape))
    with autocast.disabled(s):
        return select(problem).add_layer_norm_backward(problem, grad_s, grad_n, s, eps)


@_backward.register_fake
def _backward_fake(grad_s: Tensor, grad_n: Tensor, s: Tensor, eps: float) -> Tensor:
    return s.new_empty(s.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # s, and neither n nor the statistics: in float32 beside a 16-bit n, a gradient made from that n
    # would have its rounding error; statistics of the sum before rounding do not fit the rounded s.
    ctx.save_for_backward(output[0])
    _, y, ctx.eps = inputs
    ctx.y_dtype = y.dtype


def _autograd(ctx: Any, grad_s: Tensor, grad_n: Tensor) -> tuple[Tensor, Tensor, None]:
    grad = _backward(grad_s, grad_n, *ctx.saved_tensors, ctx.eps)
    return grad, grad.to(ctx.y_dtype), None


_forward.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
