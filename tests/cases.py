"""Random problems of the operators, with their float64 truth and what plain PyTorch gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

import diffit_kernels as dk
from diffit_kernels import reference
from diffit_kernels.problem import WindowAttentionProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The largest error of a handful of numbers is luck: a problem is drawn as often as it takes for
# its smallest output to have this many independent ones, and all draws are judged together.
NUMBERS = 128

Tensors = dict[str, Tensor]
OptionalTensors = dict[str, Tensor | None]


def _embed(x: Tensor, shape: tuple[int, ...], where: tuple[slice, ...]) -> Tensor:
    """A view with the values of ``x`` on a larger tensor that is NaN around it."""
    around = x.new_full(shape, torch.nan)
    around[where] = x
    return around[where]


def with_gaps(x: Tensor) -> Tensor:
    """The same values, the last dimension outermost in memory, with a NaN after each."""
    return _embed(x.movedim(-1, 0), (x.shape[-1], *x.shape[:-1], 2), (..., 0)).movedim(0, -1)


# Ways to store (B, L, C). Expanding repeats values, the others keep them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "sliced channels": lambda x: _embed(
        x, (*x.shape[:-1], x.shape[-1] + 8), (..., slice(3, x.shape[-1] + 3))
    ),
    "sliced tokens": lambda x: _embed(
        x, (x.shape[0], 2 * x.shape[1] + 1, x.shape[2]), (slice(None), slice(1, None, 2))
    ),
    "every other channel": lambda x: _embed(
        x, (*x.shape[:-1], 2 * x.shape[-1]), (..., slice(None, None, 2))
    ),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "unaligned": lambda x: _embed(x.flatten(), (x.numel() + 1,), (slice(1, None),)).view(x.shape),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded tokens": lambda x: x[:, :1].expand_as(x),
    "expanded scalar": lambda x: x[:1, :1, :1].expand_as(x),
}


@dataclass(frozen=True)
class AttentionCase:
    """``window_attention`` on ``windows`` (down, across) windows of random numbers.

    ``scale`` is in units of head_dim ** -0.5, ``shift`` is added to the table. With ``constant``
    all tokens of a sample are equal. The rows are parts of one projection; with ``strided`` they
    and the table are views with gaps between all numbers. The operator runs on ``device``, what it
    is compared with on the CPU.
    """

    window: tuple[int, int]
    head_dim: int
    dtype: torch.dtype = torch.float32
    windows: tuple[int, int] = (1, 1)
    heads: int = 2
    batch: int = 2
    table: bool = True
    q_row: bool = True
    v_row: bool = True
    scale: float = 1.0
    shift: float = 0.0
    constant: bool = False
    strided: bool = False
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    device: str = "cpu"

    @property
    def problem(self) -> WindowAttentionProblem:
        grid = (self.window[0] * self.windows[0], self.window[1] * self.windows[1])
        return WindowAttentionProblem(
            self.batch, grid, self.window, self.heads, self.head_dim, self.dtype, self.device
        )

    @property
    def arguments(self) -> tuple[int, tuple[int, int], tuple[int, int], float]:
        """num_heads, window_size, grid_size and scale, as the operator takes them."""
        return self.heads, self.window, self.problem.grid_size, self.scale * self.head_dim**-0.5

    @property
    def draws(self) -> int:
        rows = self.batch * self.problem.dim
        if self.constant or "expanded" in self.layout + self.grad_layout:
            rows = self.batch * self.heads
        sizes = [rows, self.batch * self.heads * self.problem.tokens]
        if self.table:
            # Large offsets in a window are rare, so their entries are sums of few terms.
            sizes.append(self.heads * self.problem.table_rows // 4)
        return _draws(*sizes)

    def inputs(self, draw: int = 0) -> OptionalTensors:
        """qkv, rel_pos_table, q_row and v_row."""
        problem, uniform = self.problem, _uniform(draw, self.device)
        qkv = uniform(self.batch, problem.tokens, 3 * problem.dim).to(self.dtype)
        if self.constant:
            qkv = qkv[:, :1].repeat(1, problem.tokens, 1)
        table = uniform(problem.table_rows, self.heads).to(problem.table_dtype) + self.shift
        q_row, k_row, v_row = uniform(self.batch, 3 * problem.dim).to(self.dtype).chunk(3, dim=1)
        k_row.fill_(torch.nan)
        if self.strided:
            table, q_row, v_row = map(with_gaps, (table, q_row, v_row))
        return {
            "qkv": LAYOUTS[self.layout](qkv),
            "rel_pos_table": table if self.table else None,
            "q_row": q_row if self.q_row else None,
            "v_row": v_row if self.v_row else None,
        }

    def grad_out(self, draw: int = 0) -> Tensor:
        problem = self.problem
        uniform = _uniform(-1 - draw, self.device)
        grad = uniform(self.batch, problem.tokens, problem.dim).to(self.dtype)
        return LAYOUTS[self.grad_layout](grad)

    def operator(self, draws: int | None = None) -> Tensors:
        """What ``torch.ops.diffit.window_attention`` gives on the backend in use."""
        outputs = self._outputs(
            lambda *tensors: torch.ops.diffit.window_attention(*tensors, *self.arguments),
            draws=draws,
        )
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def plain(self, device: str = "cpu") -> Tensors:
        """The equations in PyTorch, differentiated by autograd, in the dtype of the case.

        In float32 with TF32 where that is allowed at the time.
        """
        return self._plain(device, torch.get_float32_matmul_precision())

    @cache
    def _plain(self, device: str, precision: str) -> Tensors:
        case = replace(self, device=device)
        return case._outputs(partial(_plain_attention, case))

    @cache
    def truth(self, device: str = "cpu") -> Tensors:
        """The equations in float64 on the same rounded inputs."""
        case = replace(self, device=device)
        exact = replace(case, dtype=torch.float64)
        return case._outputs(partial(_plain_attention, exact), torch.Tensor.double)

    def _outputs(
        self,
        forward: Callable[..., tuple[Tensor, Tensor]],
        convert: Callable[[Tensor], Tensor] = torch.Tensor.detach,
        draws: int | None = None,
    ) -> Tensors:
        outputs = [
            attention_outputs(
                forward,
                {k: None if x is None else convert(x) for k, x in self.inputs(draw).items()},
                convert(self.grad_out(draw)),
            )
            for draw in range(draws or self.draws)
        ]
        return stack(outputs)


def _plain_attention(case: AttentionCase, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.window_attention(case.problem, *tensors, case.arguments[-1])


def attention_outputs(
    forward: Callable[..., tuple[Tensor, Tensor]], inputs: OptionalTensors, grad_out: Tensor
) -> Tensors:
    """out, lse and the gradient of every input that is there."""
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    out, lse = forward(*leaves.values())
    return {"out": out.detach(), "lse": lse.detach()} | gradients(out, leaves, grad_out)


@dataclass(frozen=True)
class MLPCase:
    """``mlp`` on random numbers, weights scaled by the square root of their columns.

    ``shape`` is that of x. With ``spread`` the first layer's bias runs evenly from -spread to it,
    with ``strided`` weights and biases are views with gaps. ``residual`` is the dtype of one, its
    numbers ``residual_size`` times those of the rest.
    """

    shape: tuple[int, ...]
    hidden: int
    out: int
    dtype: torch.dtype = torch.float32
    spread: float | None = None
    residual: torch.dtype | None = None
    residual_size: float = 1.0
    strided: bool = False
    layout: str = "contiguous"
    grad_layout: str = "contiguous"

    @property
    def draws(self) -> int:
        *lead, features = self.shape
        rows = 1 if "expanded" in self.layout + self.grad_layout else math.prod(lead)
        return _draws(rows * features, rows * self.out, self.hidden, self.out)

    def inputs(self, draw: int = 0) -> Tensors:
        """x, fc1_weight, fc1_bias, fc2_weight, fc2_bias and, if there is one, the residual."""
        uniform, features = _uniform(draw), self.shape[-1]
        bias = uniform(self.hidden)
        if self.spread is not None:
            bias = torch.linspace(-self.spread, self.spread, self.hidden, dtype=torch.float64)
        tensors = {
            "x": uniform(*self.shape),
            "fc1_weight": uniform(self.hidden, features) * features**-0.5,
            "fc1_bias": bias,
            "fc2_weight": uniform(self.out, self.hidden) * self.hidden**-0.5,
            "fc2_bias": uniform(self.out),
        }
        tensors = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
        if self.strided:
            tensors = {name: with_gaps(tensor) for name, tensor in tensors.items()}
        tensors["x"] = LAYOUTS[self.layout](tensors["x"])
        if self.residual is not None:
            residual = uniform(*self.shape[:-1], self.out) * self.residual_size
            tensors["residual"] = LAYOUTS[self.layout](residual.to(self.residual))
        return tensors

    def grad_y(self, draw: int = 0) -> Tensor:
        grad = _uniform(-1 - draw)(*self.shape[:-1], self.out).to(self.residual or self.dtype)
        return LAYOUTS[self.grad_layout](grad)

    def operator(
        self,
        draws: int | None = None,
        convert: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    ) -> Tensors:
        """What ``mlp`` gives on the backend in use."""
        return self._outputs(dk.mlp, convert, draws)

    @cache
    def plain(self, convert: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Tensors:
        """Linear, GELU, Linear of PyTorch in the dtype of the case."""
        return self._outputs(plain_mlp, convert)

    @cache
    def truth(self, convert: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Tensors:
        """The same in float64 on the same rounded inputs."""
        return self._outputs(plain_mlp, lambda x: convert(x).double())

    def _outputs(
        self,
        forward: Callable[..., Tensor],
        convert: Callable[[Tensor], Tensor] = torch.Tensor.detach,
        draws: int | None = None,
    ) -> Tensors:
        outputs = [
            mlp_outputs(
                forward,
                {name: convert(tensor) for name, tensor in self.inputs(draw).items()},
                convert(self.grad_y(draw)),
            )
            for draw in range(draws or self.draws)
        ]
        return stack(outputs)


def plain_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = linear(gelu(linear(x, w1, b1), approximate="tanh"), w2, b2)
    return y if residual is None else residual + y


def mlp_outputs(forward: Callable[..., Tensor], inputs: Tensors, grad_y: Tensor) -> Tensors:
    """y and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y = forward(*leaves.values())
    return {"y": y.detach()} | gradients(y, leaves, grad_y)


