"""Our backends against the peers at the shapes of the networks: verified, then timed in turn.

Several workers compile and verify a contest each, side by side; then they time them one after
another, each alone on the device, before the next ones are prepared.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpu import limits, workers
from gpu.contestants import DIRECTIONS, Entry, Say, entries
from gpu.job import Job, Result
from gpu.precision import PRECISIONS, using
from gpu.rows import OUR, Row, summarise
from harness import Timing, interleave, peak_memory, worst_error
from operations import Tensors
from results import CANNOT_RUN, FAILED, OK
from shapes import SHAPES

SECONDS = 0.25  # of rounds for a contest, and again for its graphs
WORKERS = 20  # as many as there are contests in a precision
TASK_SECONDS = 180.0


def tasks(
    operation: str, ceilings: dict[str, Any], precisions: Sequence[str]
) -> list[workers.Task]:
    """Every contest of an operation, in the order of what it is worth."""
    return [
        {
            "operation": operation,
            "precision": precision,
            "shape": asdict(shape),
            "direction": direction,
            "ceilings": ceilings,
            "skip": {},
        }
        for precision, shape, direction in product(precisions, SHAPES.values(), DIRECTIONS)
    ]


def measure(task: workers.Task, device: torch.device, say: Say = lambda at: None) -> Result:
    """The rows of a contest.

    ``skip`` has reasons why contestants are left out, by their names.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows: dict[str, Row] = {}
    calls: dict[str, Entry] = {}
    with using(task["precision"]) as dtype:
        for entry in entries(task, dtype, device, say):
            name = entry.row.contestant
            say(name)
            if name in task["skip"]:
                rows[name] = _failed(entry.row, task["skip"][name])
                continue
            try:
                got = entry.call()
                rows[name] = _verified(entry, got)
                del got
            except Exception as error:
                if workers.is_lost(device):
                    raise
                rows[name] = _failed(entry.row, workers.first_line(error))
            if rows[name].status == OK:
                calls[name] = entry
        say(workers.ALONE)
        rows |= _timed(rows, calls, task, device)
    return {"rows": [asdict(row) for row in rows.values()]}


def _failed(row: Row, reason: str) -> Row:
    """Whatever stops a peer is its result; ours has no excuse but a dtype that it has not."""
    refused = row.contestant == "cuda" and "is not one of bfloat16, float16" in reason
    status = FAILED if row.role == OUR and not refused else CANNOT_RUN
    return replace(row, status=status, reason=reason)


def _verified(entry: Entry, got: Tensors) -> Row:
    if entry.truth is None:
        return entry.row
    error, where = worst_error(got, entry.truth, entry.plain_errors)
    row = replace(entry.row, error_over_allowed=error)
    if error <= 1:
        return row
    reason = f"{where}: error {error:.3g} times what the numeric rule allows"
    return replace(row, status=FAILED, reason=reason)


def _timed(
    rows: dict[str, Row], calls: dict[str, Entry], task: workers.Task, device: torch.device
) -> dict[str, Row]:
    """The rows of what was right, with its times."""
    pace = {"seconds": task.get("seconds", SECONDS), "min_rounds": 5, "max_rounds": 100}
    functions = {name: entry.call for name, entry in calls.items()}
    timings = interleave(functions, device, **pace)
    graphs, before = {}, None
    if device.type == "cuda":
        before = _fill(device)
        # One for all: replays follow one another, and none reads what another wrote.
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for name, call in functions.items():
            try:
                graphs[name] = _graph(call, pool, stream)
            except Exception:  # some peers cannot be captured, which is no fault of their results
                if workers.is_lost(device):
                    raise
    replays = interleave(graphs, device, **pace, before=before)
    graphs.clear()
    found = {}
    for name, timing in timings.items():
        replay = replays.get(name)
        seconds = (replay or timing).median
        found[name] = replace(
            rows[name],
            **timing.columns,
            graph_ms=1e3 * replay.median if replay else None,
            time_over_triton=_ratio(timings, "triton", timing),
            time_over_cuda=_ratio(timings, "cuda", timing),
            peak_mib=peak_memory(functions[name], device) / 2**20,
        )
        found[name] = _with_rates(found[name], calls[name].gflop, seconds, task)
    sdpa = found.get("sdpa")
    if sdpa is not None and sdpa.peak_mib:
        for name, row in found.items():
            found[name] = replace(row, peak_over_sdpa=(row.peak_mib or 0.0) / sdpa.peak_mib)
    return found


