"""One part of the suite: ``python -m gpu PART --device D --until T --out FILE``.

FILE gets the result; the exit code is 1 where it names failures. With ``--serve`` the process
measures tasks that it reads from its input instead, as a worker of its part.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from gpu import workers
from gpu.job import Job
from gpu.precision import PRECISIONS

# By part, its module, which is loaded for it alone, and the function there.
PARTS = {
    "build": ("commands", "build"),
    "ceilings": ("limits", "run"),
    "rule": ("rule", "run"),
    "operators": ("contests", "operators"),
    "blocks": ("contests", "blocks"),
    "tests": ("commands", "run_tests"),
    "sanitizer": ("sanitizer", "run"),
    "tune": ("commands", "tune"),
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--until", type=float, default=time.time() + 60, help="in time.time()")
    parser.add_argument("--out", type=Path, default=Path("result.json"))
    parser.add_argument("--ceilings", type=Path, help="what the part of that name found")
    parser.add_argument("--table", type=Path, default=Path("table.json"), help="of tune")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    if args.part == "rule":  # it asks for deterministic algorithms, and cuBLAS for this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    name, function = PARTS[args.part]
    module = import_module(f"gpu.{name}")
    if args.serve:
        workers.serve(lambda task, say: module.measure(task, args.device, say))
        return 0
    job = Job(args.device, args.until, args.out, args.ceilings, args.table, args.precisions)
    result = getattr(module, function)(job)
    job.save(result)
    for failure in result["failures"]:
        print(failure)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
