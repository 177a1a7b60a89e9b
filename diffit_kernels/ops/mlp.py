"""``torch.ops.diffit.mlp``."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffit_kernels.dispatch import select
from diffit_kernels.ops import autocast, transforms
from diffit_kernels.ops.registration import operator
from diffit_kernels.problem import MLPProblem, require_like, require_shape, require_tensor


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """``gelu(x W1^T + b1) W2^T + b2 + residual`` with the tanh form of GELU.

    Args:
        x: (..., in_features); float32, bfloat16, float16 or float64.
        fc1_weight: (hidden, in_features).
        fc1_bias: (hidden,).
        fc2_weight: (out_features, hidden).
        fc2_bias: (out_features,).
        residual: (..., out_features), what the result is added to; in the dtype of ``x``, or
            float32 where that is bfloat16 or float16, as under autocast.

    Returns:
        (..., out_features), contiguous, in the dtype of ``residual``, without one in that of ``x``.

    Raises:
        TypeError: a dtype or device that is not supported or differs from that of ``x``.
        ValueError: a shape that does not fit.
        RuntimeError: the backend chosen by ``use_backend`` cannot run this call.
    """
    require_tensor("x", x)
    if residual is not None and autocast.is_active(x):
        # the dtype of residual + y
        residual = residual.to(torch.promote_types(residual.dtype, autocast.dtype_of(x)))
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    save_hidden = torch.is_grad_enabled() and (
        any(tensor is not None and tensor.requires_grad for tensor in tensors)
        or transforms.are_active()  # vmap hides what requires a gradient
    )
    y, _ = _forward(*tensors, residual, save_hidden)
    return y


@operator("mlp")
def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and ``x W1^T`` (rows, hidden) if ``save_hidden``, else no elements."""
    problem = MLPProblem.from_tensors(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    y, hidden = select(problem).mlp(
        problem, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, save_hidden
    )
    return y, x.new_empty(0) if hidden is None else hidden


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    problem = MLPProblem.from_tensors(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    hidden = (problem.rows, problem.hidden_features) if save_hidden else 0
    y = x if residual is None else residual
    return y.new_empty(*x.shape[:-1], problem.out_features), x.new_empty(hidden)


@operator("mlp_backward")
def _backward(
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    hidden: Tensor,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, fc1_weight, fc1_bias, fc2_weight and fc2_bias.

    Without ``weights`` all but the first have no elements.
    """
    problem = MLPProblem.from_tensors(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    require_like("grad_y", grad_y, x.dtype, x)
    require_shape("grad_y", grad_y, (*x.shape[:-1], problem.out_features))
    require_like("hidden", hidden, x.dtype, x)
    require_shape("hidden", hidden, (problem.rows, problem.hidden_features))
    with autocast.disabled(x):
        grad_x, *others = select(problem).mlp_backward(
            problem, grad_y, x, fc1_weight, fc1_bias, fc2_weight, hidden, weights
        )
    w1, b1, w2, b2 = others or (x.new_empty(0) for _ in range(4))
    return grad_x, w1, b1, w2, b2


@_backward.register_fake
def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    hidden: Tensor,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w1, b1, w2, b2 = (
        x.new_empty(tensor.shape if weights else 0)
        for tensor in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    )
    return x.new_empty(x.shape), w1, b1, w2, b2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros as large as the hidden layer would be made


def _autograd(ctx: Any, grad_y: Tensor | None, _grad_hidden: None) -> tuple[Any, ...]:
    *needed, needs_residual, _ = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...] = (None,) * 5
    if grad_y is not None and any(needed):
        saved = ctx.saved_tensors  # once: checkpointing computes them when they are asked for
        all_grads = _backward(grad_y.to(saved[0].dtype), *saved, any(needed[1:]))
        grads = tuple(grad if need else None for grad, need in zip(all_grads, needed, strict=True))
    return *grads, grad_y if needs_residual else None, None


_forward.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
_forward.register_autocast(keep=(5,))


@register_flop_formula(torch.ops.diffit.mlp)
def mlp_flops(x: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *_: Any, **__: Any) -> int:
    """Of the two products, from the shapes of the arguments."""
    return 2 * prod(x[:-1]) * (prod(fc1_weight) + prod(fc2_weight))


@register_flop_formula(torch.ops.diffit.mlp_backward)
def _backward_flops(grad_y: Any, *inputs: Any, **_: Any) -> int:
    """For each product of the forward pass that for its input and, if asked, for its weights."""
    return (2 if inputs[-1] else 1) * mlp_flops(*inputs)
