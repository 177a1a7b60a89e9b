"""The tuned parameters of the kernels: one table of ``configs/`` per device, and a default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]
Configs = Mapping[str, Config]

_TABLES = {path.stem: path for path in (Path(__file__).parent / "configs").glob("*.json")}


@lru_cache(maxsize=1024)
def choose(kernel: str, device: torch.device, itemsize: int, **shape: int) -> Config:
    """Parameters of the entry whose shape is nearest, from the table of the device.

    An entry names the kernel, the shape for which it was chosen and its parameters. Distance is
    that of the logarithms of the numbers of a shape; the size of an element has to agree.
    """
    for table in (_table(device), "default"):
        entries = [
            entry
            for entry in load(table)
            if (entry["kernel"], entry["itemsize"]) == (kernel, itemsize)
        ]
        if entries:
            nearest = min(
                entries,
                key=lambda entry: sum(abs(log2(entry[name] / shape[name])) for name in shape),
            )
            return nearest["parameters"]
    raise LookupError(f"no entry for {kernel} with elements of {itemsize} bytes")


@cache
def load(table: str) -> list[dict[str, Any]]:
    """The entries of a table."""
    return json.loads(_TABLES[table].read_text())


@cache
def _table(device: torch.device) -> str:
    """The table of a device: that whose name is a part of the device's, such as h200."""
    if device.type != "cuda":
        return "default"
    name = torch.cuda.get_device_name(device).lower()
    return next((table for table in _TABLES if table in name), "default")
