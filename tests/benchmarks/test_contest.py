"""Only a result that keeps the numeric rule is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contest import CompileBudget, Pace, hold
from operations import Case, Contestant
from results import CANNOT_RUN, FAILED, FLOOR, OK, OURS, SKIPPED, Row

X = torch.linspace(0, 1, 16, requires_grad=True)
TEMPLATE = Row("s", 1, 4, 4, 8, 1, "float32", "attention", "", "", "")
PACE = Pace(seconds=0, min_rounds=2, max_rounds=2)


def contestant(name: str, offset: float = 0.0, **changes: object) -> Contestant:
    made = Contestant(
        name,
        lambda: (X * 2 + offset,),
        {"x": X},
        (torch.ones(16),),
        {"forward": 1.0, "backward": 2.0},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def raising() -> tuple[Tensor, ...]:
    try:
        raise NotImplementedError("no such kernel\nand more")
    except NotImplementedError as error:
        raise RuntimeError("compilation failed") from error


def rows(
    *contestants: Contestant, direction: str = "forward", seconds: float = 1
) -> dict[str, Row]:
    exact = contestant("truth")
    truth = {
        name: {key: value.detach().double() for key, value in exact.call(name)().items()}
        for name in ("forward", "backward")
    }
    plain_errors = {name: dict.fromkeys(tensors, 1e-3) for name, tensors in truth.items()}
    case = Case(list(contestants), truth, plain_errors)
    budget = CompileBudget(seconds, "no time")
    held = hold(case, direction, TEMPLATE, torch.device("cpu"), PACE, budget, 100.0)
    return {row.contestant: row for row in held}


def test_all_right_results_are_timed() -> None:
    found = rows(contestant(OURS), contestant("eager", 1e-3))
    for row in found.values():
        assert (row.status, row.rounds, row.direction) == (OK, 2, "forward")
        assert row.median_ms is not None
        assert row.gflops == pytest.approx(1e3 / row.median_ms)
        assert row.share_of_matmul == pytest.approx(row.gflops / 100)
        assert row.peak_mib is not None
        assert 2 * 64 <= row.peak_mib * 2**20 < 3 * 64
    assert found[OURS].time_over_ours == 1


@pytest.mark.parametrize("name", [OURS, "eager"])
def test_a_wrong_result_fails_and_is_not_timed(name: str) -> None:
    others = {OURS, "eager"} - {name}
    found = rows(contestant(name, 0.01), *map(contestant, others))
    assert found[name].status == FAILED
    assert found[name].median_ms is None
    assert "output 0" in found[name].reason
    assert all(found[other].status == OK for other in others)


def test_a_wrong_gradient_fails_the_backward_pass() -> None:
    wrong = contestant("eager", outputs=lambda: (X * 2.1,))
    found = rows(contestant(OURS), wrong, direction="backward")
    assert found["eager"].status == FAILED
    assert found["eager"].reason.startswith("x:")
    assert found[OURS].status == OK
    assert found[OURS].peak_mib is None


def test_what_stops_a_peer_is_told_by_its_cause() -> None:
    found = rows(contestant(OURS), contestant("flex", outputs=raising))
    assert (found["flex"].status, found["flex"].reason) == (CANNOT_RUN, "no such kernel")


def test_ours_has_no_excuse() -> None:
    found = rows(contestant(OURS, outputs=raising), contestant("eager"))
    assert found[OURS].status == FAILED
    assert found["eager"].time_over_ours is None


def test_compiled_peers_run_until_the_time_is_used_up() -> None:
    peers = [contestant("compile", compiled=True), contestant("flex", compiled=True)]
    found = rows(contestant(OURS), *peers, seconds=1e-9)
    assert found["compile"].status == OK
    assert (found["flex"].status, found["flex"].reason) == (SKIPPED, "no time")


def test_the_floor_has_no_truth() -> None:
    found = rows(contestant(OURS), contestant(FLOOR, offset=5.0))
    assert found[FLOOR].status == OK


def test_a_contest_without_a_right_result_is_told() -> None:
    found = rows(contestant(OURS, 1.0), contestant("flex", outputs=raising))
    assert [row.status for row in found.values()] == [FAILED, CANNOT_RUN]
