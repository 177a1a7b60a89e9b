"""Every epoch shows every picture once, in an order that seed and position alone give."""

from __future__ import annotations

import pytest

from diffit.data.order import Order, stream_seed


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_every_epoch_is_a_permutation(length: int) -> None:
    order = Order(length, seed=3)
    for epoch in range(3):
        seen = [order[epoch * length + k] for k in range(length)]
        assert sorted(seen) == list(range(length))


def test_order_is_a_function_of_seed_and_position() -> None:
    forwards = [Order(50, seed=1)[position] for position in range(200)]
    order = Order(50, seed=1)
    assert [order[position] for position in reversed(range(200))] == forwards[::-1]
    assert [Order(50, seed=2)[position] for position in range(200)] != forwards
    assert forwards[:50] != forwards[50:100]


def test_streams_differ() -> None:
    seeds = {stream_seed(seed, name, n) for seed in (0, 1) for name in "ab" for n in range(1000)}
    # 4,000 of 2**32 collide with probability 0.002; with these seeds they do not.
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert stream_seed(1, 23) != stream_seed(12, 3)
