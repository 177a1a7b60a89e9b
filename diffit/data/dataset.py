"""Pictures for training: a zip or folder in EDM's layout, as ``diffit data`` writes it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffit.data.pack import INDEX, UNREADABLE, read_index, why_unreadable

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
KEPT_BYTES = 2**30  # a set whose pixels take no more is decoded once: a GPU would wait for it


class Dataset(Protocol):
    """What training reads.

    Attributes:
        labels: (N,), int64, or None where the network takes none.
        fingerprint: differs where names, labels or contents differ.
    """

    labels: Tensor | None
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """(C, H, W): uint8 pixels, or a float32 latent."""

    def check(self) -> None:
        """Read everything once; an error names what is wrong."""


class ImageDataset:
    """Square pictures of one size, three channels of eight bits, and maybe their classes.

    Args:
        path: a zip or a folder; in it pictures and ``dataset.json``, whose ``labels`` are a list of
            [file, class]. Without labels to be read, ``dataset.json`` is not needed.
        resolution: height and width that the pictures have to have.
        num_classes: labels are read and have to be 0..num_classes - 1; 0: they are not read.

    Raises:
        ValueError: nothing to read, or labels that do not fit.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, resolution: int, num_classes: int = 0) -> None:
        self.path = path
        self.resolution = resolution
        found, self._bytes = _open(path)
        self.names = sorted(
            name for name in found if PurePosixPath(name).suffix.lower() in EXTENSIONS
        )
        if not self.names:
            raise ValueError(f"{path}: no pictures in it")
        self.labels: Tensor | None = None
        if num_classes:
            if INDEX not in found:
                raise ValueError(f"{path}: no {INDEX} in it, which holds the labels")
            self.labels = torch.tensor(_labels(path, self._bytes, self.names, num_classes))
        labels = None if self.labels is None else self.labels.tolist()
        content = json.dumps([[(name, found[name]) for name in self.names], labels])
        self.fingerprint = sha256(content.encode()).hexdigest()
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        """(3, resolution, resolution), uint8; not to be written to.

        Raises:
            ValueError: not such a picture, naming the file.
        """
        picture = self._kept.get(index)
        if picture is None:
            picture = self._decoded(self.names[index])
            if len(self.names) * picture.numel() <= KEPT_BYTES:
                self._kept[index] = picture
        return picture

    def _decoded(self, name: str) -> Tensor:
        try:
            with Image.open(io.BytesIO(self._bytes(name))) as picture:
                mode, pixels = picture.mode, np.array(picture)
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path}: {name}: cannot be read: {why_unreadable(error)}"
            ) from error
        side = self.resolution
        if mode != "RGB" or pixels.shape != (side, side, 3):
            size = "{1} x {0}".format(*pixels.shape)
            raise ValueError(
                f"{self.path}: {name}: expected {side} x {side}, RGB, got {size}, {mode}; "
                f"`diffit data --size {side}` makes them so"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def check(self) -> None:
        """Read every picture.

        Raises:
            ValueError: as ``read``.
        """
        for index in range(len(self)):
            self.read(index)


def _open(path: Path) -> tuple[dict[str, Any], Callable[[str], bytes]]:
    """Files by name with something that changes with their content, and how to read one."""
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        return sizes, lambda name: files[name].read_bytes()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected a folder or a zip, got neither: {error}") from error
    return {info.filename: info.CRC for info in archive.infolist()}, archive.read


def _labels(
    path: Path, read: Callable[[str], bytes], names: list[str], num_classes: int
) -> list[int]:
    labels, _ = read_index(path, read)
    for name in names:
        label = labels.get(name)
        if type(label) is not int or not 0 <= label < num_classes:
            what = "no label" if label is None else repr(label)
            raise ValueError(
                f"{path}: {INDEX}: {name}: expected a class 0..{num_classes - 1}, got {what}"
            )
    return [labels[name] for name in names]
