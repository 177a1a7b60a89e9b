"""What the suite leaves behind: one JSON with everything, CSVs, charts, and a table to read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import device as machine
from gpu.job import write_json
from gpu.limits import nvidia_smi
from gpu.precision import PRECISIONS
from gpu.rows import OURS, Row, best_peer, contests, named, speedup
from gpu.schedule import OK, Outcome
from plot import subplots
from shapes import SHAPES
from table import DTYPES

COLORS = {"triton": "#4c78a8", "cuda": "#e8792b"}


def describe(device: torch.device) -> dict[str, Any]:
    """The device, its state and every version that a result depends on."""
    description: dict[str, Any] = dict(machine.describe(device))
    description["cuda"] = torch.version.cuda or torch.version.hip
    if find_spec("triton") is not None:
        import triton

        description["triton"] = triton.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["capability"] = f"{properties.major}.{properties.minor}"
        description["multiprocessors"] = properties.multi_processor_count
        description["memory_gib"] = properties.total_memory / 2**30
    description |= {f"nvidia_smi_{name}": value for name, value in nvidia_smi().items()}
    return description


def write(folder: Path, run: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """``gpu_suite.json`` with what is known so far; the last part's CSV and chart."""
    write_json(folder / "gpu_suite.json", run | {"parts": [asdict(part) for part in outcomes]})
    if not outcomes:
        return
    last = outcomes[-1]
    if rows := _rows(last):
        with (folder / f"{last.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    if last.name in ("operators", "blocks") and rows:
        path = folder / f"{last.name}.png"
        try:
            draw(path, [Row(**row) for row in rows], run["device"])
        except Exception as error:  # the numbers are written, and parts are still to come
            print(f"no {path.name}: {error}")


def _rows(part: Outcome) -> list[dict[str, Any]]:
    if part.name == "ceilings" and "matmul_gflops" in part.result:
        matmul = part.result["matmul_gflops"].items()
        rows = [{"ceiling": f"matmul {name}", "10^9 per s": value} for name, value in matmul]
        return [*rows, {"ceiling": "copy, bytes", "10^9 per s": part.result["copy_gbps"]}]
    return part.result.get("rows", [])


def draw(path: Path, rows: list[Row], device: dict[str, Any]) -> None:
    """Time of the best peer over ours by shape, a panel per direction and precision.

    A bar is of calls, the line at it of replays of graphs, each with its ratio. Without matplotlib
    nothing is drawn.
    """
    if find_spec("matplotlib") is None:
        print(f"no {path.name}: matplotlib is not installed")
        return
    from matplotlib import patches

    # As rows come, workers ended.
    panels = sorted({(row.precision, row.direction) for row in rows}, key=_panel_order)
    found = {row.shape for row in rows}
    shapes = [name for name in SHAPES if name in found] or sorted(found)
    figure, axes = subplots(len(panels), shapes)
    text = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7}
    for panel, axis in zip(panels, axes, strict=True):
        axis.set_title(f"{rows[0].operation}, {panel[1]}, {panel[0]}", loc="left", fontsize=10)
        for contest in contests(row for row in rows if (row.precision, row.direction) == panel):
            for i, ours in enumerate(OURS):
                ratio, graphs = speedup(contest, ours), speedup(contest, ours, graphs=True)
                x = shapes.index(contest[0].shape) + 0.4 * (i - 0.5)
                if ratio is not None:
                    axis.bar(x, ratio, 0.36, color=COLORS[ours])
                    axis.annotate(f"{ratio:.2f}", (x, 0), (0, 2), color="white", **text)
                if graphs is not None:
                    axis.plot([x - 0.18, x + 0.18], [graphs, graphs], color="black", linewidth=2)
                    axis.annotate(f"{graphs:.2f}", (x, graphs), (0, 2), **text)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [patches.Patch(color=color) for color in COLORS.values()]
    axes[0].legend(handles, list(COLORS), loc="upper right", ncols=2, frameon=False)
    figure.supylabel("time of the best peer / ours   (line: replays of CUDA graphs)", fontsize=10)
    figure.suptitle(f"{device['device']}, torch {device['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel_order(panel: tuple[str, str]) -> tuple[int, str]:
    return list(PRECISIONS).index(panel[0]), panel[1]


def part_line(part: Outcome) -> str:
    """What became of a part, in one line."""
    failures = part.result.get("failures", [])
    note = f"{len(failures)} failures: {failures[0]}" if failures else ""
    if part.status != OK and not note:
        note = part.error[-1] if part.error else ""
    cells = (f"{part.name:10}", f"{part.status:9}", f"{part.seconds:6.1f} s", _reached(part), note)
    return "  ".join(cell for cell in cells if cell)


def _reached(part: Outcome) -> str:
    """How far a part came."""
    result = part.result
    if part.name == "build":
        return f"cuda: {result.get('backend', '?')}"
    if part.name == "rule":
        return f"{len(result.get('rows', []))} of {result.get('cases', '?')} cases"
    if part.name in ("operators", "blocks"):
        held = contests(Row(**row) for row in result.get("rows", []))
        return f"{len(held)} of {result.get('contests', '?')} contests"
    if part.name == "tests":
        return f"{result.get('passed', '?')} passed, {len(result.get('failed', []))} failed"
    if part.name == "sanitizer":
        return f"compute-sanitizer: {result.get('tool', '?')}"
    return ""


def tables(outcomes: Sequence[Outcome]) -> list[str]:
    """The numbers that matter most, as lines."""
    lines: list[str] = []
    for part in outcomes:
        if part.name == "ceilings" and "matmul_gflops" in part.result:
            matmul = part.result["matmul_gflops"].items()
            rates = ", ".join(f"{name} {value / 1e3:.0f}" for name, value in matmul)
            copy = part.result["copy_gbps"]
            lines += ["", f"ceilings: matmul TFLOP/s {rates}; copy {copy:.0f} GB/s"]
        if part.name == "rule" and part.result.get("worst"):
            lines += ["", "largest error over what is allowed"]
            lines += [_worst(row) for row in part.result["worst"]]
        if part.name in ("operators", "blocks") and part.result.get("rows"):
            lines += ["", *contest_lines([Row(**row) for row in part.result["rows"]])]
            lines += [_summary(entry) for entry in part.result.get("summary", [])]
    return lines


def _worst(row: dict[str, Any]) -> str:
    error = row["error_over_allowed"]
    share = "     -" if error is None else f"{error:6.2f}"
    case = f"{row['case']} {row['where']} {row['reason']}".rstrip()
    return f"{row['operator']:17} {row['backend']:7} {row['precision']:9} {share}  {case}"


def contest_lines(rows: Sequence[Row]) -> list[str]:
    """A line per contest and backend of ours."""
    lines = [
        "shape           prec. operation direction ours    call ms graph ms  TFLOP/s   GB/s "
        "ceiling best peer       ratio  graphs  memory"
    ]
    for contest in contests(rows):
        best = best_peer(contest)
        for ours in OURS:
            row = named(contest, ours)
            if row is None:
                continue
            cells = (
                f"{row.shape:15} {DTYPES.get(row.precision, row.precision):5} {row.operation:9} "
                f"{row.direction:9} {ours:6}",
                _number(row.median_ms, 8, ".3g"),
                _number(row.graph_ms, 8, ".3g"),
                _number(row.tflops, 8, ".1f"),
                _number(row.gbps, 6, ".0f"),
                _number(row.share_of_ceiling, 7, ".0%"),
                f"{best.contestant if best else 'none':14}",
                _number(speedup(contest, ours), 6, ".2f"),
                _number(speedup(contest, ours, graphs=True), 7, ".2f"),
                _number(row.peak_over_sdpa, 7, ".2f"),
            )
            lines.append(" ".join(cells).rstrip())
    return lines


def _summary(entry: dict[str, Any]) -> str:
    line = "{operation} {direction} {precision} {ours}: best peer over ours ".format(**entry)
    line += "{speedup_geomean:.2f} (mean of {shapes}), least {speedup_min:.2f}".format(**entry)
    if entry["graph_speedup_geomean"] is not None:
        line += "; graphs {graph_speedup_geomean:.2f}, {graph_speedup_min:.2f}".format(**entry)
    return line


def _number(value: float | None, width: int, form: str) -> str:
    return ("-" if value is None else format(value, form)).rjust(width)
