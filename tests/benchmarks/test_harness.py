"""Timing, the numeric rule and the memory of a call."""

from __future__ import annotations

import math
import time

import pytest
import torch

from harness import Timing, errors, interleave, peak_memory, timed, worst_error

CPU = torch.device("cpu")


def test_timing_ratio_is_the_median_over_rounds() -> None:
    ours, theirs = Timing((1.0, 2.0, 10.0)), Timing((2.0, 6.0, 10.0))
    assert ours.ratio(theirs) == 2.0
    assert ours.median == 2.0


def test_timing_spread_is_the_outer_deciles() -> None:
    assert Timing(tuple(range(11))).spread == (1.0, 9.0)


def test_timed_counts_seconds() -> None:
    assert 0.02 <= timed(lambda: time.sleep(0.02), CPU) < 1


def test_rounds_interleave_and_begin_with_each_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleave(calls, CPU, seconds=1, min_rounds=2, max_rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(timing.rounds) for timing in timings.values()] == [4, 4, 4]


def test_rounds_end_when_the_time_is_up_but_not_before_the_least_number() -> None:
    timings = interleave(
        {"slow": lambda: time.sleep(0.01)}, CPU, seconds=0, min_rounds=3, max_rounds=100
    )
    assert len(timings["slow"].rounds) == 3


def test_worst_error_is_in_units_of_what_is_allowed() -> None:
    truth = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    got = {"a": torch.tensor([0.0, -3.0, 0.0]), "b": torch.tensor([1.5, 1.0])}
    assert errors(got, truth) == {"a": 3.0, "b": 0.5}
    error, where = worst_error(got, truth, {"a": 1.0, "b": 1.0})
    assert where == "a"
    assert error == pytest.approx(1.5, rel=1e-5)


def test_nan_breaks_the_rule_wherever_it_is() -> None:
    truth = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    got = {"a": torch.zeros(3), "b": torch.tensor([0.0, math.nan, 0.0])}
    assert worst_error(got, truth, {"a": 1.0, "b": 1.0}) == (math.inf, "b")


def test_peak_memory_is_what_was_held_at_once() -> None:
    kibi = 2**10

    def call() -> torch.Tensor:
        freed = torch.zeros(3 * kibi, dtype=torch.uint8)
        del freed
        first = torch.zeros(2 * kibi, dtype=torch.uint8)
        second = torch.zeros(4 * kibi, dtype=torch.uint8)
        del first
        return second

    assert peak_memory(call, CPU) == 6 * kibi
