"""Networks by name, and from files that tell which network they hold."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from diffit.models.base import DiffusionNetwork
from diffit.models.presets import PRESETS, Preset


def list_models(pattern: str = "*") -> list[str]:
    """Names of presets that match a shell pattern, for example ``"diffit_cifar10*"``."""
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
