"""Finished pictures on disk: a PNG per seed that notes what made it, and what is made of them.

The PNGs are all the state there is: whoever continues reads which are there. They are written to
a temporary name and renamed, so one that is there is whole unless the machine itself went down.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffit.cli.arguments import require_out_folder
from diffit.files import replacing

Note = Mapping[str, Any]
Pixels = NDArray[np.uint8]  # (H, W, 3)

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
KEY = "diffit"  # of the text chunk with the note


class Gallery:
    """The pictures of one command: ``FOLDER/000042.png`` is that of seed 42.

    Args:
        out: what the command writes: a .png (a grid), an .npz, or a folder. The pictures live in
            the folder, or else in ``OUT.partial`` beside it until it is written.

    Raises:
        ValueError: another extension.
        OSError: no place to write to.
    """

    def __init__(self, out: str) -> None:
        if not out:
            raise ValueError("--out: expected a file or a folder, got ''")
        self.path = Path(out)
        is_folder = self.path.is_dir() or out.endswith(os.sep) or not self.path.suffix
        if not is_folder and self.path.suffix not in WRITERS:
            raise ValueError(
                f"--out: expected a folder or a file that ends in {' or '.join(WRITERS)}, "
                f"got {out!r}"
            )
        if not self.path.parent.is_dir():
            raise NotADirectoryError(f"--out: there is no folder {str(self.path.parent)!r}")
        require_out_folder("--out", self.path if is_folder else self.path.parent)
        self._write = None if is_folder else WRITERS[self.path.suffix]
        self.folder = self.path if is_folder else self.path.with_name(f"{self.path.name}.partial")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """With the folder there; if no picture came into it, it is gone afterwards."""
        new = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        try:
            yield
        finally:
            if new:
                with suppress(OSError):  # not empty
                    self.folder.rmdir()

    def missing(self, notes: Mapping[int, Note]) -> list[int]:
        """The seeds without a whole picture.

        Args:
            notes: what makes the picture of each seed.

        Raises:
            ValueError: there is a picture made otherwise.
        """
        return [seed for seed, note in notes.items() if not self._holds(seed, note)]

    def holds_any(self) -> bool:
        """Whether there are finished pictures."""
        return any(self.folder.glob("[0-9]*.png"))

    def add(self, seed: int, pixels: Pixels, note: Note) -> None:
        """Write one picture."""
        text = PngInfo()
        text.add_text(KEY, json.dumps(note))
        with replacing(self._path(seed)) as file:
            Image.fromarray(pixels).save(file, "png", pnginfo=text)

    def finish(self, notes: Mapping[int, Note]) -> None:
        """Write the output, of the pictures of these seeds in this order."""
        if self._write is None:
            return
        with replacing(self.path) as file:
            self._write(file, [self._path(seed) for seed in notes], list(notes.values()))
        for path in [*self.folder.glob("*.png"), *self.folder.glob(".*.png.tmp")]:
            path.unlink()
        with suppress(OSError):  # not empty: what is left is not ours
            self.folder.rmdir()

    def _path(self, seed: int) -> Path:
        return self.folder / f"{seed:06d}.png"

    def _holds(self, seed: int, note: Note) -> bool:
        path = self._path(seed)
        try:
            with path.open("rb") as file:
                file.seek(-min(len(PNG_END), os.path.getsize(path)), os.SEEK_END)
                if file.read() != PNG_END:
                    return False
            with Image.open(path) as picture:
                found = json.loads(picture.info.get(KEY, "{}"))
        except FileNotFoundError:
            return False
        if found != note:
            other = [f"{k} {found.get(k)} not {note[k]}" for k in note if found.get(k) != note[k]]
            raise ValueError(
                f"{path}: is there and was made otherwise ({', '.join(other)}); "
                "delete its folder or choose another --out"
            )
        return True


def pixels_of(path: Path) -> Pixels:
    """The picture in a file: (H, W, 3), uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def write_grid(file: BinaryIO, paths: Sequence[Path], notes: Sequence[Note]) -> None:
    """As square as it gets, row by row, without gaps; what is left of the last row is white."""
    height, width, channels = pixels_of(paths[0]).shape
    columns = math.ceil(math.sqrt(len(paths)))
    rows = math.ceil(len(paths) / columns)
    grid = np.full((rows * height, columns * width, channels), 255, np.uint8)
    for i, path in enumerate(paths):
        top, left = i // columns * height, i % columns * width
        grid[top : top + height, left : left + width] = pixels_of(path)
    Image.fromarray(grid).save(file, "png")


def write_npz(file: BinaryIO, paths: Sequence[Path], notes: Sequence[Note]) -> None:
    """``arr_0`` (N, H, W, 3) uint8 and, where there are classes, ``arr_1`` (N,) int64.

    What guided-diffusion's ``evaluator.py`` reads. Written picture by picture: 50,000 of 256
    pixels are 10 GB.
    """
    shape = (len(paths), *pixels_of(paths[0]).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for path in paths:
                entry.write(pixels_of(path).tobytes())
        if notes[0]["class"] is not None:
            labels = np.array([note["class"] for note in notes], np.int64)
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)


Writer = Callable[[BinaryIO, Sequence[Path], Sequence[Note]], None]
WRITERS: dict[str, Writer] = {".png": write_grid, ".npz": write_npz}
