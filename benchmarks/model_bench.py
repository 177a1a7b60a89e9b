"""Benchmark of whole networks: an evaluation, a training step, and loops of the sampler.

Every network is verified against itself in float64 before it is timed. All contestants are timed
in turn, round after round. Without arguments: the networks of the paper, on a GPU if there is one,
for as long as --minutes say.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import ceilings
import device as machine
import network_table as table
import plot
import results
from contest import CompileBudget, Pace, hold
from diffit.cli.arguments import Parser, finite_number, positive_int, positive_number
from diffit.models import DiffusionNetwork, ImageDiffiT, LatentDiffiT
from diffit.models.presets import MAIN
from diffit_kernels import available_backends
from diffit_kernels.dispatch import select
from harness import Progress
from network_table import NetworkRow
from networks import PASSES, Task, build, guidance, memory_estimate
from peers.networks import blocks
from results import FAILED, OURS, SKIPPED, Contest, Row, layer_columns
from shapes import CUDA_BATCHES
from table import summary_line
from tmsa_bench import DTYPES, RESULTS, default_dtypes

NAME = "models"
QUICK = ("diffit_emoji_32", "diffit_s_2_256")
HEADLINE = "diffit_xl_2_256"  # its evaluations come first; after them the smallest networks
FULL_PACE = Pace(seconds=2.0, min_rounds=2, max_rounds=20, warm_up=False)
QUICK_PACE = Pace(seconds=0.3, min_rounds=2, max_rounds=5, warm_up=False)
MINUTES, QUICK_MINUTES = 15.0, 0.7
COMPILE_SECONDS = 180.0
LOOP_SECONDS, FEW_STEPS = 5.0, 4  # a loop that would last longer takes few steps
IMAGE_BATCH = 4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, checked."""
    parser = Parser(prog="model_bench.py", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="two small networks, within a minute")
    add("--presets", nargs="+", choices=MAIN, metavar="NAME", help=f"of {', '.join(MAIN)}")
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES["cpu"], help="default: those the device has")
    add(
        "--batch",
        type=positive_int,
        help=f"default: 1 latent or {IMAGE_BATCH} pictures, on a GPU 8 x that",
    )
    add("--sampling-steps", type=positive_int, help=f"default: the preset's own, or {FEW_STEPS}")
    add(
        "--minutes",
        type=positive_number,
        help=f"leave out what would last longer (default: {MINUTES:g})",
    )
    add(
        "--compile-seconds",
        type=finite_number,
        help=f"for peers that need the compiler (default: {COMPILE_SECONDS:g}, with --quick 0)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=positive_int, help="of PyTorch on the processor; default: PyTorch's")
    add(
        "--out",
        type=Path,
        help=f"folder for {NAME}.json, {NAME}.csv and {NAME}.png (default: "
        "benchmarks/results/DEVICE, or benchmarks/results/quick for a run of less than everything)",
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA device; expected cpu")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chosen = args.quick, args.presets, args.dtypes, args.batch, args.sampling_steps
    everything = not any(chosen) and set(args.passes) == {*PASSES}
    smallest = sorted(MAIN, key=lambda name: MAIN[name].gflops)
    args.presets = list(dict.fromkeys(args.presets or (QUICK if args.quick else smallest)))
    args.dtypes = list(dict.fromkeys(args.dtypes or default_dtypes(args.device)[:2]))
    args.passes = [name for name in PASSES if name in args.passes]
    if args.quick:
        args.batch = args.batch or 1
        args.sampling_steps = args.sampling_steps or FEW_STEPS
    if args.minutes is None:
        args.minutes = QUICK_MINUTES if args.quick else MINUTES
    if args.compile_seconds is None:
        args.compile_seconds = 0.0 if args.quick else COMPILE_SECONDS
    try:
        # Where DIFFIT_BACKEND names no backend that runs here, this is where it is seen.
        with torch.device("meta"):
            network = MAIN[args.presets[0]].network(**MAIN[args.presets[0]].options)
        _, _, problem = next(blocks(network))
        backend = select(replace(problem, device_type=args.device.type))
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
    device = args.device
    description = machine.describe(device) | {"ours": args.backend}
    print("{device} ({instruction_set}), {threads} threads, torch {torch}".format(**description))
    if args.backend == "reference":
        fused = "triton" if device.type == "cuda" else "cpu"
        reason = available_backends()[fused] or "DIFFIT_BACKEND chose it"
        print(f"OURS IS THE REFERENCE BACKEND, NOT THE FUSED KERNELS: {reason}")
    dtypes = [getattr(torch, name) for name in [*args.dtypes, "float64"]]
    matmul = ceilings.linear_layer(device, dtypes)
    speeds = ", ".join(f"{name} {gflops:.3g}" for name, gflops in matmul.items())
    print(f"a linear layer: {speeds} GFLOP/s\n")
    print(table.header())
    rows = measure(args, matmul)

    print()
    for summary in results.summarise(rows):
        print(summary_line(summary))
    for row in rows:
        if row.contestant == OURS and row.derived_images_per_second is not None:
            print(table.derived_line(row))
    for exception in results.exceptions(rows):
        print(exception)
    if not all(contest.complete for contest in results.contests(rows)):
        print("* best of the peers that ran")
    if find_spec("diffusers") is None:
        print('no DiT: diffusers is not installed (pip install -e ".[latent]")')
    else:
        print("DiT: diffusers' network of the same width and depth, another network: for its cost")
    settings = {
        "command": " ".join(["python benchmarks/model_bench.py", *sys.argv[1:]]),
        "device": description,
        "ceilings": {"matmul_gflops": matmul},
    }
    results.write(args.out, settings, rows, NAME)
    print(f"\n{NAME}.json and {NAME}.csv are in {args.out}")
    print(plot.save(args.out, NAME, NetworkRow))
    return int(any(row.status == FAILED and row.contestant == OURS for row in rows))


def tasks(args: argparse.Namespace, matmul: dict[str, float]) -> list[tuple[str, str, Task]]:
    """Preset, dtype and task of every contest, in the order in which they are held."""
    found = []
    for name in args.presets:
        preset = MAIN[name]
        batch = args.batch or (
            (IMAGE_BATCH if issubclass(preset.network, ImageDiffiT) else 1)
            * (CUDA_BATCHES if args.device.type == "cuda" else 1)
        )
        for dtype in args.dtypes:
            for direction in args.passes:
                task = Task(preset, direction, batch)
                if direction == "sampling":
                    task = replace(task, steps=args.sampling_steps or preset.sampling.steps)
                    too_long = task.gflop / matmul[dtype] > LOOP_SECONDS
                    if too_long and args.sampling_steps is None:
                        task = replace(task, steps=FEW_STEPS)
                found.append((name, dtype, task))
                if direction == "forward" and guidance(preset) is not None:
                    found.append((name, dtype, replace(task, guided=True)))
    return sorted(found, key=lambda entry: (entry[0], entry[2].direction) != (HEADLINE, "forward"))


def obstacle(
    task: Task,
    dtype: str,
    speeds: dict[str, float],
    device: torch.device,
    seconds_left: float,
    compiling: bool,
) -> str:
    """Why a contest cannot be held here or in the time that is left, or nothing.

    ``speeds`` are GFLOP/s to be expected, by dtype; ``compiling``: compiled peers run, too.
    """
    need, free = memory_estimate(task, getattr(torch, dtype)), _free_memory(device)
    if need > free:
        return f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    contestants = 3 + 2 * compiling + issubclass(task.preset.network, LatentDiffiT)
    # Each is verified, timed, and called for its peak; for the truth, plain PyTorch runs once.
    calls = contestants * (1 + FULL_PACE.min_rounds + (task.direction != "sampling")) + 1
    seconds = task.gflop * (calls / speeds[dtype] + 1 / speeds["float64"])
    if seconds > seconds_left:
        return f"would last about {seconds:.0f} s, longer than was left of --minutes"
    return ""


def measure(args: argparse.Namespace, matmul: dict[str, float]) -> list[NetworkRow]:
    """Hold every contest and print its line when it is over."""
    deadline = time.perf_counter() + 60 * args.minutes
    budget = CompileBudget(args.compile_seconds, "came after --compile-seconds were used up")
    speeds = dict(matmul)  # until a network of that dtype was timed
    pace = QUICK_PACE if args.quick else FULL_PACE
    entries = tasks(args, matmul)
    progress = Progress(len(entries))
    rows: list[NetworkRow] = []
    for name, dtype, task in entries:
        progress.show(f"{name} {dtype} {task.operation} {task.direction}: truth in float64")
        template = describe(name, dtype, task)
        left = deadline - time.perf_counter()
        compiling = budget.seconds > 0
        if reason := obstacle(task, dtype, speeds, args.device, left, compiling):
            contest: list[Row] = [replace(template, status=SKIPPED, reason=reason)]
        else:
            torch.compiler.reset()
            gc.collect()
            case = build(task, getattr(torch, dtype), args.device)
            progress.show(f"{name} {dtype} {task.operation} {task.direction}")
            contest = hold(case, task.direction, template, args.device, pace, budget, matmul[dtype])
            del case
            if rates := [row.gflops for row in contest if row.gflops is not None]:
                speeds[dtype] = statistics.harmonic_mean(rates)
        rated = [table.with_rates(row, task) for row in contest]
        progress.step()
        progress.clear()
        print(table.line(Contest(tuple(rated))), flush=True)
        rows += rated
    progress.clear()
    return rows


def describe(name: str, dtype: str, task: Task) -> NetworkRow:
    """What all rows of a contest have in common; widths are those of the first block."""
    with torch.device("meta"):
        network: DiffusionNetwork = task.preset.network(**task.preset.options)
    _, _, problem = next(blocks(network))
    return NetworkRow(
        **layer_columns(name, replace(problem, batch=task.batch * (2 if task.guided else 1))),
        dtype=dtype,
        operation=task.operation,
        direction=task.direction,
        contestant=OURS,
        status="",
        parameters_m=task.preset.parameters,
    )


def _free_memory(device: torch.device) -> float:
    """Bytes; unlimited where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    lines = meminfo.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if ours was wrong anywhere, 2 for wrong input, 130 for Ctrl-C."""
    try:
        return run(parse(arguments))
    except KeyboardInterrupt:
        print("\nmodel_bench.py: interrupted, nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
