"""Pictures to latents, once for all epochs: writes the shards that ``latents.py`` reads.

A shard holds ``SHARD`` pictures that follow one another and is named by the first. Its latents are
draws from the autoencoder's posterior, seeded by the index of the picture: how many processes there
are, and how often they were interrupted, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffit.data.dataset import ImageDataset
from diffit.diffusion import ImageNoise
from diffit.files import save_tensors
from diffit.models.vae import LatentCodec
from diffit.ranks import Ranks

SHARD = 1024
ORIGIN = "origin"  # key of the metadata: of which set, by which autoencoder


def encode(
    dataset: ImageDataset,
    out: Path,
    codec: LatentCodec,
    *,
    vae: str,
    device: torch.device,
    batch_size: int,
    ranks: Ranks,
    advance: Callable[[int], None],
) -> None:
    """Write the shards of this process that are not there yet.

    Args:
        dataset: with labels.
        out: a folder, made if need be.
        codec: on the device.
        vae: its name, which the shards note.
        device: of the codec.
        batch_size: pictures at once.
        ranks: the processes; each takes its share of the shards.
        advance: called with the number of pictures that came to be encoded.

    Raises:
        ValueError: a picture that does not fit, or shards in the folder that are of another set
            or of another autoencoder.
        OSError: something cannot be read or written.
    """
    assert dataset.labels is not None
    origin = json.dumps({"data": dataset.fingerprint, "vae": vae})
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), SHARD)[ranks.rank :: ranks.size]
    for start in starts:
        indices = torch.arange(start, min(start + SHARD, len(dataset)))
        path = out / f"{start:08d}.safetensors"
        if path.exists():
            _require_origin(path, origin)
            advance(len(indices))
            continue
        parts = []
        for part in indices.split(batch_size):
            images = torch.stack([dataset.read(int(i)) for i in part]).to(device)
            noise = ImageNoise(part.tolist())
            latents = codec.encode(images.float() / 127.5 - 1, noise.randn_like)
            parts.append(latents.half().cpu())
            advance(len(part))
        tensors = {
            "index": indices,
            "latents": torch.cat(parts),
            "labels": dataset.labels[indices],
        }
        save_tensors(path, tensors, {ORIGIN: origin})


def _require_origin(path: Path, origin: str) -> None:
    try:
        with safe_open(path, framework="pt") as shard:
            found = (shard.metadata() or {}).get(ORIGIN)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole shard of latents: {error}") from error
    if found != origin:
        raise ValueError(
            f"{path}: holds latents of another set or another autoencoder ({found}); "
            "choose another --out"
        )
