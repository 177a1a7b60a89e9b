"""Seeds and classes as they are written."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path
from zipfile import ZipFile

import pytest

from diffit.cli.seeds import CLASS_NAMES, format_seeds, parse_classes, parse_seeds
from diffit.diffusion.noise import MAX_SEED

DATA = Path(__file__).parents[3] / "examples" / "data"
NAMES = ("Food & Drink", "Flags")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", [7]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("9,0,5-7", [9, 0, 5, 6, 7]),
        ("1, 0-2 ,1", [1, 0, 2]),
        (str(MAX_SEED), [MAX_SEED]),
    ],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("seeds", "text"),
    [([7], "7"), ([0, 1, 2, 3], "0-3"), ([9, 0, 5, 6, 7], "9,0,5-7"), ([4, 3, 2], "4,3,2")],
)
def test_seeds_as_text(seeds: list[int], text: str) -> None:
    assert format_seeds(seeds) == text
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "3-1",
        "-1",
        "1--2",
        "1-",
        "1,,2",
        "0x3",
        "1.5",
        "٣",
        "0-10000000",
        str(MAX_SEED + 1),
    ],
)
def test_no_seeds(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("1", [1]),
        ("1,0,1", [1, 0, 1]),
        ("0-1", [0, 1]),
        ("flags, Food & Drink", [1, 0]),
        ("none,0", [2, 0]),
    ],
)
def test_classes(text: str, classes: list[int]) -> None:
    assert parse_classes(text, 2, NAMES) == classes


@pytest.mark.parametrize("text", ["2", "", "-1", "1-0", "0-2", "food", "1,"])
def test_no_classes(text: str) -> None:
    with pytest.raises(ValueError, match=r"--classes: expected 0 to 1, 'none' or one of Food & D"):
        parse_classes(text, 2, NAMES)


def test_a_network_without_classes() -> None:
    with pytest.raises(ValueError, match="no classes"):
        parse_classes("0", 0, ())


@pytest.mark.parametrize("size", [32, 64])
def test_names_are_those_of_the_pictures(size: int) -> None:
    with ZipFile(DATA / f"emoji{size}.zip") as archive:
        names = json.loads(archive.read("dataset.json"))["classes"]
    assert CLASS_NAMES[f"diffit_emoji_{size}"] == tuple(names)
