"""Parts in order within a budget of time: each in a process, recorded whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, KILLED, TIMED_OUT = "ok", "failed", "killed", "timed out"
ERROR_LINES = 15
MARGIN = 0.9  # of its share a part may plan with; the rest is for ending
KILL_SECONDS = 3.0


@dataclass(frozen=True)
class Part:
    """A command that is told when to end and where its result goes, and its weight in time."""

    name: str
    weight: float
    command: Callable[[float, Path], Sequence[str]]  # (time.time() to end at, file) -> arguments


@dataclass
class Outcome:
    """What became of a part; ``error`` is the end of its output where it is not ok."""

    name: str
    status: str
    seconds: float
    share: float
    error: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def run(
    parts: Sequence[Part], seconds: float, environment: dict[str, str], folder: Path
) -> Iterator[Outcome]:
    """Run the parts one after another; each outcome as soon as there is one.

    A part's share is its weight's part of what is left, so that unused time flows on. At the end of
    its share it is stopped with all that it started.
    """
    end = time.monotonic() + seconds
    for i, part in enumerate(parts):
        weights = sum(later.weight for later in parts[i:])
        share = max(end - time.monotonic(), 0.0) * part.weight / weights
        yield _run_one(part, share, environment, folder)


def _run_one(part: Part, share: float, environment: dict[str, str], folder: Path) -> Outcome:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        arguments = part.command(time.time() + MARGIN * share, result)
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # What a part that is killed has printed is there, and before its error.
                env=environment | {"PYTHONUNBUFFERED": "1"},
                cwd=folder,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(share)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                stop(process)
        status = TIMED_OUT if code is None else OK if code == 0 else FAILED if code > 0 else KILLED
        outcome = Outcome(part.name, status, time.monotonic() - begin, share)
        if status != OK:
            outcome.error = last_lines(log.read_text(errors="replace"))
            if status == KILLED:
                outcome.error.append(f"ended by {signal.Signals(-(code or 0)).name}")
            if status == TIMED_OUT:
                outcome.error.append(f"stopped at its share of {share:.1f} s")
        with suppress(OSError, ValueError):  # a part that ended early has found nothing
            outcome.result = json.loads(result.read_text())
    return outcome


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and everything in it."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)


def last_lines(text: str) -> list[str]:
    """The end of an output."""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-ERROR_LINES:]
