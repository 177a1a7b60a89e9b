"""Networks by name, and from files that tell which network they hold."""

from __future__ import annotations

import difflib
import fnmatch
import os
from typing import Any

from diffit.models.ablations import ABLATIONS
from diffit.models.base import DiffusionNetwork
from diffit.models.latent import LatentDiffiT
from diffit.models.presets import MAIN, Preset
from diffit.models.weights import find_weights, read_metadata

PRESETS: dict[str, Preset] = MAIN | ABLATIONS
NETWORKS: dict[str, type[DiffusionNetwork]] = {
    preset.network.__name__: preset.network for preset in PRESETS.values()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of presets that match a shell pattern, as ``"*_cifar10_*"``; ablations come last."""
    return fnmatch.filter(PRESETS, pattern)


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)
        raise ValueError(f"preset: there is no {name!r}; the nearest is {near[0]!r}")
    return PRESETS[name]


def create_model(name: str, **overrides: Any) -> DiffusionNetwork:
    """A new network with random weights.

    Args:
        name: of a preset, see ``list_models``.
        overrides: arguments of the network's constructor that shall differ from the preset's.

    Raises:
        ValueError: there is no such preset, or an argument that does not fit.
        TypeError: an argument that the network does not have.
    """
    preset = get_preset(name)
    return preset.network(**{**preset.options, **overrides})


def load_model(
    source: str | os.PathLike[str], **options: Any
) -> tuple[DiffusionNetwork, str | None]:
    """A network from its file, whichever it is, and the name of the preset noted there.

    Args:
        source, options: as for ``from_pretrained`` of the networks.

    Raises:
        ValueError, OSError: as there.
    """
    path = find_weights(source)
    metadata = read_metadata(path)
    name = metadata.get("network", LatentDiffiT.__name__)
    if name not in NETWORKS:
        raise ValueError(f"{path}: holds {name!r}, expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name].from_pretrained(path, **options), metadata.get("preset")
