"""A pass of an operator on random numbers, and what its results may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from diffit_kernels import reference, triton
from diffit_kernels.problem import (
    AddLayerNormProblem,
    MLPProblem,
    Problem,
    WindowAttentionProblem,
)
from diffit_kernels.triton.attention import named
from diffit_kernels.tune.layers import Layer

MLP_RATIO = 4
EPS = 1e-6
# Slots of a window up to which it is a small one.
SMALL = 64

Results = tuple[Tensor, ...]
Shape = dict[str, int]
Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """A function of the backends with its arguments.

    Args:
        function: its name.
        problem: its first argument.
        arguments: the others.
        kernels: for each kernel that Triton's launches, the shape of its entry in a table.
        formula: its results in plain PyTorch, from inputs that are converted first.
    """

    function: str
    problem: Problem
    arguments: tuple[Any, ...]
    kernels: dict[str, Shape]
    formula: Callable[[Convert], Results]

    def run(self, backend: ModuleType = triton, **options: Any) -> Results:
        """What a backend gives."""
        results = getattr(backend, self.function)(self.problem, *self.arguments, **options)
        if isinstance(results, Tensor):
            return (results,)
        return tuple(result for result in results if result is not None)

    def is_right(self, results: Results) -> bool:
        """Whether they keep the numeric rule: at most twice the error of plain PyTorch + 1e-6."""
        return all(
            _error(result, exact) <= limit  # false for NaN
            for result, (exact, limit) in zip(results, self._allowed, strict=True)
        )

    @cached_property
    def _allowed(self) -> list[tuple[Tensor, float]]:
        """The truth in float64, and how far a result may be from it."""
        truth, plain = self.formula(torch.Tensor.double), self.formula(torch.Tensor.detach)
        pairs = zip(truth, plain, strict=True)
        return [(exact, 2 * _error(result, exact) + 1e-6) for exact, result in pairs]


def _error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item()


def passes(operator: str, layer: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[Pass]:
    """Those of an operator in a layer: forward, forward in training if that differs, backward.

    None where there is nothing to tune: of the MLP in float32, whose products are PyTorch's.
    """
    if operator == "mlp" and dtype == torch.float32:
        return
    make = {"window_attention": _attention, "mlp": _mlp, "add_layer_norm": _add_layer_norm}
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    yield from make[operator](layer, dtype, normal)


Normal = Callable[..., Tensor]


def _attention(layer: Layer, dtype: torch.dtype, normal: Normal) -> Iterator[Pass]:
    side = (layer.window, layer.window)
    tokens, dim = layer.grid**2, layer.dim
    qkv = normal(layer.batch, tokens, 3 * dim)
    q_row, v_row = normal(layer.batch, dim), normal(layer.batch, dim)
    problem = WindowAttentionProblem(
        layer.batch,
        (layer.grid, layer.grid),
        side,
        layer.num_heads,
        layer.head_dim,
        dtype,
        qkv.device.type,
    )
    table = normal(problem.table_rows, layer.num_heads, dtype=torch.float32)
    inputs, scale = (qkv, table, q_row, v_row), layer.head_dim**-0.5

    def formula(qkv: Tensor, table: Tensor, q_row: Tensor, v_row: Tensor) -> Results:
        exact = replace(problem, dtype=qkv.dtype)
        return reference.window_attention(exact, qkv, table, q_row, v_row, scale)

    shape = {"window_tokens": problem.window_tokens, "head_dim": layer.head_dim}
    size = "small" if problem.window_tokens <= SMALL else "large"
    yield Pass(
        "window_attention",
        problem,
        (*inputs, scale),
        {named(f"{size}_forward", problem, qkv.device): shape},
        partial(_evaluate, formula, inputs, ()),
    )
    grad = normal(layer.batch, tokens, dim)
    _, lse = triton.window_attention(problem, *inputs, scale)
    kernels = ["small_backward"]
    if size == "large":
        kernels = [f"large_backward_{name}" for name in ("q", "kv", "table")]
    yield Pass(
        "window_attention_backward",
        problem,
        (grad, *inputs, lse, scale),
        dict.fromkeys([named(kernel, problem, qkv.device) for kernel in kernels], shape),
        partial(_evaluate, formula, inputs, (grad,)),
    )


def _mlp(layer: Layer, dtype: torch.dtype, normal: Normal) -> Iterator[Pass]:
    rows, dim, hidden = layer.batch * layer.grid**2, layer.dim, MLP_RATIO * layer.dim
    x, residual = normal(rows, dim), normal(rows, dim)
    w1, w2 = normal(hidden, dim) * dim**-0.5, normal(dim, hidden) * hidden**-0.5
    weights = (w1, normal(hidden), w2, normal(dim))
    problem = MLPProblem(rows, dim, hidden, dim, dtype, x.device.type)

    def formula(
        x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor | None = None
    ) -> Results:
        y = linear(gelu(linear(x, w1, b1), approximate="tanh"), w2, b2)
        return (y if residual is None else residual + y,)

    def with_hidden(x: Tensor, w1: Tensor, *others: Tensor) -> Results:
        return *formula(x, w1, *others), linear(x, w1)

    first, last = {"rows": rows, "features": hidden}, {"rows": rows, "features": dim}
    inputs = (x, *weights, residual)
    yield Pass(
        "mlp",
        problem,
        (*inputs, False),
        {"mlp_gelu": first, "mlp_bias": last},
        partial(_evaluate, formula, inputs, ()),
    )
    yield Pass(
        "mlp",
        problem,
        (*inputs, True),
        {"mlp_gelu_hidden": first, "mlp_bias": last},
        partial(_evaluate, with_hidden, inputs, ()),
    )
    grad = normal(rows, dim)
    _, saved = triton.mlp(problem, *inputs, save_hidden=True)
    yield Pass(
        "mlp_backward",
        problem,
        (grad, x, *weights[:3], saved, True),
        {"mlp_gelu_backward": first},
        partial(_evaluate, formula, inputs[:5], (grad,)),
    )


def _add_layer_norm(layer: Layer, dtype: torch.dtype, normal: Normal) -> Iterator[Pass]:
    rows, dim = layer.batch * layer.grid**2, layer.dim
    x, y = normal(rows, dim), normal(rows, dim)
    problem = AddLayerNormProblem(rows, dim, dtype, dtype, x.device.type)

    def formula(x: Tensor, y: Tensor) -> Results:
        return x + y, layer_norm(x + y, (dim,), eps=EPS)

    shape = {"rows": rows, "features": dim}
    yield Pass(
        "add_layer_norm",
        problem,
        (x, y, EPS),
        {"add_layer_norm": shape},
        partial(_evaluate, formula, (x, y), ()),
    )
    grads = (normal(rows, dim), normal(rows, dim))
    total, _ = triton.add_layer_norm(problem, x, y, EPS)
    yield Pass(
        "add_layer_norm_backward",
        problem,
        (*grads, total, EPS),
        {"add_layer_norm_backward": shape},
        partial(_evaluate, lambda x: formula(x, y.to(x.dtype)), (x,), grads),
    )


def _evaluate(
    formula: Callable[..., Results],
    inputs: Sequence[Tensor],
    grads: Results,
    convert: Convert,
) -> Results:
    """The results of a formula; where gradients of the first of them are given, those of inputs."""
    leaves = [convert(x).requires_grad_(bool(grads)) for x in inputs]
    outputs = formula(*leaves)
    if not grads:
        return outputs
    return torch.autograd.grad(outputs[: len(grads)], leaves, [convert(x) for x in grads])
