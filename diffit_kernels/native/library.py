"""The compiled module, the instruction set it uses, and how tensors are given to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# torch is imported first: the extension then shares its OpenMP pool. None if it cannot be loaded.
kernels: Any = None
_import_error: str | None = None
try:
    kernels = import_module("diffit_kernels._native")
except ImportError as error:
    _import_error = (
        f"the compiled module could not be loaded ({error}); "
        "reinstall with a C++17 compiler on the path"
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable() -> str | None:
    """Why the compiled kernels cannot run in this process, or None."""
    return _import_error


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this build and this processor have, slowest first."""
    return () if kernels is None else tuple(kernels.instruction_sets())


def instruction_set() -> str | None:
    """The instruction set in use, or None without the compiled kernels."""
    return None if kernels is None else kernels.instruction_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels on one of ``instruction_sets()`` inside the ``with`` block.

    Raises:
        ValueError: it is not one of them.
    """
    if name not in instruction_sets():
        raise ValueError(f"name: expected one of {instruction_sets()}, got {name!r}")
    previous = instruction_set()
    kernels.set_instruction_set(name)
    try:
        yield
    finally:
        kernels.set_instruction_set(previous)


def optional(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """Its address, or 0."""
    return 0 if tensor is None else tensor.data_ptr()
