"""The two-layer perceptron of a transformer block, as its equations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from diffit_kernels.problem import MLPProblem


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
    """``gelu_tanh(x W1^T + b1) W2^T + b2 + residual``, and ``x W1^T`` for the backward pass."""
    hidden = linear(x, fc1_weight)
    y = linear(gelu(hidden + fc1_bias, approximate="tanh"), fc2_weight, fc2_bias)
    if residual is not None:
        y = (y + residual).contiguous()
    return y, hidden.reshape(problem.rows, -1) if save_hidden else None


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
    """Gradient of x; with ``weights`` also of fc1_weight, fc1_bias, fc2_weight and fc2_bias."""
    x_rows = x.reshape(problem.rows, -1)
    grad_rows = grad_y.reshape(problem.rows, -1)
    pre_activation = hidden + fc1_bias
    grad_activation = grad_rows @ fc2_weight
    grad_hidden = torch.ops.aten.gelu_backward(grad_activation, pre_activation, approximate="tanh")
    grad_x = (grad_hidden @ fc1_weight).reshape(x.shape)
    if not weights:
        return (grad_x,)
    return (
        grad_x,
        grad_hidden.t() @ x_rows,
        grad_hidden.sum(dim=0),
        grad_rows.t() @ gelu(pre_activation, approximate="tanh"),
        grad_rows.sum(dim=0),
    )
