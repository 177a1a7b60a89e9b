"""Pictures on disk, as batches for a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.data.pack import MODES, UNREADABLE, open_source, to_rgb, why_unreadable


class PictureSet:
    """The pictures of a folder, a zip or an npz (``arr_0``), all of one size.

    Raises:
        ValueError: it is none of these, or empty.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._pictures = open_source(path).pictures
        if not self._pictures:
            raise ValueError(f"{path}: there are no pictures in it")
        self.path = path

    def __len__(self) -> int:
        return len(self._pictures)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """Those pictures in that order, (B, 3, H, W), uint8; alpha lies over white.

        Raises:
            ValueError: a picture that cannot be read, or of another size than the first.
        """
        for start in range(0, len(indices), batch_size):
            batch = [self._pixels(i) for i in indices[start : start + batch_size]]
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self._read(0).shape

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        pixels = self._read(index)
        if pixels.shape != self._shape:
            (height, width, _), (first_height, first_width, _) = pixels.shape, self._shape
            raise ValueError(
                f"{self.path}: {self._pictures[index].name}: expected {first_width} x "
                f"{first_height} as the first picture, got {width} x {height}; "
                "`diffit data --size` cuts and scales"
            )
        return pixels

    def _read(self, index: int) -> NDArray[np.uint8]:
        picture = self._pictures[index]
        try:
            image = picture.load()
            image.load()
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path}: {picture.name}: cannot be read: {why_unreadable(error)}"
            ) from error
        if image.mode not in MODES:
            raise ValueError(f"{self.path}: {picture.name}: pixels of mode {image.mode}")
        return np.asarray(to_rgb(image))
