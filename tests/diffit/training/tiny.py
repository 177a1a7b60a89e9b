"""Tiny presets, pictures and latents for them, and the command line that knows these presets.

``python -m tests.diffit.training.tiny train ...`` is ``diffit train ...`` with them.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from diffit.cli import main
from diffit.data.dataset import Dataset, ImageDataset
from diffit.data.latents import LatentDataset
from diffit.models import PRESETS, ImageDiffiT, LatentDiffiT, Preset
from diffit.models.presets import DDPM_256, EDM_18
from diffit.ranks import Ranks
from diffit.training import Running, Trainer, get_recipe

IMAGE, LATENT = "tiny_emoji", "tiny_256"  # their recipes are those of the words in them
CLASSES = 3
ROOT = Path(__file__).parents[3]

TINY = {
    IMAGE: Preset(
        ImageDiffiT,
        replace(EDM_18, steps=2),
        0.0,
        0.0001,
        None,
        {
            "img_resolution": 8,
            "label_dim": CLASSES,
            "augment_dim": 9,
            "channels": (16,),
            "depths": (1,),
            "head_dim": 8,
            "window_size": 4,
            "temb_dim": 16,
            "label_dropout": 0.1,
        },
    ),
    LATENT: Preset(
        LatentDiffiT,
        DDPM_256,
        0.0,
        0.0001,
        None,
        {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": CLASSES},
    ),
}


def pictures(path: Path, count: int = 11, size: int = 8) -> Path:
    """A zip of grainy pictures of one colour each, in classes 0, 1, 2, 0 and so on."""
    random = np.random.default_rng(0)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            name = f"00000/img{i:08d}.png"
            with archive.open(name, "w") as file:
                pixels = random.integers(0, 200, 3) + random.integers(0, 50, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
            labels.append([name, i % CLASSES])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def latents(folder: Path, count: int = 11) -> Path:
    """Two shards of random latents, the one with the last index first."""
    folder.mkdir()
    values = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for shard, index in enumerate((torch.arange(5, count), torch.arange(5))):
        tensors = {"index": index, "latents": values[index], "labels": index % CLASSES}
        save_file(tensors, folder / f"{shard}.safetensors")
    return folder


def trainer(data: Path, out: Path, **changes: Any) -> Trainer:
    """A run of 6 steps of 8 images, a checkpoint after every second; changes go where they fit."""
    preset = LATENT if data.is_dir() else IMAGE
    dataset: Dataset
    if preset == LATENT:
        dataset = LatentDataset(data, shape=(4, 4, 4), num_classes=CLASSES)
    else:
        dataset = ImageDataset(data, resolution=8, num_classes=CLASSES)
    sizes = {"batch_size": 8, "steps": 6, "checkpoint_every": 2, "snapshot_every": 100}
    recipe = replace(get_recipe(preset), **sizes)
    of_recipe = {k: v for k, v in changes.items() if hasattr(recipe, k)}
    of_running = {k: v for k, v in changes.items() if not hasattr(recipe, k)}
    return Trainer(
        preset,
        replace(recipe, **of_recipe),
        dataset,
        out,
        seed=0,
        running=Running(torch.device("cpu"), **of_running),
        ranks=Ranks(),
    )


def stats(out: Path) -> list[dict[str, float]]:
    """The lines of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "share_of_ceiling")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def command(data: Path, out: Path, *more: str) -> list[str]:
    """The words after ``diffit`` that train the tiny image network."""
    run = ["train", "--preset", IMAGE, "--batch-size", "8", "--data", str(data), "--out", str(out)]
    return [*run, *more]


def python(words: list[str], processes: int = 1) -> list[str]:
    """The same for a Python of its own, or several by torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "tests.diffit.training.tiny", *words]


def environment() -> dict[str, str]:
    """For these commands."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(words: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    PRESETS.update(TINY)
    return main(words)


if __name__ == "__main__":
    sys.exit(run())
