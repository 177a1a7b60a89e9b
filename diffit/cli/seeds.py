"""Which pictures: seeds and classes as they are written on the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

MOST_SEEDS = 10_000_000
LARGEST_SEED = 2**32 - 1  # of diffit.diffusion.noise, which imports PyTorch
NO_CLASS = "none"

# Of examples/data.
EMOJI = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
CLASS_NAMES = {"diffit_emoji_32": EMOJI, "diffit_emoji_64": EMOJI}


def parse_seeds(text: str) -> list[int]:
    """``"0-3,7"`` -> [0, 1, 2, 3, 7]; a seed counts once.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        if not match:
            raise argparse.ArgumentTypeError(
                f"expected numbers and ranges such as 0-63 or 0,5,7-9, got {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise argparse.ArgumentTypeError(f"the range {part!r} ends before it begins")
        if last > LARGEST_SEED:
            raise argparse.ArgumentTypeError(f"expected at most {LARGEST_SEED}, got {last}")
        if last - first >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"expected at most {MOST_SEEDS} seeds, got {part!r}")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def format_seeds(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 3, 7] -> "0-3,7"; the order stays."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)


def parse_classes(text: str, num_classes: int, names: Sequence[str]) -> list[int]:
    """``"3,Flags,none"`` -> [3, 8, num_classes].

    Args:
        text: class ids, ranges of them, names (in any case), and "none".
        num_classes: of the network; also the id of no class.
        names: of the classes, or nothing.

    Raises:
        ValueError: there is no such class.
    """
    if num_classes == 0:
        raise ValueError(f"--classes: the network has no classes, got {text!r}")
    ids = {name.lower(): index for index, name in enumerate(names)} | {NO_CLASS: num_classes}
    classes: list[int] = []
    for part in text.split(","):
        name = part.strip()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", name, re.ASCII)
        if name.lower() in ids:
            classes.append(ids[name.lower()])
        elif match and int(match[1]) <= int(match[2] or match[1]) < num_classes:
            classes.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
        else:
            known = f" or one of {', '.join(names)}" if names else ""
            raise ValueError(
                f"--classes: expected 0 to {num_classes - 1}, {NO_CLASS!r}{known}, got {name!r}"
            )
    return classes
