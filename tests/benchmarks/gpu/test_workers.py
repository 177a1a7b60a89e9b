"""Tasks outlive the processes that do them."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

from gpu import BENCHMARKS, ROOT, workers
from gpu.workers import Answer, Task

# Answers with the square of "n", unless "n" is one that it dies of or never answers.
SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps({"at": f"on {task['n']}"}), flush=True)
    if task["n"] == 3 and not task.get("again"):
        print("a fault", file=sys.stderr, flush=True)
        os._exit(7)
    if task["n"] == 4:
        time.sleep(60)
    print(json.dumps({"result": {"square": task["n"] ** 2, "pid": os.getpid()}}), flush=True)
"""
COMMAND = [sys.executable, "-S", "-c", SCRIPT]


def run(numbers: list[int], count: int = 1, **options: Any) -> tuple[dict[int, Answer], list[Task]]:
    """The last answer to each task, and those that are left; what died is done again."""
    answers = {}

    def handle(task: Task, answer: Answer) -> Task | None:
        answers[task["n"], bool(task.get("again"))] = answer
        died = answer.result is None and task["n"] == 3
        return task | {"again": True} if died else None

    limits = {"until": time.time() + 20, "task_seconds": 10.0} | options
    left = workers.run(COMMAND, [{"n": n} for n in numbers], handle, count=count, **limits)
    return answers, left


@pytest.mark.parametrize("count", [1, 3])
def test_every_task_is_answered(count: int) -> None:
    answers, left = run([0, 1, 2, 5, 6], count)
    results = {n: answer.result for (n, _), answer in answers.items()}
    assert {n: result["square"] for n, result in results.items()} == {
        0: 0,
        1: 1,
        2: 4,
        5: 25,
        6: 36,
    }
    assert len({result["pid"] for result in results.values()}) <= count
    assert left == []


def test_a_worker_that_dies_is_replaced() -> None:
    answers, left = run([2, 3, 5])
    assert answers[3, False] == Answer(None, "on 3", "the process ended with 7: a fault")
    assert answers[3, True].result["square"] == 9
    assert answers[5, False].result["pid"] != answers[2, False].result["pid"]
    assert left == []


def test_a_task_that_hangs_costs_its_time_alone() -> None:
    answers, left = run([4, 5], task_seconds=0.5)
    assert answers[4, False].result is None
    assert answers[4, False].at == "on 4"
    assert answers[5, False].result["square"] == 25
    assert left == []


def test_what_the_time_does_not_reach_is_left() -> None:
    answers, left = run([2, 4, 5], until=time.time() + 1)
    assert list(answers) == [(2, False)]
    assert [task["n"] for task in left] == [4, 5]


def test_who_times_is_alone() -> None:
    script = """
import json, sys, time
for line in sys.stdin:
    begin = time.time()
    time.sleep(json.loads(line)["prepare"])
    print(json.dumps({"at": "timing"}), flush=True)
    ready = time.time()
    sys.stdin.readline()
    alone = time.time()
    time.sleep(0.05)
    spans = {"preparing": [begin, ready], "alone": [alone, time.time()]}
    print(json.dumps({"result": spans}), flush=True)
"""
    results: list[Any] = []
    left = workers.run(
        [sys.executable, "-S", "-c", script],
        [{"prepare": 0.1 * (n % 3)} for n in range(7)],
        lambda task, answer: results.append(answer.result),
        count=3,
        until=time.time() + 30,
        task_seconds=10.0,
    )
    assert left == []
    assert len(results) == 7
    for n, one in enumerate(results):
        others = [other for m, other in enumerate(results) if m != n]
        spans = [other[what] for other in others for what in ("preparing", "alone")]
        begin, end = one["alone"]
        assert all(stop <= begin or end <= start for start, stop in spans)


def test_a_turn_after_the_end_is_none() -> None:
    """Three are ready before the end, and each would act for a second."""
    script = """
import json, sys, time
for line in sys.stdin:
    time.sleep(json.loads(line)["prepare"])
    print(json.dumps({"at": "timing"}), flush=True)
    sys.stdin.readline()
    time.sleep(1)
    print(json.dumps({"result": {}}), flush=True)
"""
    begin = time.time()
    left = workers.run(
        [sys.executable, "-S", "-c", script],
        [{"prepare": 0.2}, {"prepare": 0.5}, {"prepare": 1.0}],
        lambda task, answer: None,
        count=3,
        until=begin + 2.5,
        task_seconds=10.0,
    )
    assert time.time() - begin < 3.5
    assert len(left) == 2


def test_what_handles_answers_may_fail() -> None:
    def handle(task: Task, answer: Answer) -> None:
        raise LookupError("lost")

    limits = {"until": time.time() + 20, "task_seconds": 10.0}
    with pytest.raises(LookupError, match="lost"):
        workers.run(COMMAND, [{"n": 1}], handle, count=1, **limits)


def test_the_workers_of_a_part_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what their libraries print does not mix with their answers."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{BENCHMARKS}")
    task = {
        "operator": "window_attention",
        "backend": "reference",
        "precision": "float32",
        "case": {"window": (1, 2), "head_dim": 8},
    }
    answers = []
    command = workers.command("rule", torch.device("cpu"))
    workers.run(
        command,
        [task],
        lambda task, answer: answers.append(answer),
        count=1,
        until=time.time() + 60,
        task_seconds=60,
    )
    assert answers[0].error == ""
    assert answers[0].result["status"] == "ok"
    assert 0 <= answers[0].result["error_over_allowed"] <= 1


def test_nothing_is_lost_without_a_device() -> None:
    assert not workers.is_lost(torch.device("cpu"))
