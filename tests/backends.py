"""What a test can run on: the reference, and the compiled kernels on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

import diffit_kernels as dk
from diffit_kernels import native, products
from diffit_kernels.native import layers, library

BACKENDS = ["reference"]
if dk.available_backends()["cpu"] is None:
    BACKENDS += [f"cpu-{name}" for name in native.instruction_sets()]

# One of each kind, for tests of what surrounds the kernels.
FASTEST = list({name.partition("-")[0]: name for name in BACKENDS}.values())


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Run the operators inside the ``with`` block on one entry of ``BACKENDS``."""
    name, _, instruction_set = backend.partition("-")
    with dk.use_backend(name):
        if instruction_set:
            with native.use_instruction_set(instruction_set):
                yield
        else:
            yield


@contextmanager
def linear_kernels_of_any_size() -> Iterator[None]:
    """Run linear layers by kernels wherever there are some, faster than PyTorch or not."""
    at_any_size = {
        name: {
            key: limits._replace(rows=min(limits.rows, 32), weight=math.inf)
            for key, limits in (layers._FUSED | getattr(layers, name)).items()
        }
        for name in ("_FUSED", "_PRODUCT", "_TRANSPOSED")
    }
    with patch.multiple(layers, **at_any_size):
        yield


@contextmanager
def linear_kernels_on(instruction_set: str) -> Iterator[None]:
    """The same, by those of one instruction set, as on a processor that has no more than it."""
    with native.use_instruction_set(instruction_set), linear_kernels_of_any_size():
        halves = (torch.bfloat16, torch.float16)
        of = {dtype: library.kernels.linear_product(native.DTYPES[dtype]) for dtype in halves}
        has_instructions = {dtype: product != "vectors" for dtype, product in of.items()}
        with patch.object(products, "_NATIVE", has_instructions):
            yield


def _with_linear_kernels(has_kernel: Callable[[int], object]) -> list[tuple[str, torch.dtype]]:
    """The instruction sets and dtypes that have one; of half precision the fastest of a kind."""
    found: dict[object, tuple[str, torch.dtype]] = {}
    for name in native.instruction_sets():
        with native.use_instruction_set(name):
            for dtype, i in native.DTYPES.items():
                if kind := has_kernel(i):
                    found[dtype, kind, dtype.itemsize == 2 or name] = (name, dtype)
    return list(found.values())


LINEAR_KERNELS = _with_linear_kernels(lambda dtype: library.kernels.linear_product(dtype))
GRADIENT_KERNELS = _with_linear_kernels(lambda dtype: library.kernels.has_weight_gradient(dtype))
