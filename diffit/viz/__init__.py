"""Pictures of what the attention of a network does."""

from diffit.viz.attention import AttentionRecorder, Moment, attention_received, record_sampling
from diffit.viz.bias import bias_tables
from diffit.viz.draw import draw_attention, draw_bias, draw_losses

__all__ = [
    "AttentionRecorder",
    "Moment",
    "attention_received",
    "bias_tables",
    "draw_attention",
    "draw_bias",
    "draw_losses",
    "record_sampling",
]
