"""What gpu_suite.py found of attention and blocks in bfloat16, as a table of Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffit_kernels.triton.configs import table_named
from gpu.rows import Contest, Row, best_peer, contests, named, speedup
from shapes import SHAPES

COLUMNS = [
    ("attention", "forward"),
    ("attention", "training"),
    ("block", "forward"),
    ("block", "training"),
]
PRECISION = "bfloat16"


def read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The device of a run of the suite, and the rows of its contests."""
    document = json.loads((folder / "gpu_suite.json").read_text())
    rows = [
        Row(**row)
        for part in document["parts"]
        if part["name"] in ("operators", "blocks")
        for row in part["result"].get("rows", [])
    ]
    return document["device"], rows


def markdown(device: dict[str, Any], rows: list[Row]) -> str:
    """A line per layer, the backend that "auto" takes there on this device."""
    lines = [
        "{device}, torch {torch}, Triton {triton}, {date}:".format(**device),
        "",
        "| layer | backend | "
        + " | ".join(f"{operation} {direction}" for operation, direction in COLUMNS)
        + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    faster = table_named(device["device"]).cuda_is_faster
    layers: dict[str, dict[tuple[str, str], Contest]] = {}
    for contest in contests(row for row in rows if row.precision == PRECISION):
        row = contest[0]
        layers.setdefault(row.shape, {})[row.operation, row.direction] = contest
    for shape in [name for name in SHAPES if name in layers]:
        row = next(iter(layers[shape].values()))[0]
        ours = "cuda" if [row.window**2, row.dim // row.num_heads] in faster else "triton"
        cells = [_cell(layers[shape].get(column), ours) for column in COLUMNS]
        lines.append("| " + " | ".join([shape, f"`{ours}`", *cells]) + " |")
    return "\n".join(lines)


def _cell(contest: Contest | None, ours: str) -> str:
    if contest is None:
        return "not measured"
    mine, best = named(contest, ours), best_peer(contest, graphs=True)
    if mine is None or mine.graph_ms is None or best is None:
        return "no right result"
    ratio, calls = speedup(contest, ours, graphs=True), speedup(contest, ours)
    return f"{mine.graph_ms:.3g} ms, {ratio:.2f}x {best.contestant} ({calls:.2f}x)"
