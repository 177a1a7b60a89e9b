"""Rows, ratios, files and lines."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu import limits, report
from gpu.job import write_json
from gpu.rows import BOUND, OUR, PEER, Row, best_peer, contests, speedup, summarise
from gpu.schedule import FAILED as PART_FAILED
from gpu.schedule import OK as PART_OK
from gpu.schedule import Outcome
from results import FAILED, OK

RUN = {"command": "python benchmarks/gpu_suite.py", "device": {"device": "a GPU", "torch": "2.11"}}


def row(shape: str, contestant: str, role: str, call: float, graph: float | None) -> Row:
    return Row(
        *(shape, 1, 4, 4, 8, 1, "bfloat16", "attention", "training", contestant, role, OK),
        rounds=5,
        median_ms=call,
        graph_ms=graph,
        time_over_triton=call / 2,
        time_over_cuda=call / 4,
        tflops=1.0,
        gbps=2.0,
        share_of_ceiling=0.5,
        peak_mib=1.0,
        peak_over_sdpa=0.25,
    )


ROWS = [
    row("a", "triton", OUR, 2.0, 1.0),
    row("a", "cuda", OUR, 4.0, 0.5),
    row("a", "eager", PEER, 8.0, 2.0),
    row("a", "sdpa", PEER, 6.0, 4.0),
    replace(row("a", "flex", PEER, 1.0, 1.0), status=FAILED, reason="wrong"),
    row("a", "flash-no-bias", BOUND, 1.0, 0.5),
    row("b", "triton", OUR, 2.0, None),
    replace(row("b", "cuda", OUR, 1.0, 1.0), status=FAILED),
    row("b", "sdpa", PEER, 24.0, 1.0),
]


def test_the_best_peer_is_right_and_no_bound() -> None:
    a, b = contests(ROWS)
    assert best_peer(a).contestant == "sdpa"
    assert best_peer(a, graphs=True).contestant == "eager"
    assert (speedup(a, "triton"), speedup(a, "cuda")) == (3.0, 1.5)
    assert (speedup(a, "triton", graphs=True), speedup(a, "cuda", graphs=True)) == (2.0, 4.0)
    assert (speedup(b, "triton"), speedup(b, "triton", graphs=True)) == (12.0, None)
    assert speedup(b, "cuda") is None


def test_the_summary() -> None:
    triton, cuda = summarise(ROWS)
    assert triton["speedup_geomean"] == pytest.approx((3 * 12) ** 0.5)
    assert (triton["speedup_min"], triton["slowest_shape"], triton["shapes"]) == (3.0, "a", 2)
    assert (triton["graph_speedup_min"], cuda["graph_speedup_min"]) == (2.0, 4.0)
    assert (cuda["ours"], cuda["shapes"], cuda["peak_over_sdpa_max"]) == ("cuda", 1, 0.25)


OUTCOMES = [
    Outcome(
        "ceilings",
        PART_OK,
        3.0,
        9.0,
        result={"matmul_gflops": {"bfloat16": 8e5}, "copy_gbps": 3e3, "failures": []},
    ),
    Outcome(
        "rule",
        PART_FAILED,
        5.0,
        9.0,
        ["the last line"],
        {
            "cases": 9,
            "rows": [{"operator": "mlp", "error_over_allowed": float("inf")}],
            "failures": ["mlp: 3 times"],
            "worst": [
                {
                    "operator": "mlp",
                    "backend": "triton",
                    "precision": "tf32",
                    "case": "hidden=3",
                    "where": "y",
                    "reason": "",
                    "error_over_allowed": 0.5,
                }
            ],
        },
    ),
    Outcome(
        "operators",
        PART_OK,
        7.0,
        9.0,
        result={
            "contests": 80,
            "rows": [row.__dict__ for row in ROWS],
            "failures": [],
            "summary": summarise(ROWS),
        },
    ),
]


def test_files_hold_everything_so_far(tmp_path: Path) -> None:
    report.write(tmp_path, RUN, [])
    assert json.loads((tmp_path / "gpu_suite.json").read_text()) == RUN | {"parts": []}
    for i in range(len(OUTCOMES)):
        report.write(tmp_path, RUN, OUTCOMES[: i + 1])
        written = json.loads((tmp_path / "gpu_suite.json").read_text())
        assert [part["name"] for part in written["parts"]] == ["ceilings", "rule", "operators"][
            : i + 1
        ]
    rule = written["parts"][1]
    assert (rule["status"], rule["error"]) == ("failed", ["the last line"])
    assert rule["result"]["rows"][0]["error_over_allowed"] is None  # there is no inf in JSON
    with (tmp_path / "operators.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contestant"] for line in lines] == [row.contestant for row in ROWS]
    assert (tmp_path / "ceilings.csv").read_text().splitlines()[1] == "matmul bfloat16,800000.0"
    assert len(list(tmp_path.iterdir())) <= 5


def test_the_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(tmp_path, RUN, OUTCOMES)
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.write(tmp_path, RUN, OUTCOMES)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "operators.png").exists()


def test_lines() -> None:
    ceilings, rule, operators = map(report.part_line, OUTCOMES)
    assert ceilings.split() == ["ceilings", "ok", "3.0", "s"]
    assert rule.endswith("1 of 9 cases  1 failures: mlp: 3 times")
    assert operators.endswith("2 of 80 contests")
    killed = Outcome("tests", "timed out", 9.0, 9.0, ["stopped at its share of 9.0 s"])
    assert report.part_line(killed).endswith("stopped at its share of 9.0 s")
    text = "\n".join(report.tables(OUTCOMES))
    assert "bfloat16 800; copy 3000 GB/s" in text
    assert "mlp               triton  tf32        0.50  hidden=3 y" in text
    assert "best peer over ours 6.00 (mean of 2), least 3.00; graphs 2.00, 2.00" in text
    assert len(report.contest_lines(ROWS)) == 1 + 3  # what is wrong has no line


def test_a_document_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1.0, float("nan")]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1.0, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_ceilings_of_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ceilings.SECONDS", 0.0)
    found = limits.measure(torch.device("cpu"), ("tf32", "float32"))
    assert found["matmul_gflops"].keys() == {"tf32", "float32"}
    assert all(value > 0 for value in (*found["matmul_gflops"].values(), found["copy_gbps"]))


def test_the_device_is_described() -> None:
    description = report.describe(torch.device("cpu"))
    assert {"device", "torch", "python", "diffit", "date", "cuda"} <= description.keys()
