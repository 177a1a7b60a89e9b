"""``torch.ops.diffit.block``: a whole block in inference, by one call of the CPU's kernels.

Norms are taken in the products that follow them and sums in those before, and a thread takes a part
of the tokens through attention and the products around it at once. What lies between is not kept:
where gradients are asked for, the operators of the layers run. They also do where there are no such
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffit_kernels import dispatch, native
from diffit_kernels.ops import autocast, transforms
from diffit_kernels.ops.add_layer_norm import add_layer_norm
from diffit_kernels.ops.layer_norm import layer_norm
from diffit_kernels.ops.mlp import mlp, mlp_flops
from diffit_kernels.ops.registration import operator
from diffit_kernels.ops.tmsa import check_tmsa, tmsa
from diffit_kernels.ops.window_attention import as_grid, as_pair, as_table, attention_flops
from diffit_kernels.problem import (
    AddLayerNormProblem,
    Described,
    MLPProblem,
    WindowAttentionProblem,
    remembered,
    require_shape,
)


def is_fused(
    x: Tensor, num_heads: int, window_size: int | tuple[int, int], hidden_features: int
) -> bool:
    """Whether ``block`` is one call for tokens x (B, L, C) and these sizes, as things are."""
    return (
        x.dim() == 3
        and not torch.is_grad_enabled()
        and not transforms.are_active()
        and not autocast.is_active(x)
        and _has_kernels(x, num_heads, window_size, hidden_features)
    )


def _has_kernels(
    x: Tensor, num_heads: int, window_size: int | Sequence[int], hidden_features: int
) -> bool:
    batch, tokens, dim = x.shape
    window = as_pair("window_size", window_size)
    return (
        dispatch.runs_native(x.device.type)
        and native.has_product(x.dtype, batch * tokens, dim, 3 * dim)
        and native.has_product(x.dtype, batch * tokens, dim, hidden_features, dim)
        and native.supports_window(dim // num_heads, window) is None
    )


def block(
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temb_weight: Tensor | None,
    temb_bias: Tensor | None,
    rel_pos_table: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    grid_size: tuple[int, int] | None,
    scale: float | None,
    eps: tuple[float, float],
) -> Tensor:
    """``s + mlp(layer_norm(s))`` with ``s = x + tmsa(layer_norm(x), temb or row)``.

    Arguments as those of ``tmsa`` and ``mlp``, with one time token or row for each sample; ``eps``
    of the two norms.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``tmsa`` and ``mlp``.
    """
    window = as_pair("window_size", window_size)
    return _forward(
        x,
        temb,
        row,
        qkv_weight,
        qkv_bias,
        None if temb is None else temb_weight,
        None if temb is None else temb_bias,
        None if rel_pos_table is None else as_table(rel_pos_table, x.dtype),
        proj_weight,
        proj_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        num_heads,
        window,
        as_grid(grid_size, x.shape[1], window),
        (x.shape[2] // num_heads) ** -0.5 if scale is None else scale,
        *eps,
    )


@operator("block")
def _forward(
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temb_weight: Tensor | None,
    temb_bias: Tensor | None,
    rel_pos_table: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
    eps1: float,
    eps2: float,
) -> Tensor:
    projections = (qkv_weight, qkv_bias, temb_weight, temb_bias, proj_weight, proj_bias)
    perceptron = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_tmsa(x, temb, row, *projections, False)
    _check(x, temb, row, *perceptron, eps1, eps2)
    batch, tokens, dim = x.shape
    qkv = Described(torch.Size((batch, tokens, 3 * dim)), x.dtype, x.device)
    problem = WindowAttentionProblem.from_tensors(
        qkv, rel_pos_table, None, None, num_heads, window_size, grid_size, scale
    )
    hidden_features = fc1_weight.shape[0]
    if _has_kernels(x, num_heads, window_size, hidden_features):
        weights = (*projections[:4], rel_pos_table, *projections[4:], *perceptron)
        return native.block(problem, x, temb, row, weights, hidden_features, scale, (eps1, eps2))
    attention = tmsa(
        layer_norm(x, eps1),
        temb,
        *projections[:4],
        rel_pos_table,
        *projections[4:],
        num_heads=num_heads,
        window_size=problem.window_size,
        grid_size=problem.grid_size,
        scale=scale,
        row=row,
    )
    s, normed = add_layer_norm(x, attention, eps2)
    return mlp(normed, *perceptron, s)


@_forward.register_fake
def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_forward.register_autograd(refusal="it is for inference")


@remembered
def _check(
    x: Described,
    temb: Described | None,
    row: Described | None,
    fc1_weight: Described,
    fc1_bias: Described,
    fc2_weight: Described,
    fc2_bias: Described,
    eps1: float,
    eps2: float,
) -> None:
    """Of what ``tmsa`` does not check."""
    MLPProblem.from_tensors(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    require_shape("fc2_weight", fc2_weight, (x.shape[2], fc2_weight.shape[1]))
    for name, tensor in (("temb", temb), ("row", row)):
        if tensor is not None:
            require_shape(name, tensor, (x.shape[0], tensor.shape[1]))
    for eps in (eps1, eps2):
        AddLayerNormProblem.of_norm(x, x.dtype, eps)


@register_flop_formula(torch.ops.diffit.block)
def _flops(x: Any, temb: Any, row: Any, qkv_weight: Any, *others: Any, **_: Any) -> int:
    """Of the products, from the shapes of the arguments."""
    _, temb_weight, _, table, proj_weight, _, *perceptron, heads, window, _, _, _, _ = others
    batch, tokens, dim = x
    projections = 2 * batch * tokens * (prod(qkv_weight) + prod(proj_weight))
    of_token = 0 if temb is None else 2 * batch * prod(temb_weight)
    attention = attention_flops((batch, tokens, 3 * dim), table, None, None, heads, window)
    return projections + of_token + attention + mlp_flops(x, *perceptron)
