"""The table of errors: what it covers, and that it tells right from wrong."""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from gpu import rule, workers
from gpu.job import Job
from gpu.precision import PRECISIONS
from results import FAILED, OK
from tests.benchmarks.gpu.stand_in import stand_in, wrong
from tests.cases import AttentionCase

CPU = torch.device("cpu")
SMALL = {
    "window_attention": {"window": (3, 5), "head_dim": 8, "windows": (1, 2), "scale": 50.0},
    "tmsa": {"window": (2, 3), "head_dim": 8},
    "mlp": {"shape": (5, 8), "hidden": 12, "out": 7},
    "add_layer_norm": {"shape": (5, 33), "offset": 10.0},
    "layer_norm": {"shape": (5, 33), "offset": 10.0},
}


def task(operator: str, precision: str, backend: str = "triton") -> workers.Task:
    """As a worker gets it."""
    made = {
        "operator": operator,
        "backend": backend,
        "precision": precision,
        "case": SMALL[operator],
    }
    return json.loads(json.dumps(made))


def test_every_case_that_has_to_be_shown_is_there() -> None:
    found = {
        (task["backend"], task["precision"], task["case"]["window"], task["case"]["head_dim"])
        for task in rule.tasks()
        if task["operator"] == "window_attention"
    }
    windows = [(1, 1), (3, 5), (4, 4), (7, 7), (8, 8), (16, 16), (32, 32)]
    widths = [8, 32, 40, 64, 72, 80, 128]
    for backend, precisions in (("triton", PRECISIONS), ("cuda", ("bfloat16", "float16"))):
        assert set(product([backend], precisions, windows, widths)) <= found
    assert {backend for backend, *_ in found} == {"triton", "cuda"}
    for how in ({"scale": 50.0}, {"constant": True}):
        assert any(how.items() <= task["case"].items() for task in rule.tasks())
    assert {task["operator"] for task in rule.tasks()} == set(SMALL)
    of_one = [task for task in rule.tasks() if task["precision"] == "tf32"]
    assert list(rule.tasks(["tf32"])) == of_one


def test_no_case_is_there_twice() -> None:
    keys = [json.dumps(task, sort_keys=True) for task in rule.tasks()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tf32"])
@pytest.mark.parametrize("operator", SMALL)
def test_what_is_right_keeps_the_rule(
    operator: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    row = rule.measure(task(operator, precision), CPU)
    assert (row["status"], row["reason"]) == (OK, "")
    assert 0 <= row["error_over_allowed"] <= 1
    assert row["where"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_plain_pytorch_is_of_the_same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TF32 and without it a case is the same, and what it remembers is not."""
    stand_in(monkeypatch)
    remembered = AttentionCase._plain
    remembered.cache_clear()
    for misses, precision in enumerate(("tf32", "float32"), 1):
        rule.measure(task("window_attention", precision), CPU)
        assert (remembered.cache_info().hits, remembered.cache_info().misses) == (0, misses)


def test_what_is_wrong_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, cuda=wrong())
    row = rule.measure(task("window_attention", "float32", "cuda"), CPU)
    assert row["status"] == FAILED
    assert row["error_over_allowed"] > 1
    assert row["where"] in ("out", "grad_rel_pos_table", "grad_qkv", "grad_q_row", "grad_v_row")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, cuda="no device")
    row = rule.measure(task("mlp", "float32", "cuda"), CPU)
    assert row["status"] == FAILED
    assert row["reason"] == "backend 'cuda' cannot run this call: no device"


def test_a_part_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers answer some, one breaks the rule, one dies; all is told."""
    tasks = [task("mlp", "float32"), task("mlp", "bfloat16"), task("tmsa", "float32")]
    script = """
import json, os, sys
for line in sys.stdin:
    task = json.loads(line)
    if task["operator"] == "tmsa":
        os._exit(9)
    broken = task["precision"] == "bfloat16"
    task |= {"status": "FAILED" if broken else "ok", "where": "y", "reason": "2 times" * broken}
    task["error_over_allowed"] = 2.0 if broken else 0.5
    print(json.dumps({"result": task}), flush=True)
"""
    monkeypatch.setattr(rule, "tasks", lambda _: tasks)
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-S", "-c", script])
    result = rule.run(Job(CPU, time.time() + 30, tmp_path / "out.json"))
    assert (result["cases"], len(result["rows"]), result["left_out"]) == (3, 3, 0)
    assert len(result["failures"]) == 2
    assert any(
        "tmsa triton float32 window=2x3 head_dim=8: the process" in f for f in result["failures"]
    )
    shares = {(row["operator"], row["precision"]): row for row in result["worst"]}
    assert shares["mlp", "float32"]["error_over_allowed"] == 0.5
    assert shares["tmsa", "float32"]["status"] == FAILED
