"""The definition of every operator, in plain PyTorch: any floating dtype, any device."""

from diffit_kernels.reference.add_layer_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from diffit_kernels.reference.mlp import mlp, mlp_backward
from diffit_kernels.reference.window_attention import (
    relative_position_index,
    window_attention,
    window_attention_backward,
)

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "mlp",
    "mlp_backward",
    "relative_position_index",
    "supports",
    "unavailable",
    "window_attention",
    "window_attention_backward",
]


def unavailable() -> None:
    """The reference runs everywhere."""


def supports(problem: object) -> None:
    """The reference takes every problem."""
