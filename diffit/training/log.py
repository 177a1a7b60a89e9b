"""What a run says of itself: ``stats.jsonl``, TensorBoard, a bar, and the ceiling of the device."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from diffit.extras import import_extra
from diffit.files import replacing

STATS = "stats.jsonl"
NEEDED = ("step", "images", "loss")  # of a line
CEILING_SECONDS = 0.3
CEILING_SIZE = {"cpu": 1024, "cuda": 8192}


class Log:
    """One line of JSON for each step, also to TensorBoard if asked for.

    Args:
        folder: of the run.
        step: that the run goes on from: lines of later steps, and a line cut off, are taken out.
        tensorboard: whether to write events too.

    Raises:
        ImportError: TensorBoard is asked for and is not there.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        path = folder / STATS
        kept = [line for line in read_stats(path) if line["step"] <= step]
        with replacing(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file = path.open("a")
        self._events: Any = None
        if tensorboard:
            module = import_extra("torch.utils.tensorboard", "tensorboard")
            self._events = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: dict[str, float]) -> None:
        """The numbers of one step, among them ``step``."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                self._events.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_stats(path: Path) -> list[dict[str, float]]:
    """The lines of a ``stats.jsonl``, without a last one cut off; none if there is no such file.

    Raises:
        ValueError: something else, naming the line.
        OSError: it cannot be read.
    """
    lines: list[dict[str, float]] = []
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts) and (lines or text.startswith(b"{")):
                break  # the process was killed while it wrote
            line = None
        if not isinstance(line, dict) or not all(
            isinstance(line.get(name), (int, float)) for name in NEEDED
        ):
            raise ValueError(
                f"{path}: line {number}: expected an object with the numbers "
                f"{', '.join(NEEDED)}, got {text[:40]!r}"
            )
        lines.append(line)
    return lines


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product, the best of many."""
    size = CEILING_SIZE.get(device.type, 1024)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + CEILING_SECONDS
    while True:
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return float(2 * size**3 / best)
