"""Which network: a preset, a file, or both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from diffit.files import sha256_of
from diffit.models import (
    PRESETS,
    DiffusionNetwork,
    ImageNetwork,
    LatentDiffiT,
    Preset,
    create_model,
    get_preset,
    load_model,
)
from diffit.models.weights import find_weights, is_on_hub, require_finite

# The weights that come with the source tree.
SHIPPED = Path(__file__).parents[2] / "examples" / "weights"
# Published files note no preset; they are told apart by the size of the latent.
PUBLISHED_PRESETS = {32: "diffit_xl_2_256", 64: "diffit_xl_2_512"}
RANDOM = "random"
RANDOM_SEED = 0
VAE_SCALE = 8  # pixels along a side of one number of the latent


@dataclass(frozen=True)
class Found:
    """A network with the preset that tells how it is sampled.

    Args:
        network: on the CPU, in evaluation mode.
        preset: name of the preset.
        weights: a digest of the file, or "random".
    """

    network: DiffusionNetwork
    preset: str
    weights: str


def find_network(preset: str | None, weights: str | None) -> Found:
    """The network of these arguments.

    Args:
        preset: its name. Without weights: those that come with the project, or random ones.
        weights: a file, a folder or the id of a repository on the hub. Without a preset: the one
            noted there.

    Raises:
        ValueError, OSError: no such preset or file, files that are broken or do not fit.
    """
    if preset is None and weights is None:
        raise ValueError("expected --preset, --weights or both; `diffit models` lists the presets")
    known = None if preset is None else get_preset(preset)
    shipped = SHIPPED / f"{preset}.safetensors"
    if weights is None and shipped.is_file():
        weights = str(shipped)
    if weights is None:
        assert preset is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return Found(create_model(preset).eval(), preset, RANDOM)

    announce_hub(weights)
    # A repository may hold a file for each size.
    path = find_weights(weights, known.options.get("input_size", 32) if known else 32)
    network, noted = load_model(path)
    if preset is not None and noted in PRESETS and noted != preset:
        raise ValueError(f"{path}: expected weights of preset {preset}, got those of {noted}")
    require_finite(network, str(path))
    if isinstance(network, ImageNetwork):
        network.float()  # half precision halves the file; it is not how the network is run
    if preset is None:
        preset = noted or _published_preset(network, path)
        if preset not in PRESETS:
            raise ValueError(f"{path}: notes a preset that is not known here, {preset!r}")
    elif known is not None:
        _require_fit(network, preset, known, path)
    return Found(network, preset, sha256_of(path))


def announce_hub(source: str | None) -> None:
    """Say that the hub is asked for weights, which may take a while, where it will be.

    Of several processes the first says it.
    """
    if source is not None and is_on_hub(source) and os.environ.get("RANK", "0") == "0":
        print(f"{source}: asking the Hugging Face hub", flush=True)


def image_size(network: DiffusionNetwork) -> int:
    """Height and width of the pictures, in pixels."""
    if isinstance(network, LatentDiffiT):
        return network.input_size * VAE_SCALE
    assert isinstance(network, ImageNetwork)
    return network.img_resolution


def _published_preset(network: DiffusionNetwork, path: Path) -> str:
    if isinstance(network, LatentDiffiT) and network.input_size in PUBLISHED_PRESETS:
        return PUBLISHED_PRESETS[network.input_size]
    raise ValueError(f"{path}: notes no preset; say with --preset how it is sampled")


def _require_fit(network: DiffusionNetwork, name: str, preset: Preset, path: Path) -> None:
    with torch.device("meta"):
        expected = create_model(name)
    for what, ours, theirs in (
        ("network", type(expected).__name__, type(network).__name__),
        ("size", f"{image_size(expected)} pixels", f"{image_size(network)} pixels"),
    ):
        if ours != theirs:
            raise ValueError(f"{path}: {what}: {name} is {ours}, the file holds {theirs}")
