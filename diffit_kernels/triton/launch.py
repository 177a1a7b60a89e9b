"""Launches that find their compiled kernel at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffit_kernels.triton.configs import Config

# What launches like one before have used, and the values of its constants in order.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
_MOST_COMPILED = 4096
_remembers = True


@contextmanager
def forgetful() -> Iterator[None]:
    """Every launch inside is Triton's own, for those who watch or change what Triton does."""
    global _remembers
    before, _remembers = _remembers, False
    try:
        yield
    finally:
        _remembers = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: Config,
) -> None:
    """``kernel[grid](*tensors, *numbers, **constants)`` on the device of the tensors.

    Triton takes longer to find out which compiled kernel that is than a small one runs. It depends
    on dtypes, on values of numbers, and on whether an address is a multiple of 16, as here nearly
    all are.
    """
    device, addresses = -1, 0
    dtypes: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            device = tensor.get_device()
            addresses |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants)
        return
    if addresses % 16 or not _remembers:
        kernel[grid](*tensors, *numbers, **constants)
        return
    # The grid, because on ROCm it depends on how far addresses may lie apart as well.
    key = (kernel.fn, device, grid, numbers, *dtypes, *constants.items())
    if found := _compiled.get(key):
        compiled, values = found
        compiled[(*grid, 1, 1)](*tensors, *numbers, *values)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if compiled is None:  # interpreted
        return
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    _compiled[key] = compiled, [constants[name] for name in names]
