"""Write the measured tables again from benchmarks/results.

The README gets a line per device and dtype, of layers and of networks, and every layer on GPUs;
docs/results.md every layer on CPUs and every network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_table
import network_table
from diffit.cli.arguments import Parser
from results import Contest, Row, Summary, contests, read, summarise
from table import DTYPES

BEGIN, END = RESULTS_MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")
GPU_MARKERS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
NETWORKS_MARKERS = ("<!-- networks:begin -->", "<!-- networks:end -->")
Run = tuple[dict[str, Any], list[Row]]
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = [
    ("attention", "forward"),
    ("attention", "backward"),
    ("block", "forward"),
    ("block", "backward"),
]
NETWORK_COLUMNS = {
    "evaluation": ("step", "forward"),
    "guided evaluation": ("guided step", "forward"),
    "training step": ("step", "training"),
    "sampling": ("loop", "sampling"),
}


def summary_table(runs: list[Run]) -> str:
    """All devices in Markdown, a line per dtype: the mean over the layers and the least."""
    lines = [
        "| device | dtype | "
        + " | ".join(f"{operation} {direction}" for operation, direction in COLUMNS)
        + " | block forward / its GEMMs |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for run, rows in runs:
        for dtype, found in _summaries(rows, COLUMNS).items():
            values = [f"{s.speedup_geomean:.2f}x ({s.speedup_min:.2f})" if s else "" for s in found]
            block = found[COLUMNS.index(("block", "forward"))]
            floor = f"{block.over_floor_geomean:.2f}" if block and block.over_floor_geomean else ""
            cells = [_device(run), DTYPES[dtype], *values, floor]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def network_summary_table(runs: list[Run]) -> str:
    """The same of networks, and how many of them there are."""
    lines = [
        f"| device | dtype | {' | '.join(NETWORK_COLUMNS)} |",
        "|---" * (2 + len(NETWORK_COLUMNS)) + "|",
    ]
    for run, rows in runs:
        for dtype, found in _summaries(rows, NETWORK_COLUMNS.values()).items():
            values = [
                f"{s.speedup_geomean:.2f}x ({s.speedup_min:.2f}), {s.shapes}" if s else ""
                for s in found
            ]
            lines.append("| " + " | ".join([_device(run), DTYPES[dtype], *values]) + " |")
    return "\n".join(lines)


def _summaries(
    rows: list[Row], columns: Iterable[tuple[str, str]]
) -> dict[str, list[Summary | None]]:
    """For each dtype the summary of each (operation, direction)."""
    found = {(s.operation, s.direction, s.dtype): s for s in summarise(rows)}
    dtypes = dict.fromkeys(row.dtype for row in rows)
    return {dtype: [found.get((*column, dtype)) for column in columns] for dtype in dtypes}


def _device(run: dict[str, Any]) -> str:
    return "{device}, {instruction_set}, {threads} threads, {date}".format(**run["device"])


def device_table(run: dict[str, Any], rows: list[Row]) -> str:
    """One device in Markdown: a line per layer and dtype, then the geometric means."""
    ceilings = ", ".join(
        f"{gflops:.0f} GFLOP/s {DTYPES[dtype]}"
        for dtype, gflops in run["ceilings"]["matmul_gflops"].items()
    )
    lines = [
        f"## {_device(run)}",
        "",
        "torch {torch}, diffit {diffit}; matmul ceiling ".format(**run["device"])
        + f"{ceilings}; `{run['command']}`.",
        "",
        "| layer (batch, grid, window, channels, heads) | dtype | "
        + " | ".join(f"{operation} {direction}" for operation, direction in COLUMNS)
        + " | block forward / its GEMMs |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    layers: dict[tuple[str, str], dict[tuple[str, str], Contest]] = {}
    for contest in contests(rows):
        ours = contest.ours
        cells = layers.setdefault((ours.shape, ours.dtype), {})
        cells[ours.operation, ours.direction] = contest
    for (_, dtype), cells in layers.items():
        ours = next(iter(cells.values())).ours
        layer = (
            f"{ours.shape} ({ours.batch}, {ours.grid}, {ours.window}, {ours.dim}, {ours.num_heads})"
        )
        block = cells.get(("block", "forward"))
        floor = f"{block.over_floor:.2f}" if block and block.over_floor else ""
        values = [_cell(cells.get(column)) for column in COLUMNS]
        lines.append("| " + " | ".join([layer, DTYPES[dtype], *values, floor]) + " |")
    for dtype, found in _summaries(rows, COLUMNS).items():
        values = [f"**{s.speedup_geomean:.2f}x**" if s else "" for s in found]
        block_mean = found[COLUMNS.index(("block", "forward"))]
        floor = ""
        if block_mean and block_mean.over_floor_geomean:
            floor = f"**{block_mean.over_floor_geomean:.2f}**"
        lines.append("| " + " | ".join(["geometric mean", DTYPES[dtype], *values, floor]) + " |")
    if not all(contest.complete for contest in contests(rows)):
        lines += ["", "\\* Compiled peers did not run here: the time for compiling was used up."]
    return "\n".join(lines)


def _cell(contest: Contest | None) -> str:
    if contest is None:
        return "not measured"
    ours, best = contest.ours, contest.best
    if ours.median_ms is None:
        return ours.status
    if best is None or contest.speedup is None:
        return f"{ours.median_ms:.3g} ms, no right peer"
    mark = "" if contest.complete else "\\*"
    return f"{ours.median_ms:.3g} ms, {contest.speedup:.2f}x {best.contestant}{mark}"


def replace_table(text: str, table: str, markers: tuple[str, str] = RESULTS_MARKERS) -> str:
    """The text with everything between the two markers replaced.

    Raises:
        ValueError: the markers are not there once each, in this order.
    """
    first, last = markers
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in after:
        raise ValueError(f"expected {first} and, after it, {last}, once each")
    return f"{before}{first}\n{table}\n{last}{after}"


def main() -> int:
    """The exit code."""
    Parser(prog="readme_table.py", description=__doc__).parse_args()
    folders = sorted(path.parent for path in RESULTS.glob("*/results.json"))
    folders = [folder for folder in folders if folder.name != "quick"]
    runs = [read(folder) for folder in folders]
    networks = sorted(folder for folder in RESULTS.iterdir() if (folder / "models.json").exists())
    models = [
        read(folder, "models", network_table.NetworkRow)
        for folder in networks
        if folder.name != "quick"
    ]
    networks_in_full = "\n\n".join(network_table.markdown(*run) for run in models)
    suites = [gpu_table.read(path.parent) for path in sorted(RESULTS.glob("*/gpu_suite.json"))]
    gpus = [gpu_table.markdown(device, rows) for device, rows in suites if rows]
    tables = [
        ("README.md", RESULTS_MARKERS, summary_table(runs)),
        ("README.md", NETWORKS_MARKERS, network_summary_table(models)),
        ("README.md", GPU_MARKERS, "\n\n".join(gpus) or "Not measured yet."),
        ("docs/results.md", RESULTS_MARKERS, "\n\n".join(device_table(*run) for run in runs)),
        ("docs/results.md", NETWORKS_MARKERS, networks_in_full or "Not measured yet."),
    ]
    for name, markers, table in tables:
        path = ROOT / name
        try:
            path.write_text(replace_table(path.read_text(), table, markers))
        except (OSError, ValueError) as error:
            print(f"readme_table.py: {name}: {error}", file=sys.stderr)
            return 2
        print(f"{name}: what is between {' and '.join(markers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
