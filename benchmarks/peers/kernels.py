"""``scaled_dot_product_attention`` held to one of its kernels, with the bias and without.

Flash attention takes no mask. Without the bias it and cuDNN's compute something else: they show
what a kernel can reach that has no bias to add and no gradient of a table to give.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffit_kernels import WindowAttentionProblem
from peers import sdpa
from peers.layer import Attend, Peer


def _with_bias(backend: SDPBackend) -> Callable[[WindowAttentionProblem], Attend]:
    def attend(problem: WindowAttentionProblem) -> Attend:
        unheld = sdpa.attend(problem)

        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return unheld(q, k, v, table)

        return run

    return attend


def _without_bias(backend: SDPBackend) -> Callable[[WindowAttentionProblem], Attend]:
    def attend(problem: WindowAttentionProblem) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return run

    return attend


PEERS = (
    Peer("sdpa-efficient", _with_bias(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("sdpa-cudnn", _with_bias(SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa-math", _with_bias(SDPBackend.MATH)),
)
WITHOUT_BIAS = (
    Peer("math-no-bias", _without_bias(SDPBackend.MATH)),  # plain PyTorch, for the others' errors
    Peer("flash-no-bias", _without_bias(SDPBackend.FLASH_ATTENTION)),
    Peer("cudnn-no-bias", _without_bias(SDPBackend.CUDNN_ATTENTION)),
)
