"""``torch.ops.diffit.block``: a whole transformer block by one call.

On a GPU it takes the place of the operators of the layers, whose Python would take longer than
their kernels. On the CPU it is one kernel, in inference, where there is one for its sizes: norms
are taken in the products that follow them and sums in those before, and a thread takes a part of
the tokens through attention and the products around it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffit_kernels import block as layers
from diffit_kernels import dispatch, native
from diffit_kernels.block import Saved, Weights
from diffit_kernels.ops import autocast, transforms
from diffit_kernels.ops.mlp import mlp_flops
from diffit_kernels.ops.registration import operator
from diffit_kernels.ops.tmsa import check_tmsa
from diffit_kernels.ops.window_attention import as_grid, as_pair, as_table, attention_flops
from diffit_kernels.problem import (
    HALF,
    AddLayerNormProblem,
    BlockProblem,
    Described,
    MLPProblem,
    WindowAttentionProblem,
    remembered,
    require_floating,
    require_like,
    require_rows,
    require_shape,
    require_tensor,
)


def is_fused(
    x: Tensor, weights: Weights, num_heads: int, window_size: int | tuple[int, int]
) -> bool:
    """Whether ``block`` is to be called for tokens x (B, L, C), as things are."""
    if x.dim() != 3 or transforms.are_active():
        return False
    trained, cast = torch.is_grad_enabled(), autocast.is_active(x)
    if x.device.type == "cuda":
        if cast and x.dtype not in (torch.float32, autocast.dtype_of(x)):
            return False
        # It computes the gradients of all weights or of none.
        return not trained or len({w.requires_grad for w in weights if w is not None}) == 1
    if trained or cast:
        return False
    return _has_kernels(x, num_heads, window_size, weights.fc1.shape[0])


def _has_kernels(
    x: Tensor, num_heads: int, window_size: int | Sequence[int], hidden_features: int
) -> bool:
    batch, tokens, dim = x.shape
    window = as_pair("window_size", window_size)
    return (
        dispatch.runs_native(x.device.type)
        and native.is_fused(x.dtype, batch * tokens, dim, 3 * dim)
        and native.is_fused(x.dtype, batch * tokens, dim, hidden_features, dim)
        and native.supports_window(dim // num_heads, window) is None
    )


def block(
    x: Tensor,
    temb: Tensor | None,
    row: Tensor | None,
    weights: Weights,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    grid_size: tuple[int, int] | None,
    scale: float | None,
    eps: tuple[float, float],
) -> Tensor:
    """``s + mlp(layer_norm(s))`` with ``s = x + tmsa(layer_norm(x), temb or row)``.

    Arguments as those of ``tmsa`` and ``mlp``, with one time token or row for each sample; ``eps``
    of the two norms. Where x is float32 and the weights, by themselves or by autocast, have 16
    bits, x, its sums and the result stay float32.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``tmsa`` and ``mlp``.
    """
    require_rows("x", x)
    if not isinstance(scale, int | float | None):
        raise TypeError(f"scale: expected a number or None, got {scale!r}")
    window = as_pair("window_size", window_size)
    if temb is None:
        weights = weights._replace(temb=None, temb_bias=None)
    if weights.rel_pos_table is not None:
        weights = weights._replace(rel_pos_table=as_table(weights.rel_pos_table, x.dtype))
    tensors = (x, temb, row, *weights)
    sizes = (
        num_heads,
        window,
        as_grid(grid_size, x.shape[1], window),
        (x.shape[2] // num_heads) ** -0.5 if scale is None else float(scale),
        *map(float, eps),
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, *_ = _training(*tensors, *sizes)
        return y
    return _inference(*tensors, *sizes)


# Tensors that it takes: x, temb, row and the weights.
_INPUTS = 3 + len(Weights._fields)
_INPUTS_SCHEMA = (
    "Tensor x, Tensor? temb, Tensor? row, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor? temb_weight, Tensor? temb_bias, Tensor? rel_pos_table, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias"
)
_SIZES_SCHEMA = "SymInt num_heads, SymInt[] window_size, SymInt[] grid_size, float scale"
_SIZES_SCHEMA += ", float eps1, float eps2"  # of the norms
_SAVED_SCHEMA = ", ".join(f"Tensor saved_{name}" for name in Saved._fields)


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


@operator("block", f"({_INPUTS_SCHEMA}, {_SIZES_SCHEMA}) -> Tensor")
def _inference(*arguments: Any) -> Tensor:
    x, temb, row, weights, scale, eps = _named(arguments)
    problem, hidden = _problem(*arguments), weights.fc1.shape[0]
    heads, window = arguments[_INPUTS:][:2]
    mixed = x.dtype != weights.qkv.dtype
    if not mixed and _has_kernels(x, heads, window, hidden):
        return native.block(problem.attention, x, temb, row, weights, hidden, scale, eps)
    y, _ = layers.block(problem, x, temb, row, weights, scale, eps, save=False)
    return y


@operator(
    "block_training",
    f"({_INPUTS_SCHEMA}, {_SIZES_SCHEMA}) -> {_tensors(1 + len(Saved._fields))}",
)
def _training(*arguments: Any) -> tuple[Tensor, ...]:
    """The result, and what ``Saved`` names; a row that is not there has no elements."""
    x, temb, row, weights, scale, eps = _named(arguments)
    problem = _problem(*arguments)
    y, saved = layers.block(problem, x, temb, row, weights, scale, eps, save=True)
    assert saved is not None
    of_row, *others = saved
    if of_row is None:
        of_row = x.new_empty(0, dtype=weights.qkv.dtype)
    elif temb is None and (row is None or weights.qkv_bias is None):
        of_row = of_row.clone(memory_format=torch.contiguous_format)  # it is an input
    return y, of_row, *others


def _named(
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Weights, float, tuple[float, float]]:
    """x, temb, row, weights, scale and eps of the arguments of ``block``."""
    x, temb, row, *weights = arguments[:_INPUTS]
    *_, scale, eps1, eps2 = arguments
    return x, temb, row, Weights._make(weights), scale, (eps1, eps2)


@remembered
def _problem(
    x: Described,
    temb: Described | None,
    row: Described | None,
    qkv_weight: Described,
    qkv_bias: Described | None,
    temb_weight: Described | None,
    temb_bias: Described | None,
    rel_pos_table: Described | None,
    proj_weight: Described,
    proj_bias: Described | None,
    fc1_weight: Described,
    fc1_bias: Described,
    fc2_weight: Described,
    fc2_bias: Described,
    num_heads: int,
    window_size: Sequence[int],
    grid_size: Sequence[int],
    scale: float,
    eps1: float,
    eps2: float,
) -> BlockProblem:
    """Check the arguments and return their problem."""
    require_floating("x", x)
    require_tensor("qkv_weight", qkv_weight)
    mixed = x.dtype == torch.float32 and qkv_weight.dtype in HALF
    normed = Described(x.shape, qkv_weight.dtype if mixed else x.dtype, x.device)
    projections = (qkv_weight, qkv_bias, temb_weight, temb_bias, proj_weight, proj_bias)
    check_tmsa(normed, temb, row, *projections, False)
    batch, tokens, dim = x.shape
    for name, tensor in (("temb", temb), ("row", row)):
        if tensor is not None:
            require_shape(name, tensor, (batch, tensor.shape[1]))
    qkv = normed._replace(shape=torch.Size((batch, tokens, 3 * dim)))
    attention = WindowAttentionProblem.from_tensors(
        qkv, rel_pos_table, None, None, num_heads, window_size, grid_size, scale
    )
    perceptron = MLPProblem.from_tensors(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    require_shape("fc2_weight", fc2_weight, (dim, fc2_weight.shape[1]))
    for eps in (eps1, eps2):
        norm = AddLayerNormProblem.from_tensors(x, normed, eps)
    has_row = any(tensor is not None for tensor in (temb, row, qkv_bias))
    return BlockProblem(attention, norm, perceptron, has_row)


def _saved_like(problem: BlockProblem) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of ``Saved``."""
    attention, norm, perceptron = problem.attention, problem.norm, problem.perceptron
    batch, tokens, dim = attention.batch, attention.tokens, attention.dim
    return [
        ((batch, 3 * dim) if problem.has_row else (0,), attention.dtype),
        ((batch, tokens, 3 * dim), attention.dtype),
        ((batch, tokens, dim), attention.dtype),
        ((batch, attention.num_heads, tokens), attention.table_dtype),
        ((batch, tokens, dim), norm.dtype),
        ((norm.rows, perceptron.hidden_features), attention.dtype),
    ]


