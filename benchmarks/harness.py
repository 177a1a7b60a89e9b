"""Timing, verification and memory of a call on any device, for every benchmark."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        deciles = statistics.quantiles(self.rounds, n=10, method="inclusive")
        return deciles[0], deciles[-1]

    @property
    def columns(self) -> dict[str, Any]:
        """As a row of results has them, in milliseconds."""
        low, high = self.spread
        return {
            "rounds": len(self.rounds),
            "median_ms": 1e3 * self.median,
            "p10_ms": 1e3 * low,
            "p90_ms": 1e3 * high,
        }

    def ratio(self, other: Timing) -> float:
        """How many times longer the other took: the median over rounds."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)


def timed(call: Call, device: torch.device, before: Call | None = None) -> float:
    """Seconds of one call, after an untimed one; on a GPU between two of its events."""
    if before is not None:
        before()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    warm_up: bool = True,
    before: Call | None = None,
) -> dict[str, Timing]:
    """Time all calls once in every round, so that a drift of the machine meets them alike.

    ``before`` comes before each of them, untimed. One round warms up, unless all are warm. Rounds,
    each beginning with the next call, go on for ``seconds``, at least ``min_rounds`` and at most
    ``max_rounds`` (both at least 2).
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values() if warm_up else ():
        call()
    begin = time.perf_counter()
    for i in range(max_rounds if names else 0):
        if i >= min_rounds and time.perf_counter() - begin > seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(calls[name], device, before))
    return {name: Timing(tuple(rounds)) for name, rounds in samples.items()}


def errors(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute difference of each tensor from its float64 truth; NaN counts as inf."""
    found = {name: (got[name].double() - exact).abs().max().item() for name, exact in truth.items()}
    return {name: error if error == error else float("inf") for name, error in found.items()}


def worst_error(
    got: Mapping[str, Tensor], truth: Mapping[str, Tensor], plain_errors: Mapping[str, float]
) -> tuple[float, str]:
    """The numeric rule: an error is at most twice that of plain PyTorch in the same dtype + 1e-6.

    Returns the largest error in units of what is allowed (the rule holds up to 1), and where.
    """
    found = errors(got, truth)
    return max((found[name] / (2 * plain_errors[name] + 1e-6), name) for name in truth)


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that PyTorch's allocator held at most during the call, above those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no line for every start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


class Progress:
    """A bar on the last line of the terminal; nothing where stderr is none."""

    WIDTH = 30

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.visible = sys.stderr.isatty()

    def show(self, label: str) -> None:
        """What is being done now."""
        if self.visible:
            filled = self.WIDTH * self.done // self.total
            bar = "#" * filled + "." * (self.WIDTH - filled)
            sys.stderr.write(f"\r\x1b[K[{bar}] {self.done}/{self.total} {label}")
            sys.stderr.flush()

    def step(self) -> None:
        """One more is done."""
        self.done += 1

    def clear(self) -> None:
        """Make room for a line of output."""
        if self.visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
