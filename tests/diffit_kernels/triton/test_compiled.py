"""Every kernel compiles for every kind of device, present or not, and fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

pytest.importorskip("triton")

# Bytes of shared memory that a program may have.
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "120": 99 * 1024, "gfx942": 65536}


@cache
def kernels(arch: str) -> list[dict]:
    """What one process compiled for a device."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.diffit_kernels.triton.compiled", arch],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", SHARED)
def test_shared_memory(arch: str) -> None:
    assert kernels(arch)
    assert [k for k in kernels(arch) if k["shared"] > SHARED[arch]] == []


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_spills(arch: str) -> None:
    for kernel in kernels(arch):
        print(*(f"{name} {value}" for name, value in kernel.items()), sep=", ")
    assert [k for k in kernels(arch) if k["spills"]] == []


def test_large_windows_use_warpgroup_products() -> None:
    large = [
        kernel
        for kernel in kernels("90")
        if kernel["name"].startswith("attention_large") and "bfloat16" in kernel["shape"]
    ]
    assert large
    assert all(kernel["hgmma"] for kernel in large)
