"""Tuned tables: the nearest shape, the device's own table first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffit_kernels.triton import configs

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_memory() -> Iterator[None]:
    for forget in (True, False):
        for cached in (configs.choose, configs.load, configs._table):
            cached.cache_clear()
        if forget:
            yield


def entry(kernel: str, window_tokens: int, head_dim: int, itemsize: int, block: int) -> dict:
    return {
        "kernel": kernel,
        "window_tokens": window_tokens,
        "head_dim": head_dim,
        "itemsize": itemsize,
        "parameters": {"BLOCK_M": block},
    }


def choose(
    kernel: str, window_tokens: int, head_dim: int, itemsize: int, device: torch.device
) -> configs.Config:
    return configs.choose(kernel, device, itemsize, window_tokens=window_tokens, head_dim=head_dim)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = {
        "default": [
            entry("forward", 256, 64, 2, 1),
            entry("forward", 1024, 64, 2, 2),
            entry("forward", 256, 128, 2, 3),
            entry("forward", 256, 64, 4, 4),
            entry("backward", 256, 64, 2, 5),
        ],
        "h200": [entry("forward", 256, 64, 2, 6)],
    }
    for name, entries in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    monkeypatch.setattr(configs, "_TABLES", {name: tmp_path / f"{name}.json" for name in written})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 64, 2), 1),
        ((100, 72, 2), 1),
        ((900, 72, 2), 2),
        ((300, 104, 2), 3),
        ((1024, 128, 4), 4),
    ],
)
def test_the_nearest_shape(tables: None, shape: tuple[int, int, int], block: int) -> None:
    assert choose("forward", *shape, CPU) == {"BLOCK_M": block}


def test_the_table_of_the_device_comes_first(tables: None) -> None:
    assert choose("forward", 1024, 64, 2, CUDA) == {"BLOCK_M": 6}
    assert choose("forward", 1024, 64, 4, CUDA) == {"BLOCK_M": 4}
    assert choose("backward", 1024, 64, 2, CUDA) == {"BLOCK_M": 5}
    with pytest.raises(LookupError, match="sideways"):
        choose("sideways", 1024, 64, 2, CUDA)


def test_the_default_serves_every_kernel_and_size_of_number() -> None:
    entries = configs.load("default")
    kernels = {entry["kernel"] for entry in entries}
    assert {(entry["kernel"], entry["itemsize"]) for entry in entries} == {
        (kernel, itemsize) for kernel in kernels for itemsize in (2, 4)
    }
