"""``diffit train``: train the network of a preset, on one process or under torchrun."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffit.cli.arguments import named_folder, positive_int, positive_number, require_out_folder

if TYPE_CHECKING:
    from diffit.data.dataset import Dataset
    from diffit.models import DiffusionNetwork, Sampling

HELP = "train the network of a preset; the same command again goes on with it"
DTYPES = ("float32", "bfloat16")
GRID = 6  # rows and columns of the pictures of a snapshot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--preset", required=True, metavar="NAME", help="`diffit models` lists them")
    add(
        "--data",
        type=Path,
        required=True,
        help="pictures as `diffit data` packs them; a folder of latents for latent networks",
    )
    add("--out", type=named_folder, required=True, help="folder of the run")
    add(
        "--init",
        metavar="WEIGHTS",
        help="begin with these: a file, a folder or the id of a repository on the hub",
    )
    add(
        "--steps",
        type=positive_int,
        metavar="N",
        help="default: the recipe's, as for all below",
    )
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="images of a step, over all processes",
    )
    add("--lr", type=positive_number, help="learning rate")
    add("--lr-ramp", type=positive_int, metavar="N", help="images over which it rises from 0")
    add("--checkpoint-every", type=positive_int, metavar="N", help="steps between checkpoints")
    add(
        "--snapshot-every",
        type=positive_int,
        metavar="N",
        help="steps between snapshots: averaged weights and, of image networks, a grid of samples",
    )
    add(
        "--keep",
        type=positive_int,
        default=2,
        metavar="K",
        help="newest checkpoints that stay (2)",
    )
    add("--seed", type=int, default=0, help="of everything (0)")
    add("--micro-batch", type=positive_int, metavar="N", help="images at once; default: all")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the products (float32)")
    add("--tf32", action="store_true", help="let GPUs round float32 products")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="replicas or shards (ddp)")
    add("--grad-checkpointing", action="store_true", help="less memory, a third more work")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--tensorboard", action="store_true", help="write events beside stats.jsonl")
    add("--device", help="default: cuda where there is one, else cpu")


def run(arguments: argparse.Namespace) -> None:
    """Train.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: wrong input.
        KeyboardInterrupt: says what is kept.
    """
    import torch

    from diffit.cli.machine import pick_device
    from diffit.cli.networks import announce_hub
    from diffit.models import get_preset
    from diffit.ranks import ranks
    from diffit.training import Running, Trainer, get_recipe

    require_out_folder("--out", arguments.out)
    overrides = ("steps", "batch_size", "lr", "lr_ramp", "checkpoint_every", "snapshot_every")
    given = {name: getattr(arguments, name) for name in overrides}
    recipe = replace(
        get_recipe(arguments.preset), **{k: v for k, v in given.items() if v is not None}
    )
    sampling = get_preset(arguments.preset).sampling
    device = pick_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dataset, num_classes = _dataset(arguments.preset, arguments.data)
    running = Running(
        device,
        micro_batch=arguments.micro_batch,
        dtype=getattr(torch, arguments.dtype),
        tf32=arguments.tf32,
        parallel=arguments.parallel,
        grad_checkpointing=arguments.grad_checkpointing,
        compile=arguments.compile,
        keep=arguments.keep,
        tensorboard=arguments.tensorboard,
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with ranks(backend) as peers:
        known = 0 if dataset.labels is None else len(dataset.labels.unique())
        if peers.first and 0 < known < num_classes:
            print(
                f"{arguments.data}: has {known} of the {num_classes} classes of "
                f"{arguments.preset}; the others will not be trained"
            )
        announce_hub(arguments.init)
        trainer = Trainer(
            arguments.preset,
            recipe,
            dataset,
            arguments.out,
            seed=arguments.seed,
            running=running,
            ranks=peers,
            init=arguments.init,
            draw=None if sampling.sampler != "edm" else lambda n, path: _draw(n, sampling, path),
        )
        try:
            trainer.train()
        except KeyboardInterrupt:
            kept = " before the first checkpoint; the same command begins anew"
            if trainer.checkpoints.there():
                kept = f"; the same command goes on from the last checkpoint in {arguments.out}"
            raise KeyboardInterrupt(f"interrupted{kept}") from None


def _dataset(preset: str, path: Path) -> tuple[Dataset, int]:
    """What the preset's network learns from, and the number of its classes."""
    import torch

    from diffit.data.dataset import ImageDataset
    from diffit.data.latents import LatentDataset
    from diffit.models import ImageNetwork, LatentDiffiT, create_model

    with torch.device("meta"):
        network = create_model(preset)
    classes = network.num_classes
    if isinstance(network, ImageNetwork):
        return ImageDataset(path, resolution=network.img_resolution, num_classes=classes), classes
    assert isinstance(network, LatentDiffiT)
    shape = (network.in_channels, network.input_size, network.input_size)
    return LatentDataset(path, shape=shape, num_classes=classes), classes


def _draw(network: DiffusionNetwork, sampling: Sampling, path: Path) -> None:
    """A grid of the pictures of the first seeds, one class after the other."""
    from PIL import Image

    from diffit.cli.pictures import Painter
    from diffit.files import replacing

    seeds = list(range(GRID**2))
    classes = [seed % network.num_classes if network.num_classes else None for seed in seeds]
    pixels = Painter(network, sampling).paint(seeds, classes, lambda: None).pixels
    _, height, width, channels = pixels.shape
    rows = pixels.reshape(GRID, GRID, height, width, channels).swapaxes(1, 2)
    with replacing(path) as file:
        Image.fromarray(rows.reshape(GRID * height, GRID * width, channels)).save(file, "png")
