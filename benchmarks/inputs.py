"""Activations from real pictures: what an attention layer reads is smooth and correlated."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import layer_norm, unfold

PICTURES = Path(__file__).parents[1] / "examples" / "data" / "emoji32.zip"
STRIDE, PATCH = 2, 8  # a token sees 8 x 8 pixels, its neighbour those 2 pixels further


def load_pictures(count: int, side: int, first: int) -> Tensor:
    """``count`` pictures spread over the data set, from number ``first``: (count, 3, side, side).

    Values are in [-1, 1].
    """
    pictures = []
    with zipfile.ZipFile(PICTURES) as archive:
        names = [name for name, _ in json.loads(archive.read("dataset.json"))["labels"]]
        for i in range(count):
            data = archive.read(names[(first + i * (len(names) // count)) % len(names)])
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pictures.append(pixels.reshape(side, side, 3).permute(2, 0, 1))
    return torch.stack(pictures).float() / 127.5 - 1


def image_tokens(
    batch: int, grid: int, dim: int, generator: torch.Generator, first: int = 0
) -> Tensor:
    """Patches of pictures, lifted by a random linear map and normalised: (B, grid ** 2, C)."""
    pictures = load_pictures(batch, STRIDE * grid, first)
    padding = (PATCH - STRIDE) // 2
    patches = unfold(pictures, PATCH, padding=padding, stride=STRIDE).transpose(1, 2)
    lift = torch.randn(patches.shape[-1], dim, generator=generator)
    return layer_norm(patches @ lift, (dim,))


def time_tokens(batch: int, dim: int, generator: torch.Generator) -> Tensor:
    """Sinusoidal embeddings of noise levels spread over 0..1000, lifted likewise: (B, T)."""
    frequencies = 10000.0 ** -(torch.arange(128) / 128)
    angles = torch.linspace(0, 1000, batch)[:, None] * frequencies
    embedding = torch.cat((angles.cos(), angles.sin()), dim=1)
    lift = torch.randn(embedding.shape[1], dim, generator=generator)
    return layer_norm(embedding @ lift, (dim,))
