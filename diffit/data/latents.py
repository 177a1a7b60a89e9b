"""Latents for training: a folder of safetensors shards.

A shard holds ``index`` (N,), int64, ``latents`` (N, C, H, W), and for networks with classes
``labels`` (N,), int64. Over all shards the indices are 0..total - 1, each once, in any order, so
any number of processes can have written them. Shards are mapped into memory.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class LatentDataset:
    """Latents by index.

    Args:
        path: the folder.
        shape: (C, H, W) that a latent has to have.
        num_classes: labels have to be 0..num_classes - 1.

    Raises:
        ValueError: nothing to read, or shards that do not fit, naming them.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, shape: tuple[int, int, int], num_classes: int) -> None:
        if not path.is_dir():
            raise NotADirectoryError(f"{path}: expected a folder of latents (safetensors)")
        self.path, self.shape = path, shape
        self._latents: list[Any] = []
        places: dict[int, tuple[int, int, int]] = {}  # index -> shard, row, label
        digest = sha256()
        for shard, file in enumerate(sorted(path.glob("*.safetensors"))):
            for row, (index, label) in enumerate(self._open(file)):
                if index in places:
                    raise ValueError(f"{file}: index {index} is in another shard too")
                if not 0 <= label < num_classes:
                    raise ValueError(
                        f"{file}: index {index}: expected a class 0..{num_classes - 1}, got {label}"
                    )
                places[index] = (shard, row, label)
            digest.update(f"{file.name} {file.stat().st_size}".encode())
        if not places:
            raise ValueError(f"{path}: no latents in it (*.safetensors)")
        if missing := [i for i in range(len(places)) if i not in places]:
            raise ValueError(f"{path}: index {missing[0]} is missing; is a shard missing?")
        self._places = [places[i] for i in range(len(places))]
        self.labels: Tensor | None = torch.tensor([label for *_, label in self._places])
        digest.update(self.labels.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def _open(self, file: Path) -> list[tuple[int, int]]:
        """The index and the label of every row."""
        try:
            shard: Any = safe_open(file, framework="pt")
            index, labels = shard.get_tensor("index"), shard.get_tensor("labels")
            latents = shard.get_slice("latents")
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole shard of latents: {error}") from error
        if latents.get_shape() != [len(index), *self.shape] or labels.shape != index.shape:
            raise ValueError(
                f"{file}: latents: expected ({len(index)}, {', '.join(map(str, self.shape))}), "
                f"and as many labels, got {latents.get_shape()} and {len(labels)} labels"
            )
        self._latents.append(latents)
        return list(zip(index.tolist(), labels.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Tensor:
        """(C, H, W), float32.

        Raises:
            ValueError: it is not finite.
        """
        shard, row, _ = self._places[index]
        latent: Tensor = self._latents[shard][row : row + 1][0].float()
        if not latent.isfinite().all():
            raise ValueError(f"{self.path}: the latent with index {index} is not finite")
        return latent

    def check(self) -> None:
        """Nothing that opening did not: to read all would take as long as an epoch."""
