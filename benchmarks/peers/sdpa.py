"""``scaled_dot_product_attention`` with the bias as its mask.

The mask is gathered along the last dimension of the transposed table, which leaves it contiguous
and has a fast gradient; gathering rows, as the published layer does, takes longer.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffit_kernels import WindowAttentionProblem, relative_position_index
from peers.layer import Attend, Peer


def attend(problem: WindowAttentionProblem) -> Attend:
    """The bias as a mask of (1, heads, M, M)."""
    tokens = problem.window_tokens
    index = relative_position_index(problem.window_size).flatten().to(problem.device_type)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table.t().contiguous().index_select(1, index).view(1, -1, tokens, tokens)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))

    return run


PEER = Peer("sdpa", attend)
