"""``diffit evaluate``: how far pictures, on disk or of a network, are from a reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from diffit.cli.arguments import require_out
from diffit.cli.sample import Plan, add_sampling_arguments, make_plan, progress_bar
from diffit.cli.seeds import format_seeds, parse_seeds

if TYPE_CHECKING:
    from torch import Tensor

    from diffit.evaluation import FeatureSet, PictureSet, Reference, StoredStatistics
    from diffit.evaluation.features import Extractor
    from diffit.ranks import Ranks

HELP = "measure pictures against a reference: Frechet distance, precision, recall, inception score"
BATCH_SIZE = 32  # of pictures on disk
SEEDS = "0-999"
SAMPLING_ONLY = (  # arguments that need a network
    *("preset", "weights", "classes", "sampler", "steps", "guidance", "guidance_interval"),
    *("vae", "dtype", "compile", "seeds"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "--reference",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder, zip or npz of pictures, or an npz with statistics (mu, sigma)",
    )
    add(
        "--samples",
        type=Path,
        metavar="PATH",
        help="a folder, zip or npz of pictures; else those of a network, with the options of "
        "`diffit sample`",
    )
    add(
        "--features",
        choices=("effnetlite0", "inception"),
        default="effnetlite0",
        help="the network whose features are compared (default: effnetlite0; inception is FID's)",
    )
    add(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth; nothing is downloaded",
    )
    add("--out", type=Path, metavar="FILE.json", help="metrics and all that they depend on")
    add(
        "--write-statistics",
        type=Path,
        metavar="FILE.npz",
        help="the statistics of the reference; without samples or a network nothing else is done",
    )
    add_sampling_arguments(parser, seeds=SEEDS)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write.

    Raises:
        ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError: wrong input.
    """
    from diffit.cli.machine import pick_device
    from diffit.evaluation import create_extractor, measure, write_statistics
    from diffit.files import replacing
    from diffit.ranks import ranks

    _require_sensible(arguments)
    arguments.seeds = arguments.seeds or parse_seeds(SEEDS)
    with ranks() as peers:
        extractor = create_extractor(
            arguments.features,
            inception_weights=arguments.inception_weights,
            device=pick_device(arguments.device),
        )
        stored, pictures = _open_reference(arguments.reference, extractor)
        source = _open_samples(arguments, peers)
        known = samples = None
        if pictures is not None and (stored is None or source is not None):
            known = _gather(extractor, pictures, arguments, peers, keep=source is not None)
        if source is not None:
            samples = _gather(extractor, source, arguments, peers, keep=True)
        if not peers.first:
            return
        reference = _reference(stored, known)
        if arguments.write_statistics:
            with replacing(arguments.write_statistics) as file:
                write_statistics(file, reference.statistics)
        if source is None or samples is None:
            return
        metrics = measure(extractor, samples, reference)
        width = max(map(len, metrics))
        print("\n".join(f"{name:{width}}  {value:.6g}" for name, value in metrics.items()))
        if samples.pooled.count < extractor.dim:
            print(
                f"fewer pictures than the {extractor.dim} features: distances are far too large, "
                "and comparable only for equal counts"
            )
        if arguments.out:
            count = reference.statistics.pooled.count or None
            manifest = {"metrics": metrics} | _manifest(arguments, source, extractor, count)
            with replacing(arguments.out) as file:
                file.write(json.dumps(manifest, indent=2).encode() + b"\n")


def _require_sensible(arguments: argparse.Namespace) -> None:
    for option, path, suffix in (
        ("--out", arguments.out, ".json"),
        ("--write-statistics", arguments.write_statistics, ".npz"),
    ):
        if path is not None:
            require_out(option, path, suffix, arguments.reference, arguments.samples)
    given = [name for name in SAMPLING_ONLY if getattr(arguments, name) not in (None, False)]
    if arguments.samples and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')}: expected a network, not --samples, with it"
        )
    if not (arguments.samples or _is_live(arguments)):
        if given or not arguments.write_statistics:
            raise ValueError("expected --samples, --preset or --weights")
        if arguments.out:
            raise ValueError("--out: expected --samples, --preset or --weights with it")


def _is_live(arguments: argparse.Namespace) -> bool:
    return arguments.preset is not None or arguments.weights is not None


