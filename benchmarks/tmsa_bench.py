"""Benchmark of time-dependent attention and its transformer block at the shapes of the networks.

Every result is verified against the float64 reference before it is timed. All contestants are
timed in turn, round after round. Without arguments: every shape, on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

import ceilings
import device as machine
import plot
import results
import table
from contest import CompileBudget, Pace, hold
from diffit.cli.arguments import Parser, finite_number, positive_int
from diffit_kernels import available_backends
from diffit_kernels.dispatch import select
from diffit_kernels.products import are_slow
from harness import Progress
from inputs import PICTURES
from operations import DIRECTIONS, OPERATIONS, build
from results import FAILED, OURS, Contest, Row
from shapes import QUICK, SHAPES

RESULTS = Path(__file__).parent / "results"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
FULL_PACE = Pace(seconds=1.5, min_rounds=11, max_rounds=50)
QUICK_PACE = Pace(seconds=0.3, min_rounds=3, max_rounds=20)
COMPILE_SECONDS = 180


def default_dtypes(device: torch.device) -> list[str]:
    """Those of which the device has products; without them a peer takes minutes for one call."""
    known = DTYPES[device.type]
    return [name for name in known if not are_slow(getattr(torch, name), device.type)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, checked."""
    parser = Parser(prog="tmsa_bench.py", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="three shapes, few rounds, no compiled peers")
    add("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    add("--dtypes", nargs="+", choices=DTYPES["cuda"], help="default: those the device has")
    add("--ops", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="default: all")
    add("--passes", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=positive_int, help="of PyTorch on the processor; default: PyTorch's")
    add(
        "--compile-seconds",
        type=finite_number,
        default=COMPILE_SECONDS,
        help="compile peers in this time, the largest layers first; peers that would come later "
        f"are reported as not run (default: {COMPILE_SECONDS})",
    )
    add(
        "--out",
        type=Path,
        help="folder for results.json, results.csv and results.png (default: "
        "benchmarks/results/DEVICE, or benchmarks/results/quick for a run of less than everything)",
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA device; expected cpu")
    if not PICTURES.is_file():
        parser.error(f"no pictures to compute on: {PICTURES} is missing")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for name in ("shapes", "dtypes", "ops", "passes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or ())))
    everything = not (args.quick or args.shapes or args.dtypes)
    everything = everything and (len(args.ops), len(args.passes)) == (2, 2)
    known = QUICK if args.quick and not args.shapes else SHAPES
    args.shapes = [known[name] for name in args.shapes or known]
    args.dtypes = args.dtypes or default_dtypes(args.device)
    try:
        # Where DIFFIT_BACKEND names no backend that runs here, this is where it is seen.
        backend = select(args.shapes[0].problem(torch.float32, args.device))
        args.backend = backend.__name__.rpartition(".")[2]
        args.out = args.out or RESULTS / (machine.slug(args.device) if everything else "quick")
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; the exit code."""
    device, dtypes = args.device, [getattr(torch, name) for name in args.dtypes]
    description = machine.describe(device) | {"ours": args.backend}
    print("{device} ({instruction_set}), {threads} threads, torch {torch}".format(**description))
    if args.backend == "reference":
        fused = "triton" if device.type == "cuda" else "cpu"
        reason = available_backends()[fused] or "DIFFIT_BACKEND chose it"
        print(f"OURS IS THE REFERENCE BACKEND, NOT THE FUSED KERNELS: {reason}")

    limits = ceilings.measure(device, dtypes)
    matmul = ", ".join(f"{name} {gflops:.0f}" for name, gflops in limits.matmul_gflops.items())
    print(f"ceilings: matmul {matmul} GFLOP/s; copy {limits.copy_gbps:.1f} GB/s\n")
    print(table.header())
    rows = measure(args, limits, dtypes)

    print()
    for summary in results.summarise(rows):
        print(table.summary_line(summary))
    for exception in results.exceptions(rows):
        print(exception)
    if not all(contest.complete for contest in results.contests(rows)):
        print("* best of the peers that ran")
    settings = {
        "command": " ".join(["python benchmarks/tmsa_bench.py", *sys.argv[1:]]),
        "device": description,
        "ceilings": asdict(limits),
    }
    results.write(args.out, settings, rows)
    print(f"\nresults.json and results.csv are in {args.out}")
    print(plot.save(args.out))
    return int(any(row.status == FAILED and row.contestant == OURS for row in rows))


def measure(
    args: argparse.Namespace, limits: ceilings.Ceilings, dtypes: list[torch.dtype]
) -> list[Row]:
    """Hold every contest and print its line when it is over."""
    if args.quick:
        pace, budget = QUICK_PACE, CompileBudget(0, "needs the compiler, which --quick leaves out")
    else:
        reason = "came after --compile-seconds were used up"
        pace, budget = FULL_PACE, CompileBudget(args.compile_seconds, reason)
    combinations = list(product(args.shapes, dtypes, args.ops))
    progress = Progress(len(combinations) * len(args.passes))
    rows = []
    for shape, dtype, operation in combinations:
        dtype_name = str(dtype).removeprefix("torch.")
        label = f"{shape.name} {dtype_name} {operation}"
        progress.show(f"{label}: truth in float64")
        torch.compiler.reset()
        gc.collect()
        problem = shape.problem(dtype, args.device)
        case = build(operation, shape, dtype, args.device)
        template = Row(
            **results.layer_columns(shape.name, problem),
            dtype=dtype_name,
            operation=operation,
            direction="",
            contestant="",
            status="",
        )
        for direction in args.passes:
            progress.show(f"{label} {direction}")
            matmul = limits.matmul_gflops[dtype_name]
            contest = hold(case, direction, template, args.device, pace, budget, matmul)
            progress.step()
            progress.clear()
            print(table.line(Contest(tuple(contest))), flush=True)
            rows += contest
    progress.clear()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if ours was wrong anywhere, 2 for wrong input, 130 for Ctrl-C."""
    try:
        return run(parse(arguments))
    except KeyboardInterrupt:
        print("\ntmsa_bench.py: interrupted, nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
