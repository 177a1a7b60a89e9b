"""``diffit data``: pack pictures into the file that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffit.cli.arguments import positive_int, require_out

HELP = "pack pictures into the zip that training reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "source",
        type=Path,
        help="a folder or zip of pictures, an npz (arr_0, arr_1), or CIFAR-10's python archive",
    )
    parser.add_argument("--out", type=Path, required=True, help="the zip to write")
    parser.add_argument(
        "--size",
        type=positive_int,
        help="cut to the central square and scale down to this many pixels; smaller pictures are "
        "left out (default: pictures have to be squares of one size)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the zip and print what was left out.

    Raises:
        ValueError, OSError: wrong input.
    """
    from diffit.data.pack import pack

    require_out("--out", arguments.out, ".zip", arguments.source)
    print(pack(arguments.source, arguments.out, size=arguments.size))
