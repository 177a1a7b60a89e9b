"""``diffit viz``: attention maps, bias tables and the losses of training as one PNG."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path

from diffit.cli.arguments import positive_int, require_out, sampler_steps

HELP = "draw attention maps, the relative position bias of a layer, or the losses of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("what", choices=("attention", "bias", "loss"))
    add("--preset", metavar="NAME", help="network and settings; `diffit models` lists them")
    add("--weights", metavar="SOURCE", help="as in `diffit sample`")
    add("--runs", nargs="+", type=Path, metavar="DIR", help="folders of `diffit train`, for loss")
    add("--out", type=Path, required=True, help="the .png to write")
    add("--layers", nargs="+", metavar="NAME", help="default: the first, the middle and the last")
    add("--head", type=int, help="attention of one head (default: the mean of all)")
    add("--seed", type=int, default=0, help="of the picture that is sampled")
    add("--class", dest="label", type=int, help="of that picture (default: none)")
    add("--steps", type=sampler_steps, default=18, help="of the sampler")
    add("--moments", type=positive_int, default=4, help="how many times to show, evenly spread")


def run(arguments: argparse.Namespace) -> None:
    """Draw it.

    Raises:
        ValueError, OSError, ImportError: wrong input.
    """
    out = arguments.out
    require_out("--out", out, ".png")
    if arguments.what == "loss":
        _draw_losses(out, arguments.runs or [])
    else:
        _draw_network(arguments)


def _draw_losses(out: Path, folders: list[Path]) -> None:
    from diffit.training.log import STATS, read_stats
    from diffit.viz import draw_losses

    if not folders:
        raise ValueError("--runs: expected folders of `diffit train`, got none")
    runs = {str(folder): read_stats(folder / STATS) for folder in folders}
    for folder, lines in runs.items():
        if not lines:
            raise ValueError(f"--runs: {folder}: expected a {STATS} with steps in it, got none")
    draw_losses(out, runs)
    print(f"{out}: {', '.join(runs)}")


def _draw_network(arguments: argparse.Namespace) -> None:
    from diffit.cli.networks import RANDOM, find_network
    from diffit.models import ImageNetwork, get_preset
    from diffit.viz import (
        AttentionRecorder,
        bias_tables,
        draw_attention,
        draw_bias,
        record_sampling,
    )

    out = arguments.out
    found = find_network(arguments.preset, arguments.weights)
    network = found.network
    if found.weights == RANDOM:
        print(f"no weights for {found.preset}: the network is random, it has learned nothing")
    if arguments.what == "bias":
        tables = bias_tables(network)
        if not tables:
            raise ValueError(f"{found.preset}: no layer has a relative position bias")
        layer = _layers(arguments.layers, tables)[0]
        draw_bias(out, layer, tables[layer])
    else:
        recorder = AttentionRecorder(network)
        layers = _layers(arguments.layers, recorder.layers)
        heads = min(recorder.layers[name].num_heads for name in layers)
        if arguments.head is not None and not 0 <= arguments.head < heads:
            raise ValueError(f"--head: expected 0..{heads - 1}, got {arguments.head}")
        label, classes = arguments.label, network.num_classes
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"--class: expected one of the {classes} classes, got {label}")
        if arguments.moments > arguments.steps:
            raise ValueError(
                f"--moments: expected at most --steps {arguments.steps}, got {arguments.moments}"
            )
        moments = record_sampling(
            network,
            seed=arguments.seed,
            label=label,
            steps=arguments.steps,
            moments=arguments.moments,
            sigma_data=get_preset(found.preset).sampling.sigma_data,
        )
        is_image = isinstance(network, ImageNetwork)
        times = [_time(moment.time, is_image=is_image) for moment in moments]
        draw_attention(out, network, moments, layers, times=times, head=arguments.head)
    print(f"{out}: {', '.join(layers if arguments.what == 'attention' else [layer])}")


def _time(time: float, *, is_image: bool) -> str:
    from math import exp

    return f"sigma {exp(4 * time):.3g}" if is_image else f"t = {time:.0f}"


def _layers(asked: list[str] | None, known: Iterable[str]) -> list[str]:
    names = list(known)
    if asked is None:
        return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(f"--layers: there is no {name!r}; the nearest is {near[0]!r}")
    return asked
