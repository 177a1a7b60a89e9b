"""``python -m diffit_kernels.tune``: the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NoReturn

import torch

from diffit_kernels import triton
from diffit_kernels.triton.configs import FOLDER, Table, read, write
from diffit_kernels.tune.layers import KERNELS

WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(WRONG_INPUT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; the exit code: 0, 2 for wrong input or without a GPU, 130 after Ctrl-C.

    Raises:
        SystemExit: arguments that do not parse (code 2), or ``--help`` (code 0).
    """
    parser = Parser(
        prog="python -m diffit_kernels.tune",
        description="Measure parameters of the Triton kernels; the fastest go into a table.",
    )
    known = [name for names in KERNELS.values() for name in names]
    parser.add_argument("--out", type=Path, help="the table; default: the package's, of the device")
    parser.add_argument("--minutes", type=float, default=inf, help="after which to end")
    parser.add_argument("--kernels", nargs="+", choices=known, metavar="KERNEL", default=known)
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"argument --minutes: expected more than 0, got {args.minutes:g}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA or ROCm device to measure on")
    if reason := triton.unavailable():
        parser.error(reason)
    if triton._interpreted:
        parser.error("TRITON_INTERPRET is set: the time of the interpreter says nothing")
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = args.out or FOLDER / f"{slug}.json"
    try:
        table = read(path) if path.exists() else Table(devices=[name])
        write(path, table)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    return tune(path, table, args.kernels, 60 * args.minutes)


def tune(path: Path, table: Table, kernels: Sequence[str], seconds: float) -> int:
    """The exit code; the table is written after every entry."""
    # Both need Triton, and a GPU.
    from diffit_kernels.tune.gpu import GPU
    from diffit_kernels.tune.search import Budget, Search

    search = Search(GPU(), path, table, kernels, Budget(seconds))
    try:
        complete = search.run()
    except KeyboardInterrupt:
        print(f"interrupted; {len(table.entries)} entries are in {path}", file=sys.stderr)
        return INTERRUPTED
    missing = "" if complete else "; there was no time for the rest"
    print(f"{len(table.entries)} entries are in {path}{missing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
