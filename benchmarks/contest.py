"""One contest: every contestant is prepared, verified against the truth, and timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from harness import interleave, peak_memory, worst_error
from operations import Case
from results import CANNOT_RUN, FAILED, FLOOR, OK, OTHER, OURS, SKIPPED, Row


@dataclass(frozen=True)
class Pace:
    """How long one contest is timed."""

    seconds: float
    min_rounds: int
    max_rounds: int
    warm_up: bool = True  # by a round, beyond the call that is verified


@dataclass
class CompileBudget:
    """Seconds left for peers that need the compiler, and why they are left out after that."""

    seconds: float
    reason: str


def hold(
    case: Case,
    direction: str,
    template: Row,
    device: torch.device,
    pace: Pace,
    budget: CompileBudget,
    matmul_gflops: float,
) -> list[Row]:
    """The rows of all contestants; ``template`` has the columns they share."""
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for contestant in case.contestants:
        row = replace(template, direction=direction, contestant=contestant.name)
        if contestant.compiled and budget.seconds <= 0:
            rows[row.contestant] = replace(row, status=SKIPPED, reason=budget.reason)
            continue
        begin = time.perf_counter()
        try:
            call = contestant.call(direction)
            rows[row.contestant] = row = _verified(row, case, call())
        except Exception as error:
            # Whatever stops a peer is its result; ours has no excuse.
            status = FAILED if contestant.name == OURS else CANNOT_RUN
            rows[row.contestant] = row = replace(row, status=status, reason=_root(error))
        if contestant.compiled:
            budget.seconds -= time.perf_counter() - begin
        if row.status == OK:
            calls[row.contestant] = contestant.timed or call

    timings = interleave(
        calls,
        device,
        seconds=pace.seconds,
        min_rounds=pace.min_rounds,
        max_rounds=pace.max_rounds,
        warm_up=pace.warm_up,
    )
    gflop = {contestant.name: contestant.gflop[direction] for contestant in case.contestants}
    measured = direction in ("forward", "training")
    for name, timing in timings.items():
        gflops = gflop[name] / timing.median
        rows[name] = replace(
            rows[name],
            **timing.columns,
            time_over_ours=timings[OURS].ratio(timing) if OURS in timings else None,
            gflops=gflops,
            share_of_matmul=gflops / matmul_gflops,
            peak_mib=peak_memory(calls[name], device) / 2**20 if measured else None,
        )
    return list(rows.values())


def _verified(row: Row, case: Case, got: dict[str, torch.Tensor]) -> Row:
    if row.contestant in (FLOOR, OTHER):  # computes nothing that has a truth
        return replace(row, status=OK)
    error, where = worst_error(got, case.truth[row.direction], case.plain_errors[row.direction])
    if error <= 1:
        return replace(row, status=OK, error_over_allowed=error)
    reason = f"{where}: error {error:.3g} times what the numeric rule allows"
    return replace(row, status=FAILED, reason=reason, error_over_allowed=error)


def _root(error: BaseException) -> str:
    """The first line of what an error was raised for."""
    while cause := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = cause
    return (str(error).strip() or type(error).__name__).splitlines()[0]
