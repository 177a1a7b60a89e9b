"""The table on the screen."""

from __future__ import annotations

from results import Contest, Summary

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_COLUMNS = (
    ("shape", 15),
    ("dtype", 5),
    ("operation", 9),
    ("pass", 8),
    ("ours ms", -9),
    ("p10-p90", -16),
    ("best peer", 13),
    ("ms", -8),
    ("ratio", -7),
    ("GFLOP/s", -8),
    ("matmul", -6),
    ("MiB", -7),
    ("peer's", -7),
    ("/gemms", -6),
)


def header() -> str:
    """The names of the columns."""
    return _line([name for name, _ in _COLUMNS])


def line(contest: Contest) -> str:
    """Our numbers beside those of the best peer.

    A ratio with ``*`` is over the peers that ran: some were left out by the settings.
    """
    ours, best, floor = contest.ours, contest.best, contest.over_floor
    cells = [ours.shape, DTYPES[ours.dtype], ours.operation, ours.direction]
    if ours.median_ms is None:
        return _line([*cells, ours.status, *[""] * 9])
    return _line(
        [
            *cells,
            f"{ours.median_ms:.3g}",
            f"{ours.p10_ms:.3g}-{ours.p90_ms:.3g}",
            best.contestant if best else "none",
            _number(best.median_ms if best else None, "{:.3g}"),
            _number(contest.speedup, "{:.2f}x" if contest.complete else "{:.2f}x*"),
            _number(ours.gflops, "{:.0f}"),
            _number(ours.share_of_matmul, "{:.0%}"),
            _number(ours.peak_mib, "{:.1f}"),
            _number(best.peak_mib if best else None, "{:.1f}"),
            _number(floor, "{:.2f}"),
        ]
    )


def summary_line(summary: Summary) -> str:
    """The geometric mean and the minimum of the ratios, and the block over its GEMMs."""
    shapes = "1 shape" if summary.shapes == 1 else f"{summary.shapes} shapes"
    text = (
        f"{summary.operation:9} {summary.direction:8} {DTYPES[summary.dtype]}: "
        f"geometric mean {summary.speedup_geomean:.2f}x over {shapes}, "
        f"minimum {summary.speedup_min:.2f}x ({summary.slowest_shape})"
    )
    if summary.over_floor_geomean is not None:
        text += (
            f"; time over the GEMMs alone {summary.over_floor_geomean:.2f}, "
            f"at most {summary.over_floor_max:.2f}"
        )
    return text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _line(cells: list[str]) -> str:
    padded = (
        cell.ljust(width) if width > 0 else cell.rjust(-width)
        for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )
    return " ".join(padded).rstrip()
