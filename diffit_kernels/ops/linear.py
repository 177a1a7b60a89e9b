"""``torch.nn.functional.linear`` around the operators, also fast where half precision is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffit_kernels import products
from diffit_kernels.ops import autocast, transforms


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (..., K), (N, K), (N,) -> (..., N)."""
    dtype = autocast.dtype_of(x) if autocast.is_active(x) else x.dtype
    if transforms.are_active() or not products.are_slow(dtype, x.device.type):
        return functional.linear(x, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    return _Linear.apply(x.to(dtype), weight.to(dtype), bias)  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            out = products.linear(x.flatten(0, -2), weight, bias)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # which vmap has a rule for, unlike flatten
        with torch.autocast("cpu", enabled=False):
            return (
                products.mm(rows, weight).view(x.shape) if needs_x else None,
                products.mm(rows.t(), x.reshape(-1, x.shape[-1])) if needs_weight else None,
                rows.sum(dim=0) if needs_bias else None,
            )
