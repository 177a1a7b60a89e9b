"""Tuned parameters of the kernels: tables in ``configs/``, each for some devices, and a default.

A table is one JSON object, the fields of ``Table``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]
Configs = Mapping[str, Config]
Entry = dict[str, Any]

# In the place of a kernel's parameters: PyTorch's product.
CUBLASLT: Config = {"impl": "cublaslt"}

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Table:
    """What was found to be fastest on some devices.

    Args:
        devices: words that stand in the names of these devices, such as H200.
        cuda_is_faster: (window tokens, head width) of the attention layers for which "auto" takes
            the CUDA C++ kernels.
        entries: each names a kernel, the size of an element, the shape for which its parameters
            were chosen, and them.
    """

    devices: list[str] = field(default_factory=list)
    cuda_is_faster: list[list[int]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def choose(kernel: str, device: torch.device, itemsize: int, **shape: int) -> Config:
    """Parameters of the nearest entry."""
    return nearest(kernel, device, itemsize, **shape)["parameters"]


@lru_cache(maxsize=1024)
def nearest(kernel: str, device: torch.device, itemsize: int, **shape: int) -> Entry:
    """The entry whose shape is nearest, from the table of the device.

    Distance is that of the logarithms of the numbers of a shape; the size of an element has to
    agree. What a device's own table has not, the default has.
    """
    for table in (table_of(device), tables()["default"]):
        entries = [
            entry
            for entry in table.entries
            if (entry["kernel"], entry["itemsize"]) == (kernel, itemsize)
        ]
        if entries:
            return min(
                entries,
                key=lambda entry: sum(abs(log2(entry[name] / shape[name])) for name in shape),
            )
    raise LookupError(f"no entry for {kernel} with elements of {itemsize} bytes")


@lru_cache(maxsize=64)
def is_listed(kernel: str, device: torch.device) -> bool:
    """Whether the table of the device or the default has entries for a kernel."""
    tried = (table_of(device), tables()["default"])
    return any(entry["kernel"] == kernel for table in tried for entry in table.entries)


@cache
def table_of(device: torch.device) -> Table:
    """That of a device."""
    return table_named(torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def table_named(name: str) -> Table:
    """The table that names the device, by the longest name of those that do; else the default."""
    found = [
        (len(words), table)
        for table, content in tables().items()
        for words in content.devices
        if re.search(rf"\b{re.escape(words)}\b", name, re.IGNORECASE)
    ]
    return tables()[max(found, default=(0, "default"))[1]]


@cache
def tables() -> dict[str, Table]:
    """All tables, by the names of their files."""
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}


def read(path: Path) -> Table:
    """A table from its file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table.
    """
    try:
        return Table(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of parameters: {error}") from None


def write(path: Path, table: Table) -> None:
    """Write a table, an entry to a line; whoever reads meanwhile finds the old file, whole.

    Raises:
        OSError: it cannot be written.
    """
    fields = {name: json.dumps(value) for name, value in asdict(table).items()}
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table.entries)
    fields["entries"] = f"[\n{lines}\n  ]"
    text = ",\n".join(f"  {json.dumps(name)}: {value}" for name, value in fields.items())
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f"{{\n{text}\n}}\n")
    unfinished.replace(path)
