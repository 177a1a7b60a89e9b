"""The published layer, operation by operation: the logits and the bias are stored."""

from __future__ import annotations

from torch import Tensor

from diffit_kernels import WindowAttentionProblem, relative_position_index
from peers.layer import Attend, Peer


def attend(problem: WindowAttentionProblem) -> Attend:
    """Scaled logits plus the gathered bias, softmax, values."""
    tokens, scale = problem.window_tokens, problem.head_dim**-0.5
    index = relative_position_index(problem.window_size).flatten().to(problem.device_type)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        logits = (q * scale) @ k.transpose(-2, -1)
        bias = table[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        return (logits + bias.to(logits.dtype)).softmax(dim=-1) @ v

    return run


PEER = Peer("eager", attend)
