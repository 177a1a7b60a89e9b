"""What a contest on a GPU gives: a row per contestant, and how two of ours stand to the peers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from results import OK, Layer

OURS = ("triton", "cuda")  # our backends
OUR, PEER, BOUND = "ours", "peer", "bound"


@dataclass(frozen=True)
class Row(Layer):
    """One contestant in one contest.

    ``median_ms`` is the time of a call, ``graph_ms`` that of a replay of its CUDA graph: without
    the time to launch. Rates and ``share_of_ceiling`` are of ``graph_ms`` where there is one.
    """

    precision: str
    operation: str
    direction: str
    contestant: str
    role: str
    status: str
    reason: str = ""
    error_over_allowed: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    graph_ms: float | None = None
    time_over_triton: float | None = None
    time_over_cuda: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    share_of_ceiling: float | None = None
    peak_mib: float | None = None
    peak_over_sdpa: float | None = None


Contest = list[Row]


def contests(rows: Iterable[Row]) -> list[Contest]:
    """Rows grouped, in their order."""
    groups: dict[tuple[str, ...], Contest] = {}
    for row in rows:
        key = (row.shape, row.precision, row.operation, row.direction)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def named(contest: Contest, name: str) -> Row | None:
    """The row of a contestant that was timed."""
    return next((row for row in contest if row.contestant == name and row.status == OK), None)


def best_peer(contest: Contest, graphs: bool = False) -> Row | None:
    """The fastest peer that kept the numeric rule, by its calls or by replays of its graph."""
    time = "graph_ms" if graphs else "median_ms"
    peers = [row for row in contest if (row.role, row.status) == (PEER, OK)]
    timed = [row for row in peers if getattr(row, time) is not None]
    return min(timed, key=lambda row: getattr(row, time), default=None)


def speedup(contest: Contest, ours: str, graphs: bool = False) -> float | None:
    """Time of the best peer over that of one of ours."""
    mine, best = named(contest, ours), best_peer(contest, graphs)
    if mine is None or best is None:
        return None
    if not graphs:
        return getattr(best, f"time_over_{ours}")
    if mine.graph_ms is None or best.graph_ms is None:
        return None
    return best.graph_ms / mine.graph_ms


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per operation, direction, precision and backend of ours that has a ratio."""
    groups: dict[tuple[str, str, str, str], list[Contest]] = {}
    for contest in contests(rows):
        for ours in OURS:
            if speedup(contest, ours) is not None:
                row = contest[0]
                key = (row.operation, row.direction, row.precision, ours)
                groups.setdefault(key, []).append(contest)
    found = []
    for (operation, direction, precision, ours), group in groups.items():
        ratios = {contest[0].shape: speedup(contest, ours) or 0.0 for contest in group}
        graphs = [ratio for c in group if (ratio := speedup(c, ours, graphs=True)) is not None]
        slowest = min(ratios, key=lambda shape: ratios[shape])
        mine = [own for contest in group if (own := named(contest, ours)) is not None]
        shares = [row.share_of_ceiling for row in mine if row.share_of_ceiling is not None]
        peaks = [row.peak_over_sdpa for row in mine if row.peak_over_sdpa is not None]
        found.append(
            {
                "operation": operation,
                "direction": direction,
                "precision": precision,
                "ours": ours,
                "shapes": len(ratios),
                "speedup_geomean": statistics.geometric_mean(ratios.values()),
                "speedup_min": ratios[slowest],
                "slowest_shape": slowest,
                "graph_speedup_geomean": statistics.geometric_mean(graphs) if graphs else None,
                "graph_speedup_min": min(graphs, default=None),
                "share_of_ceiling_median": statistics.median(shares) if shares else None,
                "peak_over_sdpa_max": max(peaks, default=None),
            }
        )
    return found
