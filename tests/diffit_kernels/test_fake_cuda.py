"""The operators and a block on CUDA tensors without data: what a compiler sees, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import diffit_kernels as dk
from tests.cases import DTYPES, AddLayerNormCase, AttentionCase, MLPCase

LAYOUTS = ["contiguous", "channels first", "tokens first", "sliced channels"]
HALF = DTYPES[1:]


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend is asked for, and every tensor is a fake."""

    def refuse(problem: object) -> None:
        raise AssertionError(f"computed: {problem}")

    for name in ("add_layer_norm", "mlp", "window_attention"):
        monkeypatch.setattr(import_module(f"diffit_kernels.ops.{name}"), "select", refuse)
    # Autograd has threads for the devices that are there; this one is not.
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        yield


def on_cuda(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Fakes with the sizes and strides of tensors."""
    return {
        name: torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device="cuda", requires_grad=True
        )
        for name, x in tensors.items()
        if x is not None
    }


def assert_is(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert isinstance(x, FakeTensor)
    assert x.device == torch.device("cuda", 0)
    assert (x.shape, x.dtype) == (shape, dtype)
    assert x.is_contiguous()


def assert_gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> None:
    """Each as its input, but contiguous."""
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs]
    )
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert_is(grad, leaf.shape, leaf.dtype)
