"""The shape of a problem: the noun that checks, kernels, tests and benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, *HALF, torch.float64)

Answer = TypeVar("Answer")


class Described(NamedTuple):
    """What checks see of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_TENSOR = (Tensor, Described)
_MOST_ANSWERS = 1024


def remembered(check: Callable[..., Answer]) -> Callable[..., Answer]:
    """A check that remembers its answers, each for all calls with arguments like that.

    It is called with tensors and gets them as ``Described``. In a small layer the checks would take
    longer than the kernels.
    """
    answers: dict[tuple[Any, ...], Answer] = {}

    @wraps(check)
    def call(*args: Any) -> Answer:
        if torch.compiler.is_compiling():  # compilers guard sizes themselves
            return check(*[_described(arg) for arg in args])
        key = tuple(
            [(arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else arg for arg in args]
        )
        try:
            return answers[key]
        except (KeyError, TypeError):  # lists, and sizes that are symbols, have no hash
            pass
        answer = check(*[_described(arg) for arg in args])
        if len(answers) >= _MOST_ANSWERS:
            answers.clear()
        with suppress(TypeError):
            answers[key] = answer
        return answer

    return call


def _described(arg: Any) -> Any:
    return Described(arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else arg


@dataclass(frozen=True)
class WindowAttentionProblem:
    """Softmax attention with a relative position bias inside non-overlapping windows of a grid."""

    batch: int
    grid_size: tuple[int, int]
    window_size: tuple[int, int]
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device_type: str

    @property
    def dim(self) -> int:
        """Channels C of all heads."""
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens L of one sample."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def window_tokens(self) -> int:
        """Tokens M of one window."""
        return self.window_size[0] * self.window_size[1]

    @property
    def windows(self) -> int:
        """Windows of one sample."""
        return self.tokens // self.window_tokens

    @property
    def table_rows(self) -> int:
        """Relative offsets (2 wh - 1) (2 ww - 1)."""
        return (2 * self.window_size[0] - 1) * (2 * self.window_size[1] - 1)

    @property
    def table_dtype(self) -> torch.dtype:
        """Dtype of the bias table and of the log-sum-exp."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def flops(self) -> int:
        """Multiply-adds of the two attention products, counted as two operations each."""
        return 4 * self.batch * self.num_heads * self.tokens * self.window_tokens * self.head_dim

    @classmethod
    @remembered
    def from_tensors(
        cls,
        qkv: Described,
        rel_pos_table: Described | None,
        q_row: Described | None,
        v_row: Described | None,
        num_heads: int,
        window_size: Sequence[int],
        grid_size: Sequence[int],
        scale: float,
    ) -> WindowAttentionProblem:
        """Check the arguments of ``window_attention`` and return their problem.

        Raises:
            TypeError: a dtype or device that is not supported or not the one of ``qkv``.
            ValueError: a shape, window, grid or scale that does not fit.
        """
        require_floating("qkv", qkv)
        if len(qkv.shape) != 3:
            raise ValueError(f"qkv: expected (B, L, 3C), got shape {shape(qkv)}")
        batch, tokens, packed = qkv.shape
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
        if packed == 0 or packed % (3 * num_heads):
            raise ValueError(
                f"qkv: expected a last dimension divisible by 3 * num_heads = {3 * num_heads}, "
                f"got shape {shape(qkv)}"
            )
        if batch == 0:
            raise ValueError(f"qkv: expected at least one sample, got shape {shape(qkv)}")
        height, width = require_pair("grid_size", grid_size)
        wh, ww = require_pair("window_size", window_size)
        if height * width != tokens:
            raise ValueError(
                f"grid_size: expected height * width = L = {tokens}, got ({height}, {width})"
            )
        if height % wh or width % ww:
            raise ValueError(
                f"window_size: expected a divisor of grid_size ({height}, {width}), "
                f"got ({wh}, {ww})"
            )
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        problem = cls(
            batch=batch,
            grid_size=(height, width),
            window_size=(wh, ww),
            num_heads=num_heads,
            head_dim=packed // (3 * num_heads),
            dtype=qkv.dtype,
            device_type=qkv.device.type,
        )
        if rel_pos_table is not None:
            require_like("rel_pos_table", rel_pos_table, problem.table_dtype, qkv)
            require_shape("rel_pos_table", rel_pos_table, (problem.table_rows, num_heads))
        for name, row in (("q_row", q_row), ("v_row", v_row)):
            if row is not None:
                require_like(name, row, qkv.dtype, qkv)
                require_shape(name, row, (batch, problem.dim))
        return problem


@dataclass(frozen=True)
class MLPProblem:
    """Linear, tanh-GELU, Linear over ``rows`` tokens."""

    rows: int
    in_features: int
    hidden_features: int
    out_features: int
    dtype: torch.dtype
    device_type: str

    @classmethod
    @remembered
    def from_tensors(
        cls,
        x: Described,
        fc1_weight: Described,
        fc1_bias: Described,
        fc2_weight: Described,
        fc2_bias: Described,
        residual: Described | None = None,
    ) -> MLPProblem:
        """Check the arguments of ``mlp`` and return their problem.

        Raises:
            TypeError: a dtype or device that is not supported or not the one of ``x``.
            ValueError: a shape that does not fit.
        """
        require_floating("x", x)
        rows, features = require_rows("x", x)
        for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
            require_like(name, weight, x.dtype, x)
            if len(weight.shape) != 2 or 0 in weight.shape:
                raise ValueError(
                    f"{name}: expected (out_features, in_features), got shape {shape(weight)}"
                )
        hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
        require_shape("fc1_weight", fc1_weight, (hidden, features))
        require_shape("fc2_weight", fc2_weight, (out, hidden))
        for name, bias, size in (("fc1_bias", fc1_bias, hidden), ("fc2_bias", fc2_bias, out)):
            require_like(name, bias, x.dtype, x)
            require_shape(name, bias, (size,))
        if residual is not None:
            require_tensor("residual", residual)
            mixed = residual.dtype == torch.float32 and x.dtype in HALF
            require_like("residual", residual, residual.dtype if mixed else x.dtype, x)
            require_shape("residual", residual, (*shape(x)[:-1], out))
        return cls(rows, features, hidden, out, x.dtype, x.device.type)


@dataclass(frozen=True)
class AddLayerNormProblem:
    """A sum of two tensors and its layer norm, or that of x alone, over ``rows`` of ``features``.

    ``dtype`` is that of x and of the sum, ``y_dtype`` that of y and of the norm.
    """

    rows: int
    features: int
    dtype: torch.dtype
    y_dtype: torch.dtype
    device_type: str

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of the sum before it is rounded, and of the statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @classmethod
    @remembered
    def from_tensors(cls, x: Described, y: Described, eps: float) -> AddLayerNormProblem:
        """Check the arguments of ``add_layer_norm`` and return their problem.

        Raises:
            TypeError: a dtype or device that is not supported or does not fit that of ``x``.
            ValueError: a shape or eps that does not fit.
        """
        require_floating("x", x)
        rows, features = require_rows("x", x)
        require_tensor("y", y)
        mixed = x.dtype == torch.float32 and y.dtype in HALF
        require_like("y", y, y.dtype if mixed else x.dtype, x)
        require_shape("y", y, shape(x))
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps: expected a positive finite number, got {eps}")
        return cls(rows, features, x.dtype, y.dtype, x.device.type)

    @classmethod
    @remembered
    def of_norm(cls, x: Described, dtype: torch.dtype, eps: float) -> AddLayerNormProblem:
        """Check the arguments of ``layer_norm``, whose result has ``dtype``, likewise."""
        problem = cls.from_tensors(x, x, eps)
        if dtype != x.dtype and not (x.dtype == torch.float32 and dtype in HALF):
            raise TypeError(f"dtype: expected {x.dtype}, got {dtype}")
        return cls(problem.rows, problem.features, x.dtype, dtype, x.device.type)


Problem = WindowAttentionProblem | MLPProblem | AddLayerNormProblem


@dataclass(frozen=True)
class BlockProblem:
    """A transformer block: its attention, both norms, its perceptron.

    ``has_row`` tells whether anything is added to every token's q, k and v.
    """

    attention: WindowAttentionProblem
    norm: AddLayerNormProblem
    perceptron: MLPProblem
    has_row: bool


def shape(tensor: Tensor | Described) -> tuple[int, ...]:
    """The shape as error messages print it."""
    return tuple(tensor.shape)


def require_pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    """Two positive integers, or ValueError."""
    if len(value) != 2 or value[0] < 1 or value[1] < 1:
        raise ValueError(f"{name}: expected two positive integers, got {tuple(value)}")
    return value[0], value[1]


def require_tensor(name: str, value: Tensor | Described) -> None:
    """TypeError unless it is one."""
    if not isinstance(value, _TENSOR):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def require_floating(name: str, tensor: Tensor | Described) -> None:
    """TypeError unless it is a tensor of a floating dtype that the operators take."""
    require_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )


def require_rows(name: str, tensor: Tensor | Described) -> tuple[int, int]:
    """Rows and features of (..., C), or ValueError."""
    if not tensor.shape or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected (..., C), got shape {shape(tensor)}")
    *sizes, features = tensor.shape
    rows = math.prod(sizes)
    if rows == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {shape(tensor)}")
    return rows, features


def require_like(
    name: str, tensor: Tensor | Described, dtype: torch.dtype, like: Tensor | Described
) -> None:
    """TypeError unless ``tensor`` is one, of ``dtype`` and on the device of ``like``."""
    require_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise TypeError(f"{name}: expected device {like.device}, got {tensor.device}")


def require_shape(name: str, tensor: Tensor | Described, expected: tuple[int, ...]) -> None:
    """ValueError unless ``tensor`` has the expected shape."""
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {shape(tensor)}")