def _open_reference(
    path: Path, extractor: Extractor
) -> tuple[StoredStatistics | None, PictureSet | None]:
    """The statistics that it holds, and its pictures."""
    from diffit.evaluation.statistics import holds, read_statistics

    if not holds(path, "mu"):
        return None, _open_pictures(path)
    stored = read_statistics(path)
    if stored.features not in (None, extractor.name):
        raise ValueError(
            f"{path}: expected statistics of {extractor.name}, got those of {stored.features}"
        )
    for moments, dim in ((stored.pooled, extractor.dim), (stored.spatial, extractor.spatial_dim)):
        if moments is not None and len(moments.mean) != dim:
            raise ValueError(
                f"{path}: expected statistics of {dim} features, as {extractor.name} has, "
                f"got {len(moments.mean)}"
            )
    return stored, _open_pictures(path) if holds(path, "arr_0") else None


def _reference(stored: StoredStatistics | None, known: FeatureSet | None) -> Reference:
    """Of the statistics in the file, else those of its pictures."""
    from diffit.evaluation import Reference

    if known is None:
        assert stored is not None
        return Reference(stored)
    own = known.reference()
    return own if stored is None else Reference(stored, own.features)


def _open_pictures(path: Path) -> PictureSet:
    from diffit.evaluation import PictureSet

    pictures = PictureSet(path)
    _require_enough(str(path), len(pictures))
    return pictures


def _open_samples(arguments: argparse.Namespace, peers: Ranks) -> PictureSet | Plan | None:
    if arguments.samples:
        return _open_pictures(arguments.samples)
    if not _is_live(arguments):
        return None
    _require_enough("--seeds", len(arguments.seeds))
    return make_plan(arguments, peers)


def _require_enough(name: str, count: int) -> None:
    from diffit.evaluation.measure import SPLITS

    if count < SPLITS:
        raise ValueError(f"{name}: expected at least {SPLITS} pictures, got {count}")


def _gather(
    extractor: Extractor,
    source: PictureSet | Plan,
    arguments: argparse.Namespace,
    peers: Ranks,
    *,
    keep: bool,
) -> FeatureSet | None:
    """The features of all processes' pictures, in the first one."""
    from diffit.evaluation import FeatureSet

    start = perf_counter()
    if isinstance(source, Plan):
        name, count = "samples", len(source.notes)
        batches = _painted(source, peers)
    else:
        name, count = str(source.path), len(source)
        batches = _read(source, arguments.batch_size or BATCH_SIZE, peers)
    parts = peers.to_first(FeatureSet.of(extractor, batches, keep=keep))
    if parts is None:
        return None
    print(f"{name}: {count} pictures, {count / (perf_counter() - start):.2f} a second")
    return FeatureSet.merged(parts)


def _read(pictures: PictureSet, batch_size: int, peers: Ranks) -> Iterator[Tensor]:
    """The share of this process, (B, 3, H, W), uint8."""
    mine = range(peers.rank, len(pictures), peers.size)
    with progress_bar(len(mine), show=peers.first) as bar:
        for batch in pictures.batches(mine, batch_size):
            yield batch
            bar.update(len(batch))


def _painted(plan: Plan, peers: Ranks) -> Iterator[Tensor]:
    """The same of a network."""
    import torch

    mine = list(plan.notes)[peers.rank :: peers.size]
    for _, batch in plan.painted(mine, show=peers.first):
        yield torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)


def _manifest(
    arguments: argparse.Namespace,
    source: PictureSet | Plan,
    extractor: Extractor,
    count: int | None,
) -> dict[str, Any]:
    """All that the metrics depend on; ``count`` is of the reference."""
    import torch

    import diffit

    if isinstance(source, Plan):
        note = next(iter(source.notes.values()))
        samples = {name: value for name, value in note.items() if name != "class"}
        samples |= {"seeds": format_seeds(list(source.notes)), "classes": arguments.classes}
        samples |= {"count": len(source.notes)}
    else:
        samples = _file(source.path, len(source))
    return {
        "samples": samples,
        "reference": _file(arguments.reference, count),
        "features": {
            "name": extractor.name,
            "dim": extractor.dim,
            "weights": extractor.weights,
        },
        "versions": {
            "diffit": diffit.__version__,
            "torch": torch.__version__,
            extractor.package: version(extractor.package),
        },
    }


def _file(path: Path, count: int | None) -> dict[str, Any]:
    from diffit.files import sha256_of

    return {"path": str(path), "sha256": sha256_of(path), "count": count}
