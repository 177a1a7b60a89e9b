"""Results of a benchmark: rows, contests between them, their summary, JSON and CSV."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffit_kernels import WindowAttentionProblem

OURS = "ours"
FLOOR = "gemms"  # the four matrix products of a block and nothing else
OTHER = "diffusers-dit"  # another network of the same size: it shows a cost, and is no peer

# Wrong by the numeric rule; an error of the peer; left out by the settings of the run.
OK, FAILED, CANNOT_RUN, SKIPPED = "ok", "FAILED", "cannot run", "not run"


@dataclass(frozen=True)
class Layer:
    """The columns that say which attention layer a row is of."""

    shape: str
    batch: int
    grid: int
    window: int
    dim: int
    num_heads: int


def layer_columns(shape: str, problem: WindowAttentionProblem) -> dict[str, Any]:
    """Those of a layer, by name."""
    layer = Layer(
        shape=shape,
        batch=problem.batch,
        grid=problem.grid_size[0],
        window=problem.window_size[0],
        dim=problem.dim,
        num_heads=problem.num_heads,
    )
    return asdict(layer)


@dataclass(frozen=True)
class Row(Layer):
    """One contestant in one contest."""

    dtype: str
    operation: str
    direction: str
    contestant: str
    status: str
    reason: str = ""
    error_over_allowed: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    time_over_ours: float | None = None
    gflops: float | None = None
    share_of_matmul: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Contest:
    """All contestants at one shape, dtype, operation and direction."""

    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row:
        """Our row."""
        return next(row for row in self.rows if row.contestant == OURS)

    @property
    def best(self) -> Row | None:
        """The fastest peer with a right result."""
        peers = [row for row in self.rows if row.contestant not in (OURS, FLOOR, OTHER)]
        return min(
            (row for row in peers if row.median_ms is not None),
            key=lambda row: row.median_ms or 0.0,
            default=None,
        )

    @property
    def speedup(self) -> float | None:
        """Time of the best peer over ours, the median over rounds."""
        return None if self.best is None else self.best.time_over_ours

    @property
    def over_floor(self) -> float | None:
        """Our time over that of the block's four matrix products alone."""
        for row in self.rows:
            if row.contestant == FLOOR and row.time_over_ours is not None:
                return 1 / row.time_over_ours
        return None

    @property
    def complete(self) -> bool:
        """Whether no peer was left out by the settings of the run."""
        return all(row.status != SKIPPED for row in self.rows)


@dataclass(frozen=True)
class Summary:
    """All shapes of one operation, direction and dtype."""

    operation: str
    direction: str
    dtype: str
    shapes: int
    speedup_geomean: float
    speedup_min: float
    slowest_shape: str
    over_floor_geomean: float | None
    over_floor_max: float | None


def contests(rows: Sequence[Row]) -> list[Contest]:
    """Rows grouped, in their order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.shape, row.dtype, row.operation, row.direction)
        groups.setdefault(key, []).append(row)
    return [Contest(tuple(group)) for group in groups.values()]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary per operation, direction and dtype, of the contests that have a ratio."""
    groups: dict[tuple[str, str, str], list[Contest]] = {}
    for contest in contests(rows):
        if contest.speedup is not None:
            ours = contest.ours
            groups.setdefault((ours.operation, ours.direction, ours.dtype), []).append(contest)
    found = []
    for key, group in sorted(groups.items()):
        speedups = {contest.ours.shape: contest.speedup or 0.0 for contest in group}
        slowest = min(speedups, key=lambda shape: speedups[shape])
        floors = [contest.over_floor for contest in group if contest.over_floor is not None]
        found.append(
            Summary(
                *key,
                shapes=len(group),
                speedup_geomean=statistics.geometric_mean(speedups.values()),
                speedup_min=speedups[slowest],
                slowest_shape=slowest,
                over_floor_geomean=statistics.geometric_mean(floors) if floors else None,
                over_floor_max=max(floors, default=None),
            )
        )
    return found


def exceptions(rows: Sequence[Row]) -> list[str]:
    """A line for everything that kept contestants from being timed."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row.status != OK:
            contest = f"{row.shape} {row.dtype} {row.operation} {row.direction}"
            names = reasons.setdefault((row.status, row.reason), {})
            names.setdefault(row.contestant, []).append(contest)
    lines = []
    for (status, reason), names in reasons.items():
        where = {contest for held in names.values() for contest in held}
        place = where.pop() if len(where) == 1 else f"{len(where)} contests"
        lines.append(f"{', '.join(names)}: {status} in {place}: {reason}")
    return lines


def write(folder: Path, run: dict[str, Any], rows: Sequence[Row], name: str = "results") -> None:
    """``NAME.json`` with everything, ``NAME.csv`` with a row per contestant.

    ``run`` describes device, versions and settings; its "device" part is in every line of the CSV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [asdict(summary) for summary in summarise(rows)]
    document = {**run, "summary": summaries, "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        columns = [field.name for field in fields(rows[0] if rows else Row)] + list(run["device"])
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(asdict(row) | run["device"] for row in rows)


def read(
    folder: Path, name: str = "results", row: type[Row] = Row
) -> tuple[dict[str, Any], list[Row]]:
    """What ``write`` was given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    path = folder / f"{name}.json"
    text = path.read_text()
    try:
        document = json.loads(text)
        rows = [row(**values) for values in document.pop("rows")]
        del document["summary"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the results of a benchmark: {error!r}") from None
    return document, rows
