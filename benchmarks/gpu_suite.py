"""Everything that a GPU has to show, in one command and within a few minutes.

The parts, in the order of their value:

  build      compile the CUDA C++ kernels in place, for this device, if they are not there
  ceilings   matmul in bf16, TF32, fp32 and fp16, and a copy
  rule       the numeric rule: every operator, backend, dtype and gradient against float64
  operators  window attention at the shapes of the networks, against every peer
  blocks     the transformer block likewise
  tests      the repository's tests of the GPU kernels
  sanitizer  compute-sanitizer over the CUDA C++ kernels, where it is found
  tune       a sweep for the table of this device

Each runs in a process of its own for its share of the time; what it leaves goes to the next. A part
that fails, hangs or dies is recorded and the rest still runs. After each part OUT/gpu_suite.json is
written again with everything so far; beside it come ceilings.csv, rule.csv, operators.csv,
operators.png, blocks.csv, blocks.png and table.json.

Exit code: 0; 1 if a part failed; 2 for wrong input or without a CUDA device; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from diffit.cli.arguments import Parser, positive_number
from gpu import BENCHMARKS, ROOT, report, schedule
from gpu.job import write_json
from gpu.precision import PRECISIONS
from gpu.schedule import OK, Part

# Of the time; about the seconds that a part can use on a machine with 16 cores.
WEIGHTS = {
    "build": 90,
    "ceilings": 20,
    "rule": 70,
    "operators": 110,
    "blocks": 110,
    "tests": 90,
    "sanitizer": 45,
    "tune": 40,
}
MINUTES = 8.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run, checked."""
    parser = Parser(
        prog="gpu_suite.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder, such as benchmarks/results/h100")
    add(
        "--minutes",
        type=positive_number,
        default=MINUTES,
        help=f"for everything (default: {MINUTES:g})",
    )
    add("--parts", nargs="+", choices=WEIGHTS, metavar="PART", help="default: all")
    add(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        metavar="PRECISION",
        help=f"of rule, operators and blocks, of {', '.join(PRECISIONS)} (default: all)",
    )
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; expected a machine with one")
    args.parts = [name for name in WEIGHTS if name in (args.parts or WEIGHTS)]
    args.precisions = [name for name in PRECISIONS if name in (args.precisions or PRECISIONS)]
    try:
        args.out = args.out.absolute()
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def plan(
    names: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    out: Path,
    ceilings: Path,
) -> list[Part]:
    """The parts as commands; ``ceilings`` is a file that is there once they are measured."""

    def part(name: str) -> Part:
        def command(until: float, result: Path) -> list[str]:
            arguments = [name, "--device", str(device), "--until", str(until), "--out", str(result)]
            if ceilings.exists():
                arguments += ["--ceilings", str(ceilings)]
            arguments += ["--table", str(out / "table.json"), "--precisions", *precisions]
            return [sys.executable, "-m", "gpu", *arguments]

        return Part(name, WEIGHTS[name], command)

    return [part(name) for name in names]


def run(
    parts: Sequence[Part], out: Path, minutes: float, device: torch.device, ceilings: Path
) -> int:
    """Run the parts, write and print what they found; the exit code."""
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    description = report.describe(device)
    settings = {
        "command": " ".join(["python benchmarks/gpu_suite.py", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "device": description,
    }
    print("{device}, torch {torch}".format(**description) + f", {minutes:g} minutes")
    outcomes: list[schedule.Outcome] = []
    report.write(out, settings, outcomes)
    for outcome in schedule.run(parts, 60 * minutes, environment, ROOT):
        outcomes.append(outcome)
        if outcome.name == "ceilings" and outcome.status == OK:
            write_json(ceilings, outcome.result)
        report.write(out, settings, outcomes)
        print(report.part_line(outcome), flush=True)
    print("\n".join(report.tables(outcomes)))
    print(f"\neverything is in {out}")
    return int(any(outcome.status != OK for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = torch.device("cuda")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ceilings = Path(scratch, "ceilings.json")
            parts = plan(args.parts, args.precisions, device, args.out, ceilings)
            return run(parts, args.out, args.minutes, device, ceilings)
    except KeyboardInterrupt:
        print(f"\ngpu_suite.py: interrupted; what ended is in {args.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
