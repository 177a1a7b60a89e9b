"""The Triton kernels for GPUs, as a backend."""

from __future__ import annotations

from functools import cache

import torch

from diffit_kernels.problem import AddLayerNormProblem, Problem, WindowAttentionProblem

_import_error: str | None = None
# The interpreter runs kernels on the CPU, for tests. It is chosen when they are imported.
_interpreted = False
try:
    import triton

    from diffit_kernels.triton.add_layer_norm import (
        MAX_FEATURES,
        add_layer_norm,
        add_layer_norm_backward,
        layer_norm,
        layer_norm_backward,
    )
    from diffit_kernels.triton.attention import window_attention, window_attention_backward
    from diffit_kernels.triton.block import add_layer_norm_mlp
    from diffit_kernels.triton.mlp import mlp, mlp_backward

    _interpreted = triton.knobs.runtime.interpret
except ImportError as error:
    _import_error = f"Triton could not be loaded ({error}); install the package triton"

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_layer_norm_mlp",
    "layer_norm",
    "layer_norm_backward",
    "mlp",
    "mlp_backward",
    "supports",
    "unavailable",
    "window_attention",
    "window_attention_backward",
]


def too_old() -> str | None:
    """Why the current device cannot run kernels for GPUs, or None."""
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return f"the device has compute capability {capability}, the kernels need (8, 0)"
    return None


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if _import_error is not None or _interpreted:
        return _import_error
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    return too_old()


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if problem.device_type != "cuda" and not (_interpreted and problem.device_type == "cpu"):
        return f"the tensors are on {problem.device_type}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{problem.dtype} is not one of float32, bfloat16, float16"
    dtypes = [problem.dtype]
    if isinstance(problem, AddLayerNormProblem):
        dtypes.append(problem.y_dtype)
        if problem.features > MAX_FEATURES:
            return f"a row of {problem.features} is longer than {MAX_FEATURES}"
    if isinstance(problem, WindowAttentionProblem):
        if problem.head_dim % 8 or not 8 <= problem.head_dim <= 128:
            return f"head width {problem.head_dim} is not a multiple of 8 from 8 to 128"
        if problem.window_size[1] > 64:
            return f"window {problem.window_size} is wider than 64"
    if _interpreted and torch.bfloat16 in dtypes:
        return "the interpreter of Triton rounds and multiplies bfloat16 wrongly"
    return None
