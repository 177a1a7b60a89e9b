"""Peers and ours compute the same thing: in float64 they agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inputs import image_tokens, load_pictures
from operations import DIRECTIONS, FLOOR, OPERATIONS, build
from peers import PEERS
from shapes import QUICK, SHAPES, Shape

CPU = torch.device("cpu")
SMALL = {
    "whole grid": Shape("whole grid", 2, 4, 4, 16, 2, 8),
    "windows": Shape("windows", 3, 6, 3, 24, 3, 8),
    "one token": Shape("one token", 2, 2, 1, 8, 1, 8),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_peers_agree_in_float64(
    operation: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler is left out: what it is given is tested here, what it makes by the benchmark.
    plain = tuple(replace(peer, compiled=False) for peer in PEERS)
    monkeypatch.setattr("operations.PEERS", plain)
    case = build(operation, shape, torch.float64, CPU)
    names = [contestant.name for contestant in case.contestants]
    assert {"ours", *(peer.name for peer in PEERS)} <= set(names)
    for contestant in case.contestants:
        if contestant.name == FLOOR:
            continue
        for direction in DIRECTIONS:
            if (contestant.name, direction) == ("flex", "backward"):
                continue  # PyTorch has none on the CPU
            got = contestant.call(direction)()
            assert got.keys() == case.truth[direction].keys()
            for name, exact in case.truth[direction].items():
                # The table, and so its gradient, is float32 for every contestant.
                dtype = torch.float32 if name.endswith("table") else torch.float64
                assert got[name].dtype == dtype, (contestant.name, name)
                torch.testing.assert_close(got[name], exact, check_dtype=False)


def test_operations_are_counted() -> None:
    shape = Shape("s", 2, 4, 2, 16, 2, 8)
    case = build("block", shape, torch.float32, CPU)
    gflop = {contestant.name: contestant.gflop for contestant in case.contestants}
    tokens, products = 2 * 16, 12 * 16 * 16
    attention = 2 * tokens * 4 * 2 * 16  # two products over the 4 tokens of a window, C = 16
    assert gflop[FLOOR]["forward"] * 1e9 == pytest.approx(2 * tokens * products)
    assert gflop["ours"]["forward"] * 1e9 == pytest.approx(2 * tokens * products + attention)
    assert gflop["ours"]["backward"] * 1e9 == pytest.approx(4 * tokens * products + 2.5 * attention)


def test_tokens_come_from_pictures() -> None:
    pictures = load_pictures(3, 16, first=0)
    assert pictures.shape == (3, 3, 16, 16)
    assert -1 <= pictures.min() < 0 < pictures.max() <= 1
    tokens = image_tokens(3, 8, 32, torch.Generator().manual_seed(0))
    again = image_tokens(3, 8, 32, torch.Generator().manual_seed(0))
    assert tokens.shape == (3, 64, 32)
    assert torch.equal(tokens, again)
    # Neighbours see almost the same pixels: unlike noise, tokens are correlated.
    neighbours = torch.cosine_similarity(tokens[:, 1:], tokens[:, :-1], dim=-1)
    assert neighbours.mean() > 0.5


@pytest.mark.parametrize("shape", [*SHAPES.values(), *QUICK.values()], ids=lambda s: s.name)
def test_shapes_are_problems_of_the_operator(shape: Shape) -> None:
    problem = shape.problem(torch.float32, CPU)
    assert problem.dim == shape.dim
    assert shape.grid % shape.window == 0