def _ratio(timings: dict[str, Timing], ours: str, other: Timing) -> float | None:
    return timings[ours].ratio(other) if ours in timings else None


def _with_rates(row: Row, gflop: float, seconds: float, task: workers.Task) -> Row:
    """Operations and bytes per second, and the time that the ceilings leave over the time taken.

    Bytes are the fewest: each tensor of the operation read or written once.
    """
    itemsize = PRECISIONS[row.precision].itemsize
    features = row.batch * row.grid**2 * row.dim
    if row.operation == "attention":
        tensors = 4 if row.direction == "forward" else 11  # q k v o; then q k v do, dq dk dv
        size = tensors * features * itemsize
    else:
        weights = 12 * row.dim**2
        size = (2 * features + weights) * itemsize
        if row.direction == "training":
            size += (3 * features + 2 * weights) * itemsize  # x dy dx; W dW
    ceilings = task["ceilings"]
    floor = max(
        gflop / ceilings["matmul_gflops"][row.precision], size / 1e9 / ceilings["copy_gbps"]
    )
    return replace(
        row,
        tflops=gflop / seconds / 1e3,
        gbps=size / 1e9 / seconds,
        share_of_ceiling=floor / seconds,
    )


def _fill(device: torch.device) -> Callable[[], Tensor]:
    """Writes more than the second-level cache holds.

    It empties the cache, and keeps the device busy until a replay is in its queue: the time of the
    replay is not that of its launch.
    """
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _graph(
    call: Callable[[], dict[str, Tensor]], pool: Any, stream: torch.cuda.Stream
) -> Callable[[], None]:
    """Replays a capture of the call."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        call()
    return graph.replay


def operators(job: Job) -> Result:
    """Attention, as far as the time goes; one of ours that is wrong is a failure."""
    return _run("attention", job)


def blocks(job: Job) -> Result:
    """The transformer block, likewise."""
    return _run("block", job)


def _run(operation: str, job: Job) -> Result:
    everything = tasks(operation, limits.known(job), job.precisions)
    rows: list[Result] = []
    failures: list[str] = []
    result: Result = {"contests": len(everything), "rows": rows, "failures": failures}
    skips: dict[str, dict[str, str]] = {}

    def key(task: workers.Task) -> str:
        return "{operation} {precision} {direction} ".format(**task) + task["shape"]["name"]

    def handle(task: workers.Task, answer: workers.Answer) -> workers.Task | None:
        """Where a worker died, the contest goes on without the contestant it died of."""
        if answer.result is None:
            skip = skips.setdefault(key(task), {})
            if answer.at in ("", "truth", workers.ALONE) or answer.at in skip:
                failures.append(f"{key(task)}: {answer.at}: {answer.error}")
                return None
            skip[answer.at] = answer.error
            return task | {"skip": skip}
        for row in answer.result["rows"]:
            rows.append(row)
            if row["role"] == OUR and row["status"] == FAILED:
                failures.append(f"{key(task)} {row['contestant']}: {row['reason']}")
        result["summary"] = summarise([Row(**row) for row in rows])
        job.save(result)
        return None

    # A worker compiles by itself: there are as many of them as cores want.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    left = workers.run(
        workers.command("operators", job.device),  # blocks have the same
        everything,
        handle,
        count=min(WORKERS, max(5 * (os.cpu_count() or 2) // 4, 1)),
        until=job.until,
        task_seconds=TASK_SECONDS,
    )
    return result | {"left_out": [key(task) for task in left]}
