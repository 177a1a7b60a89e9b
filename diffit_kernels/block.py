"""A transformer block by the functions of the backends, forward and backward.

Its gradient is written down as one: norms are taken again instead of kept, and what comes back
along a residual is added by the norm beside it, not by a pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffit_kernels.dispatch import select, select_products
from diffit_kernels.layout import thirds, token_row
from diffit_kernels.problem import BlockProblem


class Weights(NamedTuple):
    """The parameters of a block."""

    qkv: Tensor
    qkv_bias: Tensor | None
    temb: Tensor | None
    temb_bias: Tensor | None
    rel_pos_table: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    @property
    def perceptron(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the MLP."""
        return self.fc1, self.fc1_bias, self.fc2, self.fc2_bias


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    row (B, 3C), what biases and time token add to every token's q, k and v, or None;
    qkv (B, L, 3C) without it; attention (B, L, C) before its projection; lse (B, heads, L);
    s (B, L, C) = x + the projection; hidden (B L, hidden features) without its bias.
    """

    row: Tensor | None
    qkv: Tensor
    attention: Tensor
    lse: Tensor
    s: Tensor
    hidden: Tensor


def block(
    problem: BlockProblem,
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    weights: Weights,
    scale: float,
    eps: tuple[float, float],
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """``s + mlp(layer_norm(s))`` with ``s = x + tmsa(layer_norm(x), temb or row)``.

    x, s and the result have one dtype, all else that of the weights.
    """
    norm, shape = problem.norm, x.shape
    products, norms = select_products(norm.device_type), select(norm)
    attended, saved = _attend(problem, x, temb, row, weights, scale, eps[0], save)
    projected = products.linear(attended, weights.proj, weights.proj_bias).view(shape)
    del attended
    if saved is None and hasattr(norms, "add_layer_norm_mlp"):
        halves = (norm, problem.perceptron, x, projected, eps[1])
        return norms.add_layer_norm_mlp(*halves, *weights.perceptron), None
    s, normed = norms.add_layer_norm(norm, x, projected, eps[1])
    del projected
    y, hidden = select(problem.perceptron).mlp(
        problem.perceptron, normed, *weights.perceptron, s, save
    )
    return y, None if saved is None or hidden is None else Saved(*saved, s, hidden)


def _attend(
    problem: BlockProblem,
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    weights: Weights,
    scale: float,
    eps: float,
    save: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor, Tensor] | None]:
    """Attention (B L, C) before its projection, and the first four of ``Saved``.

    Whatever is not saved ends with this call: in inference it would be most of the memory.
    """
    attention, norm = problem.attention, problem.norm
    products = select_products(norm.device_type)
    normed = select(norm).layer_norm(norm, x, eps).view(norm.rows, norm.features)
    qkv = products.linear(normed, weights.qkv).view(*x.shape[:2], 3 * norm.features)
    del normed
    of_token = (weights.qkv_bias, weights.temb, weights.temb_bias)
    row = token_row(products.linear, x.shape[0], temb, row, *of_token)
    q_row, _, v_row = thirds(row)
    out, lse = select(attention).window_attention(
        attention, qkv, weights.rel_pos_table, q_row, v_row, scale
    )
    return out.view(norm.rows, norm.features), (row, qkv, out, lse) if save else None


def block_backward(
    problem: BlockProblem,
    grad_y: Tensor,
    x: Tensor,
    temb: Tensor | None,
    saved: Saved,
    weights: Weights,
    scale: float,
    eps: tuple[float, float],
    of_weights: bool,
) -> list[Tensor | None]:
    """Gradients of x, temb and row, and if ``of_weights`` of the weights in their order."""
    attention, norm, perceptron = problem.attention, problem.norm, problem.perceptron
    products, norms = select_products(norm.device_type), select(norm)
    shape, rows, dtype = x.shape, (norm.rows, norm.features), norm.y_dtype
    grads: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)

    normed = norms.layer_norm(norm, saved.s, eps[1])
    grad_normed, *of_mlp = select(perceptron).mlp_backward(
        *(perceptron, grad_y.to(dtype), normed, weights.fc1, weights.fc1_bias, weights.fc2),
        *(saved.hidden, of_weights),
    )
    grad_s = norms.add_layer_norm_backward(norm, grad_y, grad_normed, saved.s, eps[1])
    del normed, grad_normed  # as large as x, each

    grad_projected = grad_s.to(dtype).view(rows)
    grad_attended = products.mm(grad_projected, weights.proj).view(shape)
    if of_weights:
        grads["proj"], grads["proj_bias"] = products.weight_gradient(
            grad_projected, saved.attention.view(rows)
        )
    q_row, _, v_row = thirds(saved.row)
    kernels = select(attention)
    grad_qkv, grad_table, grad_q_row, grad_v_row = kernels.window_attention_backward(
        *(attention, grad_attended, saved.qkv, weights.rel_pos_table, q_row, v_row),
        *(saved.lse, scale),
    )
    del grad_projected, grad_attended

    grad_rows = grad_qkv.view(norm.rows, 3 * norm.features)
    if of_weights:
        normed = norms.layer_norm(norm, x, eps[0])
        (grads["qkv"],) = products.weight_gradient(grad_rows, normed.view(rows), bias=False)
        del normed
    grad_normed = products.mm(grad_rows, weights.qkv).view(shape)
    grad_x = norms.add_layer_norm_backward(norm, grad_s, grad_normed, x, eps[0])

    grad_temb = grad_row = None
    if saved.row is not None:
        # That of k's part is 0: the softmax does not see it.
        grad_row = torch.cat([grad_q_row, torch.zeros_like(grad_q_row), grad_v_row], dim=1)
    if temb is not None and weights.temb is not None:
        grad_temb = products.mm(grad_row, weights.temb)
    if of_weights:
        grads["rel_pos_table"] = grad_table
        grads |= zip(("fc1", "fc1_bias", "fc2", "fc2_bias"), of_mlp, strict=True)
    if of_weights and grad_row is not None:
        grads["qkv_bias"] = grad_row.sum(dim=0)
    if of_weights and temb is not None:
        grads["temb"], grads["temb_bias"] = products.weight_gradient(grad_row, temb)
    return [grad_x, grad_temb, grad_row, *grads.values()]
