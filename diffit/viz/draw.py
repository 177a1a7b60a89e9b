"""The pictures, with matplotlib (extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffit.extras import import_extra
from diffit.files import replacing
from diffit.nn import TMSA
from diffit.viz.attention import Moment, attention_received

DPI = 110
SMOOTH = 50  # steps


def draw_attention(
    path: Path,
    network: nn.Module,
    moments: Sequence[Moment],
    layers: Sequence[str],
    *,
    times: Sequence[str],
    head: int | None = None,
) -> None:
    """Attention by layer (down) and time (across), each with and without the time token.

    Args:
        path: of the PNG.
        network: which was recorded.
        moments: recorded evaluations; the first picture of each is shown above.
        layers: names of layers.
        times: a caption for each moment.
        head: see ``attention_received``.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows: list[tuple[str, list[NDArray[Any]]]] = []
    for name in layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, TMSA)
        for title, maps in (
            ("with token", [moment.with_time for moment in moments]),
            ("without", [moment.without_time for moment in moments]),
        ):
            if all(name in found for found in maps):
                grid, window = _grid(maps[0][name], layer), layer.window_size
                images = [attention_received(m[name][0], grid, window, head) for m in maps]
                rows.append((f"{name}\n{title}", images))
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(rows) + 1,
        len(moments),
        figsize=(1.7 * len(moments) + 2.2, 1.75 * (len(rows) + 1) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for column, (moment, time) in enumerate(zip(moments, times, strict=True)):
        picture = moment.pictures[0, :3].float().cpu().permute(1, 2, 0).numpy()
        low, high = np.quantile(picture, (0.01, 0.99))
        axes[0, column].imshow(((picture - low) / (high - low)).clip(0, 1))
        axes[0, column].set_title(time, fontsize=9)
    axes[0, 0].set_ylabel("input", fontsize=8)
    most = max(float(image.max()) for _, images in rows for image in images)
    shown: Any = None
    for row, (label, images) in enumerate(rows, start=1):
        for column, image in enumerate(images):
            shown = axes[row, column].imshow(image, cmap="viridis", vmin=0, vmax=most)
        axes[row, 0].set_ylabel(label, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    which = "mean of all heads" if head is None else f"head {head}"
    bar = figure.colorbar(shown, ax=axes[1:], shrink=0.8, aspect=40)
    bar.set_label(f"attention received (1: uniform), {which}", fontsize=8)
    _save(figure, path)


def draw_bias(path: Path, layer: str, table: NDArray[np.float64]) -> None:
    """A table by head: key relative to query, red where attention is drawn to, blue where off.

    Args:
        path: of the PNG.
        layer: its name.
        table: (heads, 2 wh - 1, 2 ww - 1), see ``bias_tables``.

    Raises:
        ImportError: matplotlib is missing.
    """
    heads, rows, columns = table.shape
    across = math.ceil(math.sqrt(heads))
    down = math.ceil(heads / across)
    figure, axes = _pyplot().subplots(
        down,
        across,
        figsize=(2.1 * across + 1.2, 2.2 * down + 0.7),
        squeeze=False,
        layout="constrained",
    )
    most = float(np.abs(table).max()) or 1.0
    x, y = (columns - 1) / 2 + 0.5, (rows - 1) / 2 + 0.5
    for axis in axes.flat[heads:]:
        axis.set_axis_off()
    for head, axis in enumerate(axes.flat[:heads]):
        # A key to the right of its query has dx < 0 in the table: turned by 180 degrees.
        image = table[head, ::-1, ::-1]
        shown = axis.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most, extent=(-x, x, y, -y))
        axis.set_title(f"head {head}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("key right of query, tokens", fontsize=8)
    figure.supylabel("key below query, tokens", fontsize=8)
    figure.suptitle(layer, fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.8).set_label("bias of the logit", fontsize=8)
    _save(figure, path)


def draw_losses(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """The loss of training runs by images seen, each point the mean of ``SMOOTH`` steps.

    Args:
        path: of the PNG.
        runs: by a name for the legend, the lines of a run's ``stats.jsonl``.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axis = _pyplot().subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, lines in runs.items():
        losses = np.array([line["loss"] for line in lines])
        images = np.array([line["images"] for line in lines])
        width = min(SMOOTH, len(losses))
        mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axis.plot(images[width - 1 :], mean, linewidth=1, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("images")
    axis.set_ylabel(f"loss, mean of {SMOOTH} steps")
    axis.grid(which="both", alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _grid(probabilities: Any, layer: TMSA) -> tuple[int, int]:
    """Of square pictures: windows and their size give it."""
    _, windows, _, tokens, _ = probabilities.shape
    wh, ww = layer.window_size
    if windows == 1:
        return wh, ww
    side = math.isqrt(windows * tokens)
    return side, side


def _pyplot() -> Any:
    matplotlib = import_extra("matplotlib", "plot")
    matplotlib.use("agg")
    return import_extra("matplotlib.pyplot", "plot")


def _save(figure: Any, path: Path) -> None:
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=DPI)
    finally:
        _pyplot().close(figure)
