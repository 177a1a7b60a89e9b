"""Tuned tables: the nearest shape, the device's own table first, and which that is."""

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
        for cached in (configs.nearest, configs.is_listed, configs.table_of, configs.tables):
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
def written_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = {
        "default": [
            entry("forward", 256, 64, 2, 1),
            entry("forward", 1024, 64, 2, 2),
            entry("forward", 256, 128, 2, 3),
            entry("forward", 256, 64, 4, 4),
            entry("backward", 256, 64, 2, 5),
        ],
        "hopper": [entry("forward", 256, 64, 2, 6)],
        "pcie": [entry("forward", 256, 64, 2, 7)],
    }
    devices = {"default": [], "hopper": ["H100", "H200"], "pcie": ["H100 PCIe", "A100"]}
    for name, entries in written.items():
        table = {"devices": devices[name], "entries": entries}
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    named(monkeypatch, "NVIDIA H200")


def named(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)


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
def test_the_nearest_shape(written_tables: None, shape: tuple[int, int, int], block: int) -> None:
    assert choose("forward", *shape, CPU) == {"BLOCK_M": block}


def test_the_table_of_the_device_comes_first(written_tables: None) -> None:
    assert choose("forward", 1024, 64, 2, CUDA) == {"BLOCK_M": 6}
    assert choose("forward", 1024, 64, 4, CUDA) == {"BLOCK_M": 4}
    assert choose("backward", 1024, 64, 2, CUDA) == {"BLOCK_M": 5}
    with pytest.raises(LookupError, match="sideways"):
        choose("sideways", 1024, 64, 2, CUDA)


def test_what_is_listed(written_tables: None) -> None:
    """In the table of the device, or in the default."""
    assert configs.is_listed("forward", CUDA)
    assert configs.is_listed("backward", CUDA)
    assert not configs.is_listed("sideways", CUDA)


@pytest.mark.parametrize(
    ("device", "block"),
    [
        ("NVIDIA H100 80GB HBM3", 6),
        ("NVIDIA H200", 6),
        ("NVIDIA H100 PCIe", 7),  # the longest name
        ("NVIDIA A100-SXM4-80GB", 7),
        ("NVIDIA A100 80GB PCIe", 7),
        ("NVIDIA GH200 480GB", 1),  # H200 is no word of it
        ("NVIDIA A10", 1),
        ("AMD Instinct MI300X", 1),
    ],
)
def test_devices_share_a_table(
    written_tables: None, monkeypatch: pytest.MonkeyPatch, device: str, block: int
) -> None:
    named(monkeypatch, device)
    assert choose("forward", 256, 64, 2, CUDA) == {"BLOCK_M": block}


@pytest.mark.parametrize("text", ["[]", "{", '{"devices": [], "rows": []}'])
def test_what_is_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table of parameters"):
        configs.read(path)


@pytest.mark.parametrize("entries", [[], [entry("forward", 256, 64, 2, 1)] * 3])
def test_what_is_written_is_read(tmp_path: Path, entries: list[dict]) -> None:
    """In the format of the tables that are here, and with nothing left beside it."""
    table = configs.Table(["H200"], [[256, 72]], entries)
    path = tmp_path / "table.json"
    configs.write(path, table)
    assert configs.read(path) == table
    assert list(tmp_path.iterdir()) == [path]
    for name, known in configs.tables().items():
        configs.write(path, known)
        assert path.read_text() == (configs.FOLDER / f"{name}.json").read_text()


def test_no_device_is_named_twice() -> None:
    named = [words.lower() for table in configs.tables().values() for words in table.devices]
    assert len(named) == len(set(named))


def test_cuda_is_said_to_be_faster_at_shapes_only() -> None:
    for table in configs.tables().values():
        for shape in table.cuda_is_faster:
            assert [type(number) for number in shape] == [int, int]


def test_the_default_serves_every_kernel_and_size_of_number() -> None:
    """The products of the perceptron are PyTorch's in float32; only float32 is cut in parts."""
    entries = configs.tables()["default"].entries
    kernels = {entry["kernel"] for entry in entries}
    sizes = {kernel: (2,) if kernel.startswith("mlp") else (2, 4) for kernel in kernels}
    sizes |= {kernel: (4,) for kernel in kernels if kernel.endswith("_in_parts")}
    assert {(entry["kernel"], entry["itemsize"]) for entry in entries} == {
        (kernel, itemsize) for kernel in kernels for itemsize in sizes[kernel]
    }
