"""What a part is given: a device, a time to end at, and a file for what it found."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.precision import PRECISIONS

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of a part. ``until`` is in seconds of ``time.time()``; the result goes to ``out``.

    ``ceilings`` is what the part of that name found, if it did; ``table`` where that of tune goes;
    ``precisions`` are those of the rule and the contests.
    """

    device: torch.device
    until: float
    out: Path
    ceilings: Path | None = None
    table: Path = Path("table.json")
    precisions: Sequence[str] = tuple(PRECISIONS)

    @property
    def seconds(self) -> float:
        """What is left of the time."""
        return self.until - time.time()

    def save(self, result: Result) -> None:
        """Write what was found so far, whole or not at all: the part may be killed any time."""
        write_json(self.out, result)


def write_json(path: Path, document: Result) -> None:
    """Replace a file by a document; numbers that are not finite become null."""
    text = json.dumps(_finite(document), indent=1, allow_nan=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
