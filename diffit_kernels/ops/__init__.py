"""The operators ``torch.ops.diffit.*``: schema, checks, fake, autograd, autocast. No maths."""

from diffit_kernels.ops.add_layer_norm import add_layer_norm
from diffit_kernels.ops.block import block
from diffit_kernels.ops.layer_norm import layer_norm
from diffit_kernels.ops.mlp import mlp
from diffit_kernels.ops.tmsa import time_rows, tmsa
from diffit_kernels.ops.window_attention import window_attention

__all__ = [
    "add_layer_norm",
    "block",
    "layer_norm",
    "mlp",
    "time_rows",
    "tmsa",
    "window_attention",
]
