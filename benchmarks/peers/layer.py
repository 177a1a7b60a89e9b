"""The layer around the attention of a peer: windows cut out and put back, as published.

A peer is one function, ``attend``, on the heads of partitioned windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from diffit_kernels import WindowAttentionProblem

# q, k, v (windows * B, heads, M, d) and the bias table -> (windows * B, heads, M, d)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A contestant: its name, its attention for a problem, and whether the layer is compiled."""

    name: str
    attend: Callable[[WindowAttentionProblem], Attend]
    compiled: bool = False


def partition(problem: WindowAttentionProblem, x: Tensor) -> Tensor:
    """(B, L, F) -> (B * windows, M, F)."""
    if problem.windows == 1:
        return x
    (height, width), (wh, ww) = problem.grid_size, problem.window_size
    x = x.view(-1, height // wh, wh, width // ww, ww, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, problem.window_tokens, x.shape[-1])


def unpartition(problem: WindowAttentionProblem, x: Tensor) -> Tensor:
    """(B * windows, M, F) -> (B, L, F)."""
    if problem.windows == 1:
        return x
    (height, width), (wh, ww) = problem.grid_size, problem.window_size
    x = x.view(-1, height // wh, width // ww, wh, ww, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, problem.tokens, x.shape[-1])


def attend_windows(
    problem: WindowAttentionProblem, attend: Attend, qkv: Tensor, table: Tensor
) -> Tensor:
    """(B * windows, M, 3C) -> (B * windows, M, C)."""
    windows, tokens, _ = qkv.shape
    heads = qkv.reshape(windows, tokens, 3, problem.num_heads, problem.head_dim)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    return attend(q, k, v, table).transpose(1, 2).reshape(windows, tokens, problem.dim)


def peer_attention(
    peer: Peer, problem: WindowAttentionProblem
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The core: qkv (B, L, 3C), table, row (B, 3C) of bias and time token -> (B, L, C)."""
    attend = peer.attend(problem)

    def run(qkv: Tensor, table: Tensor, row: Tensor) -> Tensor:
        windows = partition(problem, qkv + row[:, None])
        return unpartition(problem, attend_windows(problem, attend, windows, table))

    return torch.compile(run, dynamic=False, fullgraph=True) if peer.compiled else run


class PeerAttention(nn.Module):
    """The attention layer of a peer; parameters named as in ``diffit.nn.TMSA``."""

    def __init__(self, attend: Attend, problem: WindowAttentionProblem, temb_dim: int) -> None:
        super().__init__()
        dim = problem.dim
        self.problem = problem
        self.attend = attend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_temb = nn.Linear(temb_dim, 3 * dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(problem.table_rows, problem.num_heads)
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        row = self.qkv_temb(temb).repeat_interleave(self.problem.windows, dim=0)
        qkv = self.qkv(partition(self.problem, x)) + row[:, None]
        out = attend_windows(self.problem, self.attend, qkv, self.relative_position_bias_table)
        return unpartition(self.problem, self.proj(out))


class PeerMLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class PeerBlock(nn.Module):
    """The transformer block of a peer, on the parameters of a ``diffit.nn.DiffiTBlock``."""

    def __init__(
        self,
        peer: Peer,
        problem: WindowAttentionProblem,
        temb_dim: int,
        parameters: dict[str, Tensor],
    ) -> None:
        super().__init__()
        attend = peer.attend(problem)
        with torch.device("meta"):  # the parameters come from elsewhere
            self.norm1 = nn.LayerNorm(problem.dim, eps=1e-6, elementwise_affine=False)
            self.attn = PeerAttention(attend, problem, temb_dim)
            self.norm2 = nn.LayerNorm(problem.dim, eps=1e-6, elementwise_affine=False)
            self.mlp = PeerMLP(problem.dim)
        self.load_state_dict(parameters, assign=True)
        if peer.compiled:
            self.compile(dynamic=False, fullgraph=True)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), temb)
        return x + self.mlp(self.norm2(x))
