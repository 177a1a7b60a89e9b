"""``diffit sample``: pictures from seeds, on one process or under torchrun, interrupted or not."""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import TYPE_CHECKING

from diffit.cli.seeds import CLASS_NAMES, parse_classes, parse_seeds

if TYPE_CHECKING:
    from diffit.cli.gallery import Gallery, Note
    from diffit.cli.pictures import Painter
    from diffit.cli.ranks import Ranks

HELP = "sample pictures: a grid, single PNGs, or an npz for evaluators"
SAMPLERS = ("edm", "ddpm", "ddim", "dpm++")
DTYPES = ("float32", "bfloat16", "float16")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--preset", metavar="NAME", help="network and settings; `diffit models` lists them")
    add(
        "--weights",
        metavar="SOURCE",
        help="a safetensors file, its folder, or a repository on the Hugging Face hub; default: "
        "those that come with the preset, else random ones",
    )
    add("--seeds", type=parse_seeds, default=[0], help="one picture each: 0-63 or 0,5,7-9")
    add(
        "--classes",
        help="ids, names, ranges, or none, separated by commas; seed s gets number s modulo their "
        "count; default: drawn from the seed",
    )
    add("--out", required=True, help="a grid (.png), arrays (.npz), or a folder for single PNGs")
    add("--sampler", choices=SAMPLERS, help="default: the preset's")
    add("--steps", type=_positive, metavar="N", help="of the sampler; default: the preset's")
    add(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="weight of classifier-free guidance, on the preset's schedule; 1: none; default: the "
        "preset's",
    )
    add("--vae", metavar="SOURCE", help="decoder of latent networks: a folder or a repository")
    add("--dtype", choices=DTYPES, help="of the network; default: that of its weights")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--batch-size", type=_positive, metavar="N", help="default: what fits into free memory")
    add("--compile", action="store_true", help="torch.compile the network")


def run(arguments: argparse.Namespace) -> None:
    """Sample the pictures that are not there yet, and write the output.

    Raises:
        ValueError, TypeError, OSError, ImportError, RuntimeError: wrong input.
    """
    from diffit.cli.gallery import Gallery
    from diffit.cli.networks import find_network
    from diffit.cli.pictures import Painter
    from diffit.cli.ranks import ranks

    gallery = Gallery(arguments.out)
    with ranks() as peers:
        found = find_network(arguments.preset, arguments.weights)
        painter = Painter(found, arguments)
        names = CLASS_NAMES.get(found.preset, ())
        ...
