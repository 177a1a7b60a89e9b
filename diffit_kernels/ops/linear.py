"""``torch.ops.diffit.linear``: where PyTorch's own products are slower than they need be."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from diffit_kernels import dispatch, native, products
from diffit_kernels.ops import autocast, transforms
from diffit_kernels.ops.registration import operator
from diffit_kernels.problem import (
    Described,
    remembered,
    require_floating,
    require_like,
    require_rows,
    require_shape,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (..., K), (N, K), (N,) -> (..., N)."""
    dtype = autocast.dtype_of(x) if autocast.is_active(x) else x.dtype
    if transforms.are_active() or not _is_ours(dtype, x, weight):
        return functional.linear(x, weight, bias)
    return _forward(x, weight, bias)


def _is_ours(dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or weight.dim() != 2:
        return False
    if products.are_slow(dtype, "cpu"):
        return True
    if torch.compiler.is_compiling():  # compilers know neither this processor nor the rows
        return dtype == torch.bfloat16
    if not dispatch.runs_native("cpu"):
        return False
    columns, features = weight.shape
    rows = x.numel() // max(x.shape[-1], 1)
    if native.has_product(dtype, rows, features, columns):
        return True
    trained = weight.requires_grad and torch.is_grad_enabled()
    return trained and native.has_weight_gradient(dtype, rows, features, columns)


@operator("linear")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    y = dispatch.select_products("cpu").linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operator("linear_backward")
def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. Without ``weights`` all but the first have no elements."""
    _check_backward(grad_y, x, weight)
    x_rows = x.reshape(-1, x.shape[-1])
    grad_rows = grad_y.reshape(len(x_rows), len(weight))
    backend = dispatch.select_products("cpu")
    with autocast.disabled(x):
        grad_x = backend.mm(grad_rows, weight).view(x.shape)
        if not weights:
            return grad_x, x.new_empty(0), x.new_empty(0)
        return grad_x, *backend.weight_gradient(grad_rows, x_rows)


@_backward.register_fake
def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad_y, x, weight)
    shapes = (x.shape, weight.shape, weight.shape[:1]) if weights else (x.shape, 0, 0)
    grad_x, grad_weight, grad_bias = (x.new_empty(shape) for shape in shapes)
    return grad_x, grad_weight, grad_bias


@remembered
def _check(x: Described, weight: Described, bias: Described | None) -> None:
    require_floating("x", x)
    _, features = require_rows("x", x)
    require_like("weight", weight, x.dtype, x)
    require_shape("weight", weight, (weight.shape[0], features))
    if bias is not None:
        require_like("bias", bias, x.dtype, x)
        require_shape("bias", bias, (weight.shape[0],))


def _check_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> None:
    _check(x, weight, None)
    require_like("grad_y", grad_y, x.dtype, x)
    require_shape("grad_y", grad_y, (*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    grads = _backward(grad_y, x, weight, any(needed[1:]))
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


_forward.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
_forward.register_autocast()


@register_flop_formula(torch.ops.diffit.linear)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """From the shapes of the arguments."""
    return 2 * prod(x[:-1]) * prod(weight)


@register_flop_formula(torch.ops.diffit.linear_backward)
def _backward_flops(grad_y: Any, *inputs: Any, **_: Any) -> int:
    return (2 if inputs[-1] else 1) * _flops(*inputs)
