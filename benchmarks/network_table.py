"""Rows of whole networks, and their table on the screen and in Markdown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from networks import Task
from results import OTHER, Contest, Row, contests
from table import DTYPES

EAGER = "eager"
_COLUMNS = (
    ("network", 23),
    ("dtype", 5),
    ("batch", -5),
    ("what", 13),
    ("ours ms", -9),
    ("p10-p90", -17),
    ("eager ms", -9),
    ("ratio", -6),
    ("best peer", 12),
    ("ms", -9),
    ("ratio", -7),
    ("images/s", -8),
    ("GFLOP/s", -7),
    ("MiB", -6),
    ("eager's", -7),
    ("| DiT ms", -9),
)


@dataclass(frozen=True)
class NetworkRow(Row):
    """One contestant on one network; ``shape`` is its preset.

    ``images_per_second`` is measured, of a loop of ``steps``. The preset has ``own_steps``; where
    these differ, ``derived_images_per_second`` is what they would give if every evaluation took as
    long as here.
    """

    parameters_m: float = 0.0
    steps: int | None = None
    evaluations: int | None = None
    images_per_second: float | None = None
    own_steps: int | None = None
    own_evaluations: int | None = None
    derived_images_per_second: float | None = None


def with_rates(row: Row, task: Task) -> NetworkRow:
    """The row with images per second, if it is one of a sampling loop."""
    assert isinstance(row, NetworkRow)
    if task.direction != "sampling":
        return row
    own = replace(task, steps=task.preset.sampling.steps)
    rate = None if row.median_ms is None else 1e3 * task.batch / row.median_ms
    derived = None if rate is None else rate * task.evaluations / own.evaluations
    return replace(
        row,
        steps=task.steps,
        evaluations=task.evaluations,
        images_per_second=rate,
        own_steps=own.steps,
        own_evaluations=own.evaluations,
        derived_images_per_second=derived if own.steps != task.steps else None,
    )


def header() -> str:
    """The names of the columns."""
    return _line([name for name, _ in _COLUMNS])


def line(contest: Contest) -> str:
    """Our numbers beside those of the eager network, of the best peer, and of DiT."""
    ours, best = contest.ours, contest.best
    assert isinstance(ours, NetworkRow)
    what = ours.direction if ours.direction == "training" else ours.operation
    if ours.steps is not None:
        what += f" of {ours.steps}"
    cells = [ours.shape, DTYPES[ours.dtype], str(ours.batch), what]
    if ours.median_ms is None:
        return _line([*cells, ours.status, *[""] * 11])
    others = {row.contestant: row for row in contest.rows}
    eager, dit = others.get(EAGER), others.get(OTHER)
    return _line(
        [
            *cells,
            f"{ours.median_ms:.4g}",
            f"{ours.p10_ms:.4g}-{ours.p90_ms:.4g}",
            _number(eager and eager.median_ms, "{:.4g}"),
            _number(eager and eager.time_over_ours, "{:.2f}x"),
            best.contestant if best else "none",
            _number(best and best.median_ms, "{:.4g}"),
            _number(contest.speedup, "{:.2f}x" if contest.complete else "{:.2f}x*"),
            _number(ours.images_per_second, "{:.3g}"),
            _number(ours.gflops, "{:.0f}"),
            _number(ours.peak_mib, "{:.0f}"),
            _number(eager and eager.peak_mib, "{:.0f}"),
            _number(dit and dit.median_ms, "{:.4g}"),
        ]
    )


def markdown(run: dict[str, Any], rows: list[Row]) -> str:
    """One device: a line per network and dtype, with our time and the ratios to two peers."""
    columns = list(dict.fromkeys((row.operation, row.direction) for row in rows))
    titles = [direction if direction == "training" else name for name, direction in columns]
    lines = [
        "{device}, {instruction_set}, {threads} threads, {date}; torch {torch}, diffit {diffit}; "
        "`{command}`. Our time; how many times longer the eager network and the best peer "
        "took.".format(**run["device"], command=run["command"]),
        "",
        f"| network | dtype | {' | '.join(titles)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for contest in contests(rows):
        ours = contest.ours
        cells.setdefault((ours.shape, ours.dtype), {})[ours.operation, ours.direction] = _cell(
            contest
        )
    for (shape, dtype), found in cells.items():
        values = [found.get(column, "") for column in columns]
        lines.append(f"| {shape} | {DTYPES[dtype]} | {' | '.join(values)} |")
    return "\n".join(lines)


def _cell(contest: Contest) -> str:
    ours = contest.ours
    if ours.median_ms is None:
        return ours.status
    text = f"{ours.median_ms:.4g} ms"
    if isinstance(ours, NetworkRow) and ours.images_per_second is not None:
        text = f"{ours.images_per_second:.3g} images/s, {ours.steps} steps"
    for row in contest.rows:
        if row.contestant == EAGER and row.time_over_ours is not None:
            text += f", eager {row.time_over_ours:.2f}x"
    if contest.best is not None and contest.speedup is not None:
        mark = "" if contest.complete else "\\*"
        text += f", {contest.best.contestant} {contest.speedup:.2f}x{mark}"
    return text


def derived_line(row: NetworkRow) -> str:
    """What a short loop means for one of the preset's own length, said to be derived."""
    return (
        f"{row.shape} {DTYPES[row.dtype]}: {row.derived_images_per_second:.3g} images/s with its "
        f"own {row.own_steps} steps ({row.own_evaluations} evaluations an image): derived, not "
        f"measured, from loops of {row.steps} steps ({row.evaluations} evaluations)"
    )


def _number(value: float | Row | None, form: str) -> str:
    return form.format(value) if isinstance(value, float) else ""


def _line(cells: list[str]) -> str:
    padded = (
        cell.ljust(width) if width > 0 else cell.rjust(-width)
        for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )
    return " ".join(padded).rstrip()
