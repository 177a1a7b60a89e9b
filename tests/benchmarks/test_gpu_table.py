"""The table of a GPU's results."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import gpu_table
from gpu.rows import OUR, PEER, Row
from results import FAILED, OK

DEVICE = {"device": "NVIDIA H200", "torch": "2", "triton": "3", "date": "today"}
OURS = Row(
    *("imagenet256", 32, 16, 16, 1152, 16, "bfloat16", "attention", "forward", "cuda", OUR, OK),
    median_ms=2.0,
    graph_ms=0.5,
)
SDPA = replace(OURS, contestant="sdpa", role=PEER, median_ms=3.0, graph_ms=1.0, time_over_cuda=1.5)
WRONG = replace(SDPA, contestant="compile", status=FAILED, graph_ms=0.1)


def test_a_cell_has_our_time_and_both_ratios() -> None:
    line = gpu_table.markdown(DEVICE, [OURS, SDPA, WRONG]).splitlines()[-1]
    assert line == (
        "| imagenet256 | `cuda` | 0.5 ms, 2.00x sdpa (1.50x) "
        "| not measured | not measured | not measured |"
    )


def test_without_a_right_peer_there_is_no_ratio() -> None:
    assert "| no right result |" in gpu_table.markdown(DEVICE, [OURS, WRONG])


def test_rows_of_the_suite_are_read(tmp_path: Path) -> None:
    part = {"name": "operators", "result": {"rows": [asdict(OURS)]}}
    document = {"device": DEVICE, "parts": [{"name": "tests", "result": {}}, part]}
    (tmp_path / "gpu_suite.json").write_text(json.dumps(document))
    assert gpu_table.read(tmp_path) == (DEVICE, [OURS])
