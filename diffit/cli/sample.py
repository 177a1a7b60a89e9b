"""``diffit sample``: pictures from seeds, on one process or under torchrun, interrupted or not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from diffit.cli.arguments import finite_number, positive_int, sampler_steps
from diffit.cli.seeds import CLASS_NAMES, parse_classes, parse_seeds

if TYPE_CHECKING:
    from diffit.cli.gallery import Gallery, Note
    from diffit.cli.networks import Found
    from diffit.cli.pictures import Batch, Painter
    from diffit.models import Sampling
    from diffit.ranks import Ranks

HELP = "sample pictures: a grid, single PNGs, or an npz for evaluators"
SEEDS = "0"
STEPS = {"edm": 18, "ddpm": 250, "ddim": 50, "dpm++": 25}  # where they are not the preset's
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--out", required=True, help="a grid (.png), arrays (.npz), or a folder for single PNGs"
    )
    add_sampling_arguments(parser, seeds=SEEDS)


def add_sampling_arguments(parser: argparse.ArgumentParser, seeds: str) -> None:
    """Declare those that a picture depends on, and how it is computed.

    Args:
        seeds: the default, for the help; without the option ``seeds`` is None.
    """
    add = parser.add_argument
    add("--preset", metavar="NAME", help="network and settings; `diffit models` lists them")
    add(
        "--weights",
        metavar="SOURCE",
        help="a safetensors file, its folder, or a repository on the Hugging Face hub; default: "
        "those that come with the preset, else random ones",
    )
    add(
        "--seeds",
        type=parse_seeds,
        help=f"one picture each, as 0-63 or 0,5,7-9; default: {seeds}",
    )
    add(
        "--classes",
        help="ids, ranges of ids, names or none, separated by commas; of n of them seed s gets "
        "number s modulo n; default: each seed draws its own",
    )
    add("--sampler", choices=tuple(STEPS), help="default: the preset's")
    add("--steps", type=sampler_steps, metavar="N", help="of the sampler; default: the preset's")
    add(
        "--guidance",
        type=finite_number,
        metavar="SCALE",
        help="weight of classifier-free guidance, on the preset's schedule; 1: none; default: the "
        "preset's",
    )
    add(
        "--guidance-interval",
        type=finite_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide with that weight between these noise levels (edm) or time steps only",
    )
    add("--vae", metavar="SOURCE", help="decoder of latent networks: a folder or a repository")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the network; default: float32 for image networks, else that of its weights",
    )
    add("--device", help="default: cuda where there is one, else cpu")
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="default: what fits into free memory",
    )
    add("--compile", action="store_true", help="torch.compile the network")


def run(arguments: argparse.Namespace) -> None:
    """Sample the pictures that are not there yet, then write the output.

    Raises:
        ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError: wrong input.
        KeyboardInterrupt: says what is kept.
    """
    from diffit.cli.gallery import Gallery
    from diffit.ranks import ranks

    arguments.seeds = arguments.seeds or parse_seeds(SEEDS)
    gallery = Gallery(arguments.out)
    with ranks() as peers:
        plan = make_plan(arguments, peers)
        notes = plan.notes
        with gallery.opened():
            missing = peers.from_first(gallery.missing(notes) if peers.first else None)
            if peers.first and len(missing) < len(notes):
                print(f"{len(notes) - len(missing)} of {len(notes)} pictures are there already")
            start = perf_counter()
            mine = missing[peers.rank :: peers.size]
            costs = peers.all(_paint(plan, gallery, mine, show=peers.first))
            seconds = perf_counter() - start
            if peers.first:
                gallery.finish(notes)
                speed = f", {len(missing) / seconds:.2f} a second" if missing else ""
                print(f"{gallery.path}: {len(notes)} pictures{speed}")
                if missing and plan.guided:
                    evaluated, saved = (sum(counts) for counts in zip(*costs, strict=True))
                    print(
                        f"guidance: {saved} of {evaluated + saved} evaluations were saved, "
                        "where its weight is 1"
                    )


@dataclass(frozen=True)
class Plan:
    """What the arguments ask for.

    Attributes:
        painter: makes the pictures.
        notes: by seed, all that its picture depends on.
        guided: whether classes are weighed.
        batch_size: pictures at a time.
    """

    painter: Painter
    notes: dict[int, Note]
    guided: bool
    batch_size: int

    def painted(self, seeds: Sequence[int], *, show: bool) -> Iterator[tuple[list[int], Batch]]:
        """The pictures of these seeds, batch by batch, behind a progress bar."""
        from diffit.cli.machine import explained

        with progress_bar(len(seeds), show=show) as bar:
            for done in range(0, len(seeds), self.batch_size):
                batch = list(seeds[done : done + self.batch_size])
                classes = [self.notes[seed]["class"] for seed in batch]
                share = len(batch) / self.painter.evaluations
                with explained(len(batch)):
                    painted = self.painter.paint(batch, classes, partial(bar.update, share))
                yield batch, painted
                bar.update(done + len(batch) - bar.n)  # shares do not add up exactly


def make_plan(arguments: argparse.Namespace, peers: Ranks) -> Plan:
    """The network, its settings and its pictures.

    Raises:
        ValueError, TypeError, OSError, ImportError: wrong input.
    """
    import torch

    from diffit.cli.machine import batch_that_fits, pick_device
    from diffit.cli.networks import RANDOM, find_network
    from diffit.cli.pictures import Painter

    device = pick_device(arguments.device)
    found = find_network(arguments.preset, arguments.weights)
    found.network.to(device, getattr(torch, arguments.dtype) if arguments.dtype else None)
    sampling = _sampling(arguments, found.preset)
    painter = Painter(
        found.network,
        sampling,
        interval=arguments.guidance_interval,
        vae=arguments.vae,
        compiled=arguments.compile,
    )
    notes = _notes(arguments, found, sampling)
    batch_size = arguments.batch_size or batch_that_fits(found.network, peers.size)
    if peers.first and found.weights == RANDOM:
        print(f"no weights for {found.preset}: the network is random, and so are its pictures")
    return Plan(painter, notes, sampling.guidance_scale != 1, batch_size)


def progress_bar(total: int, *, show: bool) -> Any:
    """Of pictures, whole or in part, where there is a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=" pictures",
        bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        disable=None if show else True,  # None: where there is no terminal
    )


