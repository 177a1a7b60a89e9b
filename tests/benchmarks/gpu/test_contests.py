"""Contests of two of ours with all peers, on the CPU in the place of a GPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu import contests, workers
from gpu.job import Job
from gpu.precision import PRECISIONS
from gpu.rows import BOUND, OUR, PEER, Row, speedup, summarise
from results import CANNOT_RUN, FAILED, OK
from shapes import SHAPES, Shape
from tests.benchmarks.gpu.stand_in import stand_in, wrong

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 6, 3, 24, 3, 8)
CEILINGS = {"matmul_gflops": {"float32": 100.0, "bfloat16": 100.0}, "copy_gbps": 10.0}
COMPILED = dict.fromkeys(("compile", "compile-sdpa", "flex"), "takes too long for a test")


def task(operation: str, direction: str, **changes: Any) -> workers.Task:
    made = {
        "operation": operation,
        "precision": "float32",
        "shape": asdict(SHAPE),
        "direction": direction,
        "ceilings": CEILINGS,
        "skip": COMPILED,
        "seconds": 0,
    }
    return json.loads(json.dumps(made | changes))


def rows(**arguments: Any) -> dict[str, Row]:
    found = contests.measure(task(**arguments), CPU)["rows"]
    return {row["contestant"]: Row(**row) for row in json.loads(json.dumps(found))}


def test_every_layer_is_there_in_every_precision() -> None:
    tasks = contests.tasks("block", CEILINGS, tuple(PRECISIONS))
    found = {(t["shape"]["name"], t["precision"], t["direction"]) for t in tasks}
    assert len(found) == len(tasks) == len(SHAPES) * 4 * 2
    assert [t["precision"] for t in tasks[: 2 * len(SHAPES)]] == ["bfloat16"] * 2 * len(SHAPES)


@pytest.mark.parametrize("direction", contests.DIRECTIONS)
@pytest.mark.parametrize("operation", ["attention", "block"])
def test_a_contest(operation: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a problem this small plain PyTorch is all but exact by chance, on one processor or another.
    # Peers made of PyTorch then break the rule; what is wrong breaks it by far more.
    worst_error = contests.worst_error
    monkeypatch.setattr(
        contests,
        "worst_error",
        lambda got, truth, plain_errors: worst_error(
            got, truth, {name: max(error, 1e-5) for name, error in plain_errors.items()}
        ),
    )
    stand_in(monkeypatch)
    found = rows(operation=operation, direction=direction)
    roles = {name: row.role for name, row in found.items()}
    assert {name for name, role in roles.items() if role == OUR} == {"triton", "cuda"}
    bounds = {"math-no-bias", "flash-no-bias", "cudnn-no-bias"}
    if operation == "block":
        bounds.add("gemms")
    assert {name for name, role in roles.items() if role == BOUND} == bounds
    peers = {"eager", "sdpa", "sdpa-math", "sdpa-efficient", "sdpa-cudnn", *COMPILED}
    assert {name for name, role in roles.items() if role == PEER} == peers
    for name in COMPILED:
        assert (found[name].status, found[name].reason) == (CANNOT_RUN, COMPILED[name])
    for name in ("triton", "cuda", "eager", "sdpa", "sdpa-math", "math-no-bias"):
        row = found[name]
        assert row.status == OK, (name, row.reason)
        assert 0 <= row.error_over_allowed <= 1
        assert row.median_ms > 0
        assert row.time_over_triton > 0
        assert row.peak_mib > 0
        assert row.graph_ms is None  # no CUDA
        assert row.share_of_ceiling > 0
    assert found["triton"].time_over_triton == 1
    assert found["sdpa"].peak_over_sdpa == 1
    assert found["sdpa-cudnn"].status == CANNOT_RUN
    assert found["sdpa-cudnn"].median_ms is None


def test_operations_and_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward two products and four tensors; training three and a half times that, and eleven."""
    stand_in(monkeypatch)
    tokens, features = 2 * 36, 2 * 36 * 24
    for direction, factor, tensors in (("forward", 1, 4), ("training", 3.5, 11)):
        row = rows(operation="attention", direction=direction)["triton"]
        flops = factor * 2 * 2 * tokens * 9 * 24
        assert row.tflops * 1e12 * row.median_ms / 1e3 == pytest.approx(flops)
        assert row.gbps * 1e9 * row.median_ms / 1e3 == pytest.approx(tensors * features * 4)
        floor = max(flops / 100e9, tensors * features * 4 / 10e9)
        assert row.share_of_ceiling == pytest.approx(floor / row.median_ms * 1e3)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, cuda=wrong())
    found = rows(operation="attention", direction="training")
    assert found["cuda"].status == FAILED
    assert found["cuda"].error_over_allowed > 1
    assert found["cuda"].median_ms is None
    assert found["triton"].status == OK
    contest = list(found.values())
    assert speedup(contest, "cuda") is None
    assert speedup(contest, "triton") > 0
    (entry,) = summarise(contest)
    assert (entry["ours"], entry["shapes"]) == ("triton", 1)
    of_one = pytest.approx(speedup(contest, "triton"))  # a mean of logarithms rounds
    assert entry["speedup_min"] == of_one
    assert entry["speedup_geomean"] == of_one


def test_ours_that_cannot_run_has_failed_but_for_a_dtype_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, triton="no device", cuda="torch.float32 is not one of bfloat16, float16")
    found = rows(operation="attention", direction="forward")
    assert found["triton"].status == FAILED
    assert found["triton"].reason == "backend 'triton' cannot run this call: no device"
    assert found["cuda"].status == CANNOT_RUN
    assert found["eager"].median_ms > 0
    assert found["eager"].time_over_triton is None


def test_a_contestant_that_kills_is_left_out_of_the_second_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies of "cuda" in one contest, and in another whenever it starts."""
    script = """
import json, os, sys
for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps({"at": "truth"}), flush=True)
    if task["direction"] == "forward":
        os._exit(1)
    print(json.dumps({"at": "cuda"}), flush=True)
    if "cuda" not in task["skip"]:
        print("an illegal access", file=sys.stderr, flush=True)
        os._exit(1)
    rows = [task["row"] | {"reason": task["skip"]["cuda"]}]
    print(json.dumps({"result": {"rows": rows}}), flush=True)
"""
    row = asdict(
        Row("tiny", 1, 6, 3, 24, 3, "float32", "attention", "training", "cuda", OUR, FAILED)
    )
    made = [task("attention", direction, skip={}, row=row) for direction in contests.DIRECTIONS]
    monkeypatch.setattr(contests, "tasks", lambda *_: made)
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-S", "-c", script])
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text(json.dumps(CEILINGS))
    job = Job(CPU, time.time() + 20, tmp_path / "out.json", ceilings)
    result = contests.operators(job)
    assert result["left_out"] == []
    assert [row["reason"] for row in result["rows"]] == [
        "the process ended with 1: an illegal access"
    ]
    forward = "attention float32 forward tiny: truth: the process ended with 1: said nothing"
    training = "attention float32 training tiny cuda: the process ended with 1: an illegal access"
    assert sorted(result["failures"]) == sorted({forward, training})
    assert json.loads(job.out.read_text())["contests"] == 2
