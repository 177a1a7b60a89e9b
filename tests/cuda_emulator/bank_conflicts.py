"""Prints wavefronts of shared memory for the layers of the networks, as a table of Markdown.

    python -m tests.cuda_emulator.bank_conflicts

Counted by the emulator on one window or a few: made / needed, forward and backward.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.cuda_emulator import build

# Window, head width, and windows across.
LAYERS = [(4, 32, 4), (8, 32, 2), (16, 72, 1), (32, 72, 1)]


def _main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, flags = Path(name), build.OPTIMIZED
        parts = [*build.objects(folder, flags), *build.launcher(folder, flags)]
        program = build.link(
            folder / "attention", [build.EMULATOR / "attention.cpp", *parts], flags
        )
        print("| window, head width | pass | ldmatrix | load | store | copy |")
        print("|---|---|---|---|---|---|")
        for window, width, across in LAYERS:
            shape = (window, window, window, window * across, 1, 1, width)
            text = subprocess.run(
                [program, *map(str, shape)], capture_output=True, check=True, text=True
            ).stdout
            counts = [line.split() for line in text.splitlines()]
            for direction in ("forward", "backward"):
                ratios = [
                    f"{int(made) / int(needed):.2f}"
                    for name, _, needed, made in counts
                    if name == direction
                ]
                print(f"| {window}, {width} | {direction} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    _main()
