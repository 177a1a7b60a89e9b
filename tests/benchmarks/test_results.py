"""Rows, the contests between them, the summary and the files."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import plot
import readme_table
import table
from results import (
    FAILED,
    FLOOR,
    OK,
    OURS,
    SKIPPED,
    Row,
    contests,
    exceptions,
    read,
    summarise,
    write,
)

DEVICE = {
    "device": "a processor",
    "instruction_set": "avx2",
    "threads": 2,
    "torch": "2.0",
    "diffit": "0.1",
    "date": "2026-01-01",
}
RUN = {
    "command": "python benchmarks/tmsa_bench.py",
    "device": DEVICE,
    "ceilings": {"matmul_gflops": {"float32": 100.0}, "copy_gbps": 10.0},
}


def row(shape: str, contestant: str, median_ms: float, over_ours: float) -> Row:
    return Row(
        shape,
        batch=1,
        grid=4,
        window=4,
        dim=8,
        num_heads=1,
        dtype="float32",
        operation="block",
        direction="forward",
        contestant=contestant,
        status=OK,
        rounds=5,
        median_ms=median_ms,
        p10_ms=median_ms,
        p90_ms=median_ms,
        time_over_ours=over_ours,
        gflops=50.0,
        share_of_matmul=0.5,
        peak_mib=1.0,
    )


ROWS = [
    row("small", OURS, 1.0, 1.0),
    row("small", "eager", 4.0, 4.0),
    row("small", "sdpa", 2.0, 2.0),
    row("small", FLOOR, 0.8, 0.8),
    row("large", OURS, 10.0, 1.0),
    row("large", "eager", 80.0, 8.0),
    replace(row("large", "sdpa", 5.0, 0.5), status=FAILED, reason="x: wrong", median_ms=None),
    replace(row("large", "flex", 5.0, 0.5), status=SKIPPED, reason="no time", median_ms=None),
    row("large", FLOOR, 5.0, 0.5),
]


def test_the_best_peer_is_the_fastest_that_is_right() -> None:
    small, large = contests(ROWS)
    assert (small.best and small.best.contestant, small.speedup) == ("sdpa", 2.0)
    assert (large.best and large.best.contestant, large.speedup) == ("eager", 8.0)
    assert (small.complete, large.complete) == (True, False)
    assert (small.over_floor, large.over_floor) == (1.25, 2.0)


def test_the_summary_is_the_geometric_mean_and_the_minimum() -> None:
    (summary,) = summarise(ROWS)
    assert summary.shapes == 2
    assert summary.speedup_geomean == pytest.approx(math.sqrt(2 * 8))
    assert (summary.speedup_min, summary.slowest_shape) == (2.0, "small")
    assert summary.over_floor_geomean == pytest.approx(math.sqrt(1.25 * 2))
    assert summary.over_floor_max == 2.0


def test_every_exception_is_told() -> None:
    assert exceptions(ROWS) == [
        "sdpa: FAILED in large float32 block forward: x: wrong",
        "flex: not run in large float32 block forward: no time",
    ]


def test_the_table_tells_a_contest_with_fewer_peers() -> None:
    small, large = (table.line(contest) for contest in contests(ROWS))
    assert len(table.header()) >= len(small)
    assert "2.00x " in small
    assert "8.00x*" in large


def test_ours_failed_is_shown_without_numbers() -> None:
    failed = replace(ROWS[0], status=FAILED, median_ms=None)
    line = table.line(contests([failed, ROWS[1]])[0])
    assert line.split() == ["small", "fp32", "block", "forward", FAILED]


def test_without_a_right_peer_there_is_no_ratio() -> None:
    wrong = replace(ROWS[1], status=FAILED, median_ms=None, time_over_ours=None)
    (contest,) = contests([ROWS[0], wrong])
    assert contest.speedup is None
    assert summarise([ROWS[0], wrong]) == []
    assert "none" in table.line(contest)
    assert "x" not in table.line(contest)
    assert "1 ms, no right peer" in readme_table.device_table(RUN, [ROWS[0], wrong])


def test_files_hold_every_row(tmp_path: Path) -> None:
    write(tmp_path, RUN, ROWS)
    assert read(tmp_path) == (RUN, ROWS)
    assert json.loads((tmp_path / "results.json").read_text())["summary"][0]["shapes"] == 2
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contestant"] for line in lines] == [row.contestant for row in ROWS]
    assert {line["device"] for line in lines} == {"a processor"}


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, RUN, ROWS)
    assert plot.save(tmp_path) == f"results.png is in {tmp_path}"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    line = plot.save(tmp_path)
    assert line.startswith("no picture: matplotlib is not installed")
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}], "summary": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: expected the results of a benchmark"):
        read(tmp_path)


def test_readme_table_is_replaced_between_the_markers() -> None:
    text = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    new = readme_table.replace_table(text, readme_table.device_table(RUN, ROWS))
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert "old" not in new
    assert "| small (1, 4, 4, 8, 1) | fp32 |" in new
    assert "1 ms, 2.00x sdpa |" in new
    assert "10 ms, 8.00x eager\\* |" in new
    assert "**4.00x**" in new
    assert readme_table.replace_table(new, "again").count("again") == 1


def test_summary_of_the_readme() -> None:
    """The mean of 2 and 8, and the least; a line per device and dtype."""
    lines = readme_table.summary_table([(RUN, ROWS), (RUN, ROWS)]).splitlines()
    assert len(lines) == 4
    assert lines[2] == lines[3]
    assert lines[2].startswith("| a processor, avx2, 2 threads, 2026-01-01 | fp32 |")
    assert "4.00x (2.00)" in lines[2]


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        readme_table.BEGIN,
        readme_table.END + readme_table.BEGIN,
        2 * (readme_table.BEGIN + readme_table.END),
    ],
)
def test_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="results:begin"):
        readme_table.replace_table(text, "table")