def _sampling(arguments: argparse.Namespace, preset: str) -> Sampling:
    """The preset's settings, with those that are given in their place."""
    from diffit.models import get_preset

    known = get_preset(preset).sampling
    sampler = arguments.sampler or known.sampler
    steps = known.steps if sampler == known.sampler else STEPS[sampler]
    scale = known.guidance_scale if arguments.guidance is None else arguments.guidance
    if arguments.guidance_interval:
        low, high = arguments.guidance_interval
        if low > high:
            raise ValueError(
                f"--guidance-interval: expected LOW of at most HIGH, got {low:g} {high:g}"
            )
        if scale == 1:
            raise ValueError("--guidance-interval: expected --guidance SCALE with it")
    return replace(known, sampler=sampler, steps=arguments.steps or steps, guidance_scale=scale)


def _notes(arguments: argparse.Namespace, found: Found, sampling: Sampling) -> dict[int, Note]:
    """By seed, all that its picture depends on."""
    from diffit.cli.pictures import drawn_class

    num_classes = found.network.num_classes
    names = CLASS_NAMES.get(found.preset, ())
    classes: list[int] = []
    if arguments.classes is not None:
        classes = parse_classes(arguments.classes, num_classes, names)
    settings: dict[str, Any] = {
        "preset": found.preset,
        "weights": found.weights,
        "dtype": str(next(found.network.parameters()).dtype).removeprefix("torch."),
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance_scale,
        "interval": arguments.guidance_interval,
        "vae": arguments.vae,
    }
    return {
        seed: settings
        | {"class": classes[seed % len(classes)] if classes else drawn_class(seed, num_classes)}
        for seed in arguments.seeds
    }


def _paint(plan: Plan, gallery: Gallery, seeds: Sequence[int], *, show: bool) -> tuple[int, int]:
    """Sample these pictures; how many evaluations it took, and how many guidance saved."""
    evaluated = saved = 0
    try:
        for batch, painted in plan.painted(seeds, show=show):
            for seed, pixels in zip(batch, painted.pixels, strict=True):
                gallery.add(seed, pixels, plan.notes[seed])
            evaluated, saved = evaluated + painted.evaluated, saved + painted.saved
    except KeyboardInterrupt:
        kept = " before the first batch was done; smaller ones (--batch-size) lose less"
        if gallery.holds_any():
            kept = f"; the same command goes on from what is in {gallery.folder}"
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    return evaluated, saved
