"""Every test of this folder runs on the Triton kernels, or is skipped where they cannot run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import diffit_kernels as dk


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    if reason := dk.available_backends()["triton"]:
        pytest.skip(reason)
    with dk.use_backend("triton"):
        yield
