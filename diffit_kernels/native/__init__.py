"""The compiled CPU kernels of ``csrc``, as a backend."""

from __future__ import annotations

from diffit_kernels.native.attention import (
    supports_window,
    window_attention,
    window_attention_backward,
)
from diffit_kernels.native.layers import (
    block,
    has_product,
    has_weight_gradient,
    is_fused,
    linear,
    mlp,
    mlp_backward,
    mm,
    weight_gradient,
)
from diffit_kernels.native.library import (
    DTYPES,
    instruction_set,
    instruction_sets,
    unavailable,
    use_instruction_set,
)
from diffit_kernels.native.norms import (
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from diffit_kernels.problem import Problem, WindowAttentionProblem

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "block",
    "has_product",
    "has_weight_gradient",
    "instruction_set",
    "instruction_sets",
    "is_fused",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "mlp",
    "mlp_backward",
    "mm",
    "supports",
    "supports_window",
    "unavailable",
    "use_instruction_set",
    "weight_gradient",
    "window_attention",
    "window_attention_backward",
]


def supports(problem: Problem) -> str | None:
    """Why the compiled kernels cannot run this problem, or None."""
    if problem.device_type != "cpu":
        return f"the tensors are on {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not one of float32, bfloat16, float16"
    if isinstance(problem, WindowAttentionProblem):
        return supports_window(problem.head_dim, problem.window_size)
    return None
