"""A residual sum and its layer norm, and a layer norm alone, as their equations."""

from __future__ import annotations

import torch
from torch import Tensor

from diffit_kernels.problem import AddLayerNormProblem


def add_layer_norm(
    problem: AddLayerNormProblem, x: Tensor, y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``s = x + y`` and ``n = (s - mean(s)) / sqrt(var(s) + eps)``, of the sum before rounding."""
    s = x.to(problem.sum_dtype) + y.to(problem.sum_dtype)
    n, _ = _normalize(s, eps)
    return s.to(problem.dtype).contiguous(), n.to(problem.y_dtype).contiguous()


def add_layer_norm_backward(
    problem: AddLayerNormProblem, grad_s: Tensor, grad_n: Tensor, s: Tensor, eps: float
) -> Tensor:
    """Gradient of x, and of y in the dtype of x.

    ``grad_s + (grad_n - mean(grad_n) - n mean(grad_n n)) / sqrt(var(s) + eps)``
    """
    grad = grad_s + _through_norm(problem, grad_n, s, eps)
    return grad.to(problem.dtype).contiguous()


def layer_norm(problem: AddLayerNormProblem, x: Tensor, eps: float) -> Tensor:
    """``n = (x - mean(x)) / sqrt(var(x) + eps)``."""
    n, _ = _normalize(x.to(problem.sum_dtype), eps)
    return n.to(problem.y_dtype).contiguous()


def layer_norm_backward(
    problem: AddLayerNormProblem, grad_n: Tensor, x: Tensor, eps: float
) -> Tensor:
    """Gradient of x: that of ``add_layer_norm`` without ``grad_s``."""
    return _through_norm(problem, grad_n, x, eps).to(problem.dtype).contiguous()


def _through_norm(problem: AddLayerNormProblem, grad_n: Tensor, s: Tensor, eps: float) -> Tensor:
    n, rstd = _normalize(s.to(problem.sum_dtype), eps)
    grad = grad_n.to(problem.sum_dtype)
    along_n = (grad * n).mean(dim=-1, keepdim=True)
    return rstd * (grad - grad.mean(dim=-1, keepdim=True) - n * along_n)


def _normalize(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n and 1 / sqrt(var + eps).

    The mean of a row far from zero is rounded to units of its size; what that leaves in the
    deviations is their mean, taken off too.
    """
    for _ in range(2):
        s = s - s.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(s.square().mean(dim=-1, keepdim=True) + eps)
    return s * rstd, rstd
