"""One part of the suite: ``python -m gpu PART --device D --until T --out FILE``.

FILE gets the result; the exit code is 1 where it names failures. With ``--serve`` the process
measures tasks that it reads from its input instead, as a worker of its part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpu import commands, contests, limits, rule, sanitizer, workers
from gpu.job import Job, Result


def parts(args: argparse.Namespace) -> dict[str, Callable[[Job], Result]]:
    """By name, what runs a part."""
    measured = json.loads(args.ceilings.read_text()) if args.ceilings else None

    def contest(operation: str, job: Job) -> Result:
        return contests.run(operation, job, measured or limits.measure(job.device))

    return {
        "build": commands.build,
        "ceilings": limits.run,
        "rule": rule.run,
        "operators": partial(contest, "attention"),
        "blocks": partial(contest, "block"),
        "tests": commands.run_tests,
        "sanitizer": sanitizer.run,
        "tune": partial(commands.tune, table=args.table),
    }


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--until", type=float, default=time.time() + 60, help="in time.time()")
    parser.add_argument("--out", type=Path, default=Path("result.json"))
    parser.add_argument("--ceilings", type=Path, help="what the part of that name found")
    parser.add_argument("--table", type=Path, default=Path("table.json"), help="of tune")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    if args.part == "rule":  # it asks for deterministic algorithms, and cuBLAS for this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.serve:
        measure = {"rule": lambda task, say: rule.measure(task, args.device)}.get(
            args.part, lambda task, say: contests.measure(task, args.device, say)
        )
        workers.serve(measure)
        return 0
    job = Job(args.device, args.until, args.out)
    result = parts(args)[args.part](job)
    job.save(result)
    for failure in result["failures"]:
        print(failure)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
