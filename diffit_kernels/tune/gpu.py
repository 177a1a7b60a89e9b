"""Compiles and times calls on a GPU."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from diffit_kernels.triton.launch import forgetful

Call = Callable[[], object]

ROUNDS = 25
# Bytes written before each measurement: more than any second-level cache holds.
FLUSH = 512 * 2**20


class GPU:
    """The current one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._flush = torch.empty(FLUSH, dtype=torch.int8, device=self.device)

    def compile(self, calls: Sequence[Call]) -> None:
        """Compile what the calls will launch, on all cores; one that fails will fail again."""
        import triton

        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            _launches(warmup=True),
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for call in calls:
                with suppress(Exception):
                    call()

    def spills(self, call: Call) -> int:
        """Registers that spill in what the call launches."""
        with _launches(warmup=False) as kernels:
            call()
        return sum(kernel.n_spills for kernel in kernels)

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of each call: the median over rounds in which each is replayed once.

        As CUDA graphs, so that the time in which Python launches is none of it, and with the cache
        written over before each.
        """
        graphs, pool = [], torch.cuda.graph_pool_handle()
        for call in calls:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
            graphs.append(graph)
        rounds = [[self._replayed(graph) for graph in graphs] for _ in range(ROUNDS)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]

    def _replayed(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def _launches(warmup: bool) -> Iterator[list[Any]]:
    """The compiled kernels that are launched inside; with ``warmup`` they are only compiled."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def recorded(*args: Any, **named: Any) -> Any:
        kernels.append(run(*args, **(named | {"warmup": warmup})))
        return kernels[-1]

    JITFunction.run = recorded
    try:
        with forgetful():
            yield kernels
    finally:
        JITFunction.run = run
