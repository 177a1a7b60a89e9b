"""Fused attention with a relative position bias and a time token, as PyTorch operators.

    out = window_attention(qkv, table, num_heads=8, window_size=8, q_row=q_row, v_row=v_row)
    out = tmsa(x, temb, ...)             # with its projections
    out = mlp(x, w1, b1, w2, b2)         # Linear, tanh-GELU, Linear
    s, n = add_layer_norm(x, y)          # x + y, and its layer norm
    n = layer_norm(x)                    # that of x alone

``available_backends()`` tells what can run here; ``use_backend(name)`` chooses.
"""

from diffit_kernels.dispatch import available_backends, use_backend
from diffit_kernels.ops import add_layer_norm, layer_norm, mlp, time_rows, tmsa, window_attention
from diffit_kernels.problem import AddLayerNormProblem, MLPProblem, WindowAttentionProblem
from diffit_kernels.reference import relative_position_index

__version__ = "0.1.0"

__all__ = [
    "AddLayerNormProblem",
    "MLPProblem",
    "WindowAttentionProblem",
    "add_layer_norm",
    "available_backends",
    "layer_norm",
    "mlp",
    "relative_position_index",
    "time_rows",
    "tmsa",
    "use_backend",
    "window_attention",
]
