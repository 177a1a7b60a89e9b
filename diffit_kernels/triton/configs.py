"""The tuned parameters of the kernels: one table of ``configs/`` per device, and a default."""

from __future__ import annotations

import json
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import TypedDict

import torch

Config = dict[str, int]


class Entry(TypedDict):
    """What was chosen for a kernel at a shape."""

    kernel: str
    window_tokens: int
    head_dim: int
    itemsize: int
    parameters: Config


_TABLES = {path.stem: path for path in (Path(__file__).parent / "configs").glob("*.json")}


@lru_cache(maxsize=1024)
def choose(
    kernel: str, window_tokens: int, head_dim: int, itemsize: int, device: torch.device
) -> Config:
    """Parameters of the entry whose shape is nearest, from the table of the device.

    An entry names the kernel, the shape for which it was chosen and its parameters. Distance is
    that of the logarithms of the window and of the head width; the size of a number has to agree.
    """

    def distance(entry: Entry) -> float:
        shape = (window_tokens / entry["window_tokens"], head_dim / entry["head_dim"])
        return sum(abs(log2(ratio)) for ratio in shape)

    for table in (device_name(device), "default"):
        entries = [
            entry
            for entry in load(table)
            if entry["kernel"] == kernel and entry["itemsize"] == itemsize
        ]
        if entries:
            return min(entries, key=distance)["parameters"]
    raise LookupError(f"no entry for {kernel} with numbers of {itemsize} bytes")


@lru_cache
def load(table: str) -> list[Entry]:
    """The entries of a table."""
    return json.loads(_TABLES[table].read_text())


@lru_cache
def device_name(device: torch.device) -> str:
    """The table of a device: that whose name is a part of the device's, such as h200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        return next((table for table in _TABLES if table in name), "default")
    return "default"
