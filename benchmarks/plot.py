"""The picture of a result: time of the best peer over ours, per shape.

``python benchmarks/plot.py FOLDER`` draws it again from FOLDER/results.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffit.cli.arguments import Parser
from results import OK, Contest, Row, contests, read
from table import DTYPES

COLORS = {"float32": "#4c78a8", "bfloat16": "#e8792b", "float16": "#4f9d69"}


def save(folder: Path, name: str = "results", row: type[Row] = Row) -> str:
    """Draw ``NAME.png`` from ``NAME.json``, of such rows; the line that says so, or why not."""
    if find_spec("matplotlib") is None:
        return (
            'no picture: matplotlib is not installed (pip install -e ".[plot]", '
            f"then python benchmarks/plot.py {folder})"
        )
    from matplotlib import patches

    run, rows = read(folder, name, row)
    panels: dict[str, list[Contest]] = {}
    for contest in contests(rows):
        title = f"{contest.ours.operation}, {contest.ours.direction}"
        panels.setdefault(title, []).append(contest)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))

    figure, axes = subplots(len(panels), shapes)
    for (title, panel), axis in zip(panels.items(), axes, strict=True):
        _draw(axis, panel, shapes, dtypes)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.supylabel("time of the best peer / ours   (* some peers were not run)", fontsize=10)
    figure.suptitle(
        "{device} ({instruction_set}), {threads} threads, torch {torch}".format(**run["device"]),
        fontsize=10,
    )
    handles = [patches.Patch(color=COLORS[dtype]) for dtype in dtypes]
    labels = [DTYPES[dtype] for dtype in dtypes]
    figure.legend(handles, labels, loc="outside upper right", ncols=len(dtypes), frameon=False)
    figure.savefig(folder / f"{name}.png", dpi=150)
    return f"{name}.png is in {folder}"


def subplots(panels: int, shapes: Sequence[str]) -> tuple[Any, Any]:
    """A figure and its panels, one below the other, with the shapes along the last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 1.2 * len(shapes)), 2.2 * panels + 1), layout="constrained")
    axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    axes[-1].set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    return figure, axes


def _draw(axis: Any, panel: list[Contest], shapes: list[str], dtypes: list[str]) -> None:
    """A bar per contest, with the name of the best peer in it and its ratio above both."""
    width = 0.8 / len(dtypes)
    letter = 0.042 * max(contest.speedup or 1 for contest in panel)  # height of one in a name
    text = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    for contest in panel:
        ours, best, ratio = contest.ours, contest.best, contest.speedup
        slot = dtypes.index(ours.dtype) - (len(dtypes) - 1) / 2
        x = shapes.index(ours.shape) + slot * width
        if best is None or ratio is None:
            label = "no right peer" if ours.status == OK else ours.status
            axis.annotate(label, (x, 0), (0, 3), fontsize=7, rotation=90, **text)
            continue
        axis.bar(x, ratio, 0.94 * width, color=COLORS[ours.dtype])
        label = f"{ratio:.2f}" if contest.complete else f"{ratio:.2f}*"
        top = max(ratio, 1, letter * len(best.contestant))
        axis.annotate(label, (x, top), (0, 1), fontsize=8, **text)
        axis.annotate(best.contestant, (x, 0), (0, 3), fontsize=7, rotation=90, **text)
    axis.axhline(1, color="black", linewidth=1)
    axis.margins(y=0.2)
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """The exit code."""
    parser = Parser(prog="plot.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="with a results.json")
    args = parser.parse_args()
    try:
        print(save(args.folder))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
