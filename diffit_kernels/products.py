"""Matrix products on the CPU, in half precision too where the processor has none.

Without instructions for them PyTorch multiplies bfloat16 and float16 at a fifth of float32's speed
or less. Here they are widened to float32, multiplied and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _has_bfloat16() -> bool:
    # oneDNN supports it on any AVX-512, and emulates what the processor lacks.
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


_HAS_MKLDNN = torch.backends.mkldnn.is_available()
_NATIVE = {
    torch.bfloat16: _HAS_MKLDNN and _has_bfloat16(),
    torch.float16: _HAS_MKLDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
# Of a widened part of the weights: it stays in cache until it is multiplied.
_PART_BYTES = 2 * 2**20


def are_slow(dtype: torch.dtype, device_type: str) -> bool:
    """Whether PyTorch has no fast products of this dtype here."""
    return device_type == "cpu" and not _NATIVE.get(dtype, True)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``x weight^T + bias``, in ``out`` if given: (rows, K), (N, K), (N,) -> (rows, N)."""
    if not are_slow(x.dtype, x.device.type):
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    x = x.float()
    step = max(1, _PART_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        product = torch.mm(x, weight[part].float().t())
        out[:, part] = product if bias is None else product.add_(bias[part])
    return out


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``a b``, in their dtype, in ``out`` if given."""
    if not are_slow(a.dtype, a.device.type):
        return torch.mm(a, b, out=out)
    product = torch.mm(a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def weight_gradient(grad_y: Tensor, x: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
    """``grad_y^T x``, and unless without ``bias`` the sum of grad_y's rows.

    (rows, N), (rows, K) -> (N, K), (N,)
    """
    grad_weight = mm(grad_y.t(), x)
    return (grad_weight, grad_y.sum(dim=0)) if bias else (grad_weight,)
