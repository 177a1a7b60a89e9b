"""The search: of the parameters that compile, fit and are right, the fastest; while time lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Protocol

import torch

from diffit_kernels import cuda
from diffit_kernels.triton.configs import Config, Entry, Table, choose, write
from diffit_kernels.tune.layers import CUDA, KERNELS, LAYERS, Layer, candidates
from diffit_kernels.tune.passes import Pass, Shape, passes

DTYPES = (torch.bfloat16, torch.float32)
# How much longer a forward pass may take if both passes together are faster.
FORWARD_MAY_TAKE = 1.1

Call = Callable[[], object]


class Machine(Protocol):
    """What the search needs of a GPU."""

    device: torch.device

    def compile(self, calls: Sequence[Call]) -> None:
        """Compile what the calls will launch; one that fails will fail again."""

    def spills(self, call: Call) -> int:
        """Registers that spill in what the call launches."""

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of each call."""


class Budget:
    """Seconds for steps: one is begun if there is time for another as long as the longest."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = clock()
        self.end = self.begun + seconds
        self.longest = 0.0

    def allows(self) -> bool:
        """Whether to begin a step; ends the one before."""
        now = self.clock()
        self.longest = max(self.longest, now - self.begun)
        self.begun = now
        return now + self.longest < self.end


def _print(line: str) -> None:
    """At once, so that a run that is killed has shown what it found."""
    print(line, flush=True)


class Search:
    """Fills a table and writes it after every entry.

    Args:
        machine: where to measure.
        path: of the table.
        table: what it holds; entries that are measured again are replaced.
        kernels: those to tune, of ``KERNELS``.
        budget: when to end.
        report: is told each result in a line.
    """

    def __init__(
        self,
        machine: Machine,
        path: Path,
        table: Table,
        kernels: Collection[str],
        budget: Budget,
        report: Callable[[str], None] = _print,
    ) -> None:
        self.machine = machine
        self.path = path
        self.table = table
        self.kernels = kernels
        self.budget = budget
        self.report = report
        self._entries = {_key(entry): entry for entry in table.entries}
        self._done: set[tuple[object, ...]] = set()

    def run(self, layers: Iterable[Layer] = LAYERS, dtypes: Iterable[torch.dtype] = DTYPES) -> bool:
        """Tune; whether there was time for everything."""
        layers = list(layers)
        for dtype in dtypes:
            for operator, kernels in KERNELS.items():
                for layer in layers if set(kernels) & set(self.kernels) else ():
                    try:
                        if not self._tune(operator, layer, dtype):
                            return False
                    except torch.OutOfMemoryError:
                        self.report(f"{operator} of {layer}: too large for the memory")
        return True

    def _tune(self, operator: str, layer: Layer, dtype: torch.dtype) -> bool:
        """Whether there was time."""
        works = []
        for work in passes(operator, layer, dtype, self.machine.device):
            for kernel, shape in work.kernels.items():
                key = _key(_entry(kernel, dtype, shape, {}))
                if kernel in self.kernels and key not in self._done:
                    if not self.budget.allows():
                        return False
                    self._tune_kernel(work, kernel, shape)
                    self._done.add(key)
            works.append(work)
        if operator == "window_attention" and CUDA in self.kernels:
            square = [layer.window**2, layer.head_dim]
            cannot = cuda.unavailable() or cuda.supports(works[0].problem)
            if not cannot and (CUDA, *square) not in self._done:
                if not self.budget.allows():
                    return False
                self._compare(works, square)
                self._done.add((CUDA, *square))
        return True

    def _tune_kernel(self, work: Pass, kernel: str, shape: Shape) -> None:
        """The time is that of the whole pass, its other kernels as they are best known."""
        others = self._configs(work)
        itemsize = work.problem.dtype.itemsize
        known = others[kernel]
        tried = [known] + [c for c in candidates(kernel, itemsize) if c != known]
        calls = [partial(work.run, configs={**others, kernel: config}) for config in tried]
        self.machine.compile(calls)
        good = [i for i, call in enumerate(calls) if self._is_good(work, call)]
        if not good:
            self.report(f"{kernel} {shape}: none of {len(tried)} candidates is right")
            return
        times = dict(zip(good, self.machine.times([calls[i] for i in good]), strict=True))
        best = min(times, key=times.__getitem__)
        self._put(_entry(kernel, work.problem.dtype, shape, tried[best]))
        gain = f", {times[0] / times[best]:.2f}x" if 0 in times else ""
        self.report(
            f"{kernel} {shape} {itemsize} bytes: {tried[best]} {times[best] * 1e6:.1f} us{gain} "
            f"({len(good)} of {len(tried)} compared)"
        )

    def _is_good(self, work: Pass, call: Callable[[], tuple[torch.Tensor, ...]]) -> bool:
        """Compiles, fits, does not spill, and keeps the numeric rule."""
        try:
            return not self.machine.spills(call) and work.is_right(call())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # each compiler and driver has its own
            return False

    def _compare(self, works: Sequence[Pass], shape: list[int]) -> None:
        """Faster are kernels whose passes together are, with a forward pass hardly slower."""
        ours, theirs = [], []
        for work in works:
            triton, rival = partial(work.run, configs=self._configs(work)), partial(work.run, cuda)
            times = [1.0, inf]
            if self._is_good(work, rival):
                times = self.machine.times([triton, rival])
            ours.append(times[0])
            theirs.append(times[1])
        faster = theirs[0] < FORWARD_MAY_TAKE * ours[0] and sum(theirs) < sum(ours)
        listed = [other for other in self.table.cuda_is_faster if other != shape]
        self.table.cuda_is_faster[:] = sorted([*listed, shape] if faster else listed)
        write(self.path, self.table)
        forward, backward = (
            f"{1e6 * b:.1f} us, {a / b:.2f}x" for a, b in zip(ours, theirs, strict=True)
        )
        self.report(f"cuda {shape}: forward {forward}, backward {backward} (0: wrong) of triton")

    def _configs(self, work: Pass) -> dict[str, Config]:
        """What is best known for each kernel of a pass."""
        dtype, device = work.problem.dtype, self.machine.device
        configs = {}
        for kernel, shape in work.kernels.items():
            entry = self._entries.get(_key(_entry(kernel, dtype, shape, {})))
            if entry is None:
                configs[kernel] = choose(kernel, device, dtype.itemsize, **shape)
            else:
                configs[kernel] = entry["parameters"]
        return configs

    def _put(self, entry: Entry) -> None:
        self._entries[_key(entry)] = entry
        self.table.entries[:] = self._entries.values()
        write(self.path, self.table)


def _entry(kernel: str, dtype: torch.dtype, shape: Shape, parameters: Config) -> Entry:
    return {"kernel": kernel, "itemsize": dtype.itemsize, **shape, "parameters": parameters}


def _key(entry: Entry) -> tuple[object, ...]:
    """What an entry is for."""
    return tuple(sorted((name, entry[name]) for name in entry if name != "parameters"))
