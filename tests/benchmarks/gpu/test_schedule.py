"""Parts in order, within the budget, whatever becomes of them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from gpu.schedule import FAILED, KILLED, OK, TIMED_OUT, Outcome, Part, run


def part(name: str, script: str, weight: float = 1.0) -> Part:
    """A script that finds the end of its time in ``until`` and its file in ``out``."""
    head = "import json, os, signal, subprocess, sys, time\n"
    head += "until, out = float(sys.argv[1]), sys.argv[2]\n"
    return Part(
        name,
        weight,
        lambda until, out: [sys.executable, "-S", "-c", head + script, str(until), str(out)],
    )


WRITES = "json.dump({'left': until - time.time()}, open(out, 'w'))\n"


def outcomes(*parts: Part, seconds: float = 20.0) -> list[Outcome]:
    return list(run(parts, seconds, dict(os.environ), Path.cwd()))


def test_parts_run_in_order_and_leave_their_results() -> None:
    found = outcomes(part("first", WRITES), part("second", WRITES))
    assert [(outcome.name, outcome.status) for outcome in found] == [("first", OK), ("second", OK)]
    assert all(outcome.result["left"] > 0 and outcome.error == [] for outcome in found)


def test_unused_time_flows_on() -> None:
    """A quarter of 20 seconds, then all that the first left: not the three quarters alone."""
    first, second = outcomes(part("first", WRITES, 1), part("second", WRITES, 3))
    assert first.share == pytest.approx(5, abs=0.1)
    assert 15 < second.share < 20
    assert first.result["left"] < first.share
    assert 13 < second.result["left"] < second.share


def test_a_failing_part_is_recorded_and_the_rest_runs() -> None:
    failing = part("failing", WRITES + "print('so', 'far'); raise ValueError('no good')")
    found = outcomes(failing, part("next", WRITES))
    assert [outcome.status for outcome in found] == [FAILED, OK]
    assert found[0].error[-1] == "ValueError: no good"
    assert "so far" in found[0].error
    assert found[0].result  # written before it failed


def test_a_killed_part_is_recorded_and_the_rest_runs() -> None:
    found = outcomes(part("dying", "os.kill(os.getpid(), signal.SIGSEGV)"), part("next", WRITES))
    assert [outcome.status for outcome in found] == [KILLED, OK]
    assert found[0].error[-1] == "ended by SIGSEGV"


def test_a_hanging_part_is_stopped_at_its_share_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hanging = part(
        "hanging",
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n" + WRITES + "time.sleep(60)",
    )
    begin = time.monotonic()
    found = outcomes(hanging, part("next", WRITES), seconds=3)
    assert time.monotonic() - begin < 6
    assert [outcome.status for outcome in found] == [TIMED_OUT, OK]
    assert found[0].error[-1] == "stopped at its share of 1.5 s"
    assert found[0].result
    state = Path("/proc", pid.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_part_that_cannot_be_read_has_no_result() -> None:
    (outcome,) = outcomes(part("half", "open(out, 'w').write('{\"a\": ')"))
    assert (outcome.status, outcome.result) == (OK, {})


def test_an_outcome_is_json() -> None:
    (outcome,) = outcomes(part("one", WRITES))
    assert json.loads(json.dumps(outcome.__dict__))["name"] == "one"
