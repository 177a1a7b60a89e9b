"""FlexAttention, whose score function reads the bias from the table; it needs the compiler."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from diffit_kernels import WindowAttentionProblem
from peers.layer import Attend, Peer


def attend(problem: WindowAttentionProblem) -> Attend:
    """The bias added to each logit as it is computed."""
    wh, ww = problem.window_size

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def add_bias(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dy = i // ww - j // ww + wh - 1
            dx = i % ww - j % ww + ww - 1
            return score + table[dy * (2 * ww - 1) + dx, head]

        out = flex_attention(q, k, v, score_mod=add_bias)
        assert isinstance(out, Tensor)
        return out

    return run


PEER = Peer("flex", attend, compiled=True)