@_inference.register_fake
def _inference_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_training.register_fake
def _training_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved = _saved_like(_problem(x, *arguments))
    return x.new_empty(x.shape), *(x.new_empty(size, dtype=dtype) for size, dtype in saved)


@operator(
    "block_backward",
    f"(Tensor grad_y, {_SAVED_SCHEMA}, {_INPUTS_SCHEMA}, {_SIZES_SCHEMA}, bool of_weights) -> "
    f"{_tensors(_INPUTS)}",
)
def _backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the inputs; those of absent ones have no elements.

    Without ``of_weights`` those of the weights have none either.
    """
    *others, of_weights = arguments
    problem = _backward_problem(grad_y, *others)
    of_forward = arguments[len(Saved._fields) : -1]
    x, temb, _, weights, scale, eps = _named(of_forward)
    row, *saved = arguments[: len(Saved._fields)]
    kept = Saved(row if problem.has_row else None, *saved)
    with autocast.disabled(x):
        grads = layers.block_backward(
            problem, grad_y, x, temb, kept, weights, scale, eps, of_weights
        )
    return tuple(
        x.new_empty(0) if grad is None or tensor is None else grad
        for grad, tensor in zip(grads, of_forward[:_INPUTS], strict=True)
    )


@remembered
def _backward_problem(grad_y: Described, *arguments: Any) -> BlockProblem:
    """The same of the backward pass."""
    count = len(Saved._fields)
    saved, (x, *others) = arguments[:count], arguments[count:]
    problem = _problem(x, *others)
    require_like("grad_y", grad_y, x.dtype, x)
    require_shape("grad_y", grad_y, tuple(x.shape))
    for name, tensor, (size, dtype) in zip(Saved._fields, saved, _saved_like(problem), strict=True):
        require_like(f"saved_{name}", tensor, dtype, x)
        require_shape(f"saved_{name}", tensor, size)
    return problem


@_backward.register_fake
def _backward_fake(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = arguments[len(Saved._fields) :][:_INPUTS]
    of_weights = arguments[-1]
    wanted = inputs if of_weights else (*inputs[:3], *(None for _ in Weights._fields))
    return tuple(grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved = output[1:]
    ctx.save_for_backward(*saved, *inputs[:_INPUTS])
    ctx.sizes = inputs[_INPUTS:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or zeros would be made for what is saved


def _autograd(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    if grad_y is None:
        return (None,) * len(needed)
    grads = _backward(grad_y, *ctx.saved_tensors, *ctx.sizes, any(needed[3:]))
    present = (grad if need else None for grad, need in zip(grads, needed, strict=False))
    return *present, *(None for _ in ctx.sizes)


_inference.register_autograd(refusal="it is for inference")
_training.register_autograd(_autograd, _setup_context)
_backward.register_autograd()
for _operator in (_inference, _training):
    _operator.register_autocast(keep=(0, 3 + Weights._fields.index("rel_pos_table")))


@register_flop_formula([torch.ops.diffit.block, torch.ops.diffit.block_training])
def _flops(x: Any, temb: Any, row: Any, qkv_weight: Any, *others: Any, **_: Any) -> int:
    """Of the products, from the shapes of the arguments."""
    _, temb_weight, _, table, proj_weight, _, *perceptron, heads, window, _, _, _, _ = others
    batch, tokens, dim = x
    projections = 2 * batch * tokens * (prod(qkv_weight) + prod(proj_weight))
    of_token = 0 if temb is None else 2 * batch * prod(temb_weight)
    attention = attention_flops((batch, tokens, 3 * dim), table, None, None, heads, window)
    return projections + of_token + attention + mlp_flops(x, *perceptron)


@register_flop_formula(torch.ops.diffit.block_backward)
def _backward_flops(grad_y: Any, *arguments: Any, **_: Any) -> int:
    """For each product of a layer that for its input and, if asked, for its weights."""
    *inputs, of_weights = arguments[len(Saved._fields) :]
    batch, tokens, dim = grad_y
    heads, window = inputs[_INPUTS:][:2]
    attention = attention_flops((batch, tokens, 3 * dim), None, None, None, heads, window)
    return (2 if of_weights else 1) * (_flops(*inputs) - attention) + attention * 5 // 2
