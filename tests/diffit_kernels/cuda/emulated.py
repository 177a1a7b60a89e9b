"""Puts the emulated kernels in the place of the library and of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import diffit_kernels as dk
from diffit_kernels import cuda
from diffit_kernels.cuda.library import Library
from tests.cuda_emulator import build

# Of compute capability 9.0.
SHARED_LIMIT = 232448


@contextmanager
def emulated() -> Iterator[None]:
    """Tensors of the CPU run on the backend "cuda"; little work is shared by few blocks.

    So each block has more than one window to sum over.
    """
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_library", Library(build.library()))
        patch.setattr(cuda, "_device_type", "cpu")
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda, "_BLOCKS", 4)
        patch.setattr(cuda, "_shared_limit", lambda: SHARED_LIMIT)
        with dk.use_backend("cuda"):
            yield
