"""``diffit models``: the presets as a table."""

from __future__ import annotations

import argparse

HELP = "list the presets: size, cost, the paper's FID, and how they are sampled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "pattern", nargs="?", default="*", help="of names, for example 'diffit_cifar10*'"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: no name matches.
    """
    from diffit.models import PRESETS, get_preset, list_models

    names = list_models(arguments.pattern)
    if not names:
        get_preset(arguments.pattern)  # says which name is the nearest
    width = max(map(len, names))
    print(f"{'preset':{width}}  network       params  GFLOPs   FID  sampler")
    for name in names:
        preset = PRESETS[name]
        how = preset.sampling
        fid = "-" if preset.fid is None else f"{preset.fid:.2f}"
        sampler = f"{how.sampler}, {how.steps} steps"
        if how.guidance_scale != 1:
            sampler += f", guidance {how.guidance_scale} {how.guidance_schedule}"
        print(
            f"{name:{width}}  {preset.network.__name__:12}{preset.parameters:6.1f} M"
            f"{preset.gflops:8.1f}{fid:>6}  {sampler}"
        )