@dataclass(frozen=True)
class AddLayerNormCase:
    """``add_layer_norm`` on random numbers that are never nearly equal along a row.

    The gradient of a nearly constant row is large and ill-conditioned: one such row in a few
    hundred would be the largest error of all. ``y_dtype`` is ``dtype`` where it is None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype | None = None
    offset: float = 0.0
    layout: str = "contiguous"
    grad_layout: str = "contiguous"

    @property
    def draws(self) -> int:
        expanded = "expanded" in self.layout + self.grad_layout
        return _draws(self.shape[-1] if expanded else math.prod(self.shape))

    def inputs(self, draw: int = 0) -> Tensors:
        """x and y."""
        uniform = _uniform(draw)
        apart = 4.0 * (-1) ** torch.arange(self.shape[-1])
        x, y = uniform(*self.shape) + apart + self.offset, uniform(*self.shape)
        return dict(zip("xy", self._as_stored(self.layout, x, y), strict=True))

    def grads(self, draw: int = 0) -> tuple[Tensor, ...]:
        uniform = _uniform(-1 - draw)
        return self._as_stored(self.grad_layout, uniform(*self.shape), uniform(*self.shape))

    def _as_stored(self, layout: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        store = LAYOUTS[layout]
        return store(x.to(self.dtype)), store(y.to(self.y_dtype or self.dtype))

    def operator(
        self,
        draws: int | None = None,
        convert: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    ) -> Tensors:
        """What the operator gives on the backend in use."""
        return self._outputs(self.fused, convert, draws)

    @cache
    def plain(self, convert: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Tensors:
        """Addition and layer norm of PyTorch in the dtypes of the case."""
        return self._outputs(self.unfused, convert)

    @cache
    def truth(self, convert: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Tensors:
        """The same in float64 on the same rounded inputs."""
        return self._outputs(self.unfused, lambda x: convert(x).double())

    def fused(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return dk.add_layer_norm(*inputs)

    def unfused(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return plain_add_layer_norm(*inputs)

    def _outputs(
        self,
        forward: Callable[..., tuple[Tensor, ...]],
        convert: Callable[[Tensor], Tensor] = torch.Tensor.detach,
        draws: int | None = None,
    ) -> Tensors:
        outputs = [
            add_layer_norm_outputs(
                forward,
                {name: convert(tensor) for name, tensor in self.inputs(draw).items()},
                tuple(map(convert, self.grads(draw))),
            )
            for draw in range(draws or self.draws)
        ]
        return stack(outputs)


@dataclass(frozen=True)
class LayerNormCase(AddLayerNormCase):
    """``layer_norm`` of the same x; ``y_dtype``, of the result, by autocast."""

    def inputs(self, draw: int = 0) -> Tensors:
        """x."""
        return {"x": super().inputs(draw)["x"]}

    def grads(self, draw: int = 0) -> tuple[Tensor, ...]:
        return super().grads(draw)[1:]

    def fused(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.y_dtype in (None, self.dtype):
            return (dk.layer_norm(*inputs),)
        with torch.autocast(inputs[0].device.type, self.y_dtype):
            return (dk.layer_norm(*inputs),)

    def unfused(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        n = layer_norm(x, x.shape[-1:], eps=1e-6)
        return (n if x.dtype == torch.float64 else n.to(self.y_dtype or x.dtype),)


def plain_add_layer_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    s = x + y
    return s, layer_norm(s, s.shape[-1:], eps=1e-6).to(y.dtype)


def add_layer_norm_outputs(
    forward: Callable[..., tuple[Tensor, ...]], inputs: Tensors, grads: tuple[Tensor, ...]
) -> Tensors:
    """s, where it is given, n and the gradients of what is there of x and y."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    results = forward(*leaves.values())
    named = dict(zip("sn"[-len(results) :], (x.detach() for x in results), strict=True))
    return named | gradients(results, leaves, grads)


def gradients(
    out: Tensor | tuple[Tensor, ...],
    leaves: OptionalTensors,
    grad_out: Tensor | tuple[Tensor, ...],
) -> Tensors:
    """``grad_<name>`` of every leaf that is there."""
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(out, list(present.values()), grad_out)
    return {f"grad_{name}": grad for name, grad in zip(present, grads, strict=True)}


def _draws(*output_sizes: int) -> int:
    return math.ceil(NUMBERS / max(min(output_sizes), 1))


def stack(draws: list[Tensors]) -> Tensors:
    """The outputs of several draws, to be judged together."""
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def _uniform(seed: int, device: str = "cpu") -> Callable[..., Tensor]:
    """Mean 0, variance 1, and no outliers on which a largest error would hang."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        numbers = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return (numbers * 12**0.5 - 3**0.5).to(device)

    return uniform
