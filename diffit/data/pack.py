"""One zip of square pictures and their labels, in EDM's layout, from whatever holds them.

The layout: PNGs ``00000/img00000000.png`` and on, and ``dataset.json`` with ``labels``, a list of
[file, class] or null, and the names of the ``classes``.
"""

from __future__ import annotations

import io
import json
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffit.files import replacing

INDEX = "dataset.json"
FOLDER_SIZE = 1000  # pictures in a folder of the zip
CIFAR10_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
BACKGROUND = (255, 255, 255, 255)  # behind alpha: white, as in a browser
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of eight bits
BROKEN = (  # what a broken archive or an entry of it raises
    OSError,
    EOFError,
    RuntimeError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
UNREADABLE = (*BROKEN, SyntaxError, ValueError, Image.DecompressionBombError)  # and a picture
NO_CIFAR10 = (  # what other pickles raise
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Picture:
    """A picture that may turn out to be none, its name in the source and its class."""

    name: str
    label: int | None
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class Source:
    """Pictures, and the names of their classes where the source has them."""

    pictures: Sequence[Picture]
    classes: list[str] | None
    others: list[str] = field(default_factory=list)  # files that are no pictures


@dataclass
class Report:
    """What became of a source: pictures kept, and names left out by reason."""

    kept: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """Count one."""
        self.left_out.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        lines = [f"kept {self.kept}"]
        for reason, names in self.left_out.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"left out {len(names)}: {reason} ({shown})")
        return "\n".join(lines)


def pack(source: Path, out: Path, *, size: int | None = None) -> Report:
    """Write the pictures of a source to one zip.

    Args:
        source: a folder of pictures, a zip of them, CIFAR-10's python archive, or an npz with
            ``arr_0`` (N, H, W, 3), uint8, and maybe ``arr_1`` (N,), classes. Labels come from
            a ``dataset.json``, else from the folders that the pictures lie in.
        out: of the zip; it appears when it is whole.
        size: height and width. Pictures are cut to their central square and scaled down to it,
            smaller ones are left out. None: they have to be squares of one size.

    Returns:
        What was kept and what was left out. Pictures that cannot be read are left out.

    Raises:
        ValueError: there is nothing to keep, or pictures or labels do not fit one another.
        OSError: the source cannot be read or the zip not written.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: expected a positive number of pixels, got {size}")
    found = open_source(source)
    report = Report()
    for name in found.others:
        report.leave_out("not a picture", name)
    labelled = any(picture.label is not None for picture in found.pictures)
    with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        labels = []
        for picture, png in _encoded(found.pictures, size, labelled, report):
            name = f"{report.kept // FOLDER_SIZE:05d}/img{report.kept:08d}.png"
            _write(archive, name, png)
            labels.append([name, picture.label])
            report.kept += 1
        if not labels:
            raise ValueError(f"{source}: no pictures to keep; {report}".replace("\n", "; "))
        index = {"labels": labels if labelled else None, "classes": found.classes}
        _write(archive, INDEX, json.dumps(index).encode())
    return report


def open_source(path: Path) -> Source:
    """The pictures of a folder, a zip, CIFAR-10's archive or an npz.

    Raises:
        ValueError: it is none of these, or its labels are wrong.
        OSError: it cannot be read.
    """
    if not (path.is_dir() or path.is_file()):
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        return _open(path)
    except BROKEN as error:
        raise OSError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> Source:
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        if CIFAR10_BATCHES[0] in names:
            return _cifar10(path, lambda name: (path / name).read_bytes())
        return _files(path, names, lambda name: (path / name).read_bytes())
    if path.suffix == ".npz":
        return _arrays(path)
    if path.suffix == ".zip" or zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
        return _files(path, names, archive.read)
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            members = {
                PurePosixPath(member.name).name: file.read()
                for member in tar
                if member.isfile() and (file := tar.extractfile(member))
            }
        return _cifar10(path, members.__getitem__)
    raise ValueError(
        f"{path}: expected a folder, a zip, an npz or CIFAR-10's python archive, got neither"
    )


def _files(path: Path, names: list[str], read: Callable[[str], bytes]) -> Source:
    known = Image.registered_extensions()
    pictures = [name for name in names if PurePosixPath(name).suffix.lower() in known]
    others = [name for name in names if name not in set(pictures) and name != INDEX]
    classes: list[str] | None = None
    labels: dict[str, Any] = {}
    if INDEX in names:
        labels, classes = read_index(path, read)
        for name, label in labels.items():
            if type(label) is not int or label < 0 or (classes and label >= len(classes)):
                raise ValueError(f"{path}: {INDEX}: {name}: expected a class, got {label!r}")
    elif pictures and all("/" in name for name in pictures):
        classes = sorted({name.split("/")[0] for name in pictures})
        labels = {name: classes.index(name.split("/")[0]) for name in pictures}
    return Source(
        [Picture(name, labels.get(name), partial(_decode, read, name)) for name in pictures],
        classes,
        others,
    )


def read_index(path: Path, read: Callable[[str], bytes]) -> tuple[dict[str, Any], list[str] | None]:
    """What ``dataset.json`` gives every file as its class, and the names of the classes.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        index = json.loads(read(INDEX))
    except UNREADABLE as error:
        raise ValueError(f"{path}: {INDEX}: cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path}: {INDEX}: expected an object with labels, got {index!r:.40}")
    labels, classes = index.get("labels") or [], index.get("classes") or []
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{path}: {INDEX}: expected classes, a list of names, got {classes!r:.40}")
    try:
        return dict(labels), classes or None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {INDEX}: expected labels, a list of [file, class], got {labels!r:.40}"
        ) from error


def why_unreadable(error: Exception) -> str:
    """What to say of an error of ``UNREADABLE``; Pillow would name an object in memory."""
    return "no picture" if isinstance(error, UnidentifiedImageError) else str(error)


def _decode(read: Callable[[str], bytes], name: str) -> Image.Image:
    return Image.open(io.BytesIO(read(name)))


def _arrays(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            labels = arrays.get("arr_1")
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected arr_0 (N, H, W, 3), uint8: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{path}: arr_0: expected (N, H, W, 3), uint8, got {images.shape}, {images.dtype}"
        )
    if labels is None:
        return Source(_of_arrays(images, [None] * len(images)), None)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise ValueError(f"{path}: arr_1: expected {len(images)} classes of 0 and more")
    return Source(_of_arrays(images, labels.tolist()), None)


def _of_arrays(images: NDArray[np.uint8], labels: Sequence[int | None]) -> list[Picture]:
    return [
        Picture(f"[{i}]", label, partial(Image.fromarray, image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


class _Arrays(pickle.Unpickler):
    """Unpickles numpy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "ndarray",
            "dtype",
            "_reconstruct",
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _cifar10(path: Path, read: Callable[[str], bytes]) -> Source:
    def unpickle(name: str) -> dict[bytes, Any]:
        return _Arrays(io.BytesIO(read(name)), encoding="bytes").load()

    try:
        batches = [unpickle(name) for name in CIFAR10_BATCHES]
        classes = [name.decode() for name in unpickle("batches.meta")[b"label_names"]]
        images = np.concatenate([batch[b"data"] for batch in batches])
        labels = [int(label) for batch in batches for label in batch[b"labels"]]
        images = images.astype(np.uint8, casting="safe").reshape(-1, 3, 32, 32)
        pictures = _of_arrays(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels)
        if not all(0 <= label < len(classes) for label in labels):
            raise ValueError(f"expected classes 0..{len(classes) - 1}")
    except NO_CIFAR10 as error:
        raise ValueError(f"{path}: not CIFAR-10's python archive: {error}") from error
    return Source(pictures, classes)


def _encoded(
    pictures: Sequence[Picture], size: int | None, labelled: bool, report: Report
) -> Iterator[tuple[Picture, bytes]]:
    """The PNG of every picture that can be kept."""
    side = size
    for picture in pictures:
        if labelled and picture.label is None:
            report.leave_out("no label", picture.name)
            continue
        try:
            image = picture.load()
            image.load()
        except UNREADABLE:
            report.leave_out("cannot be read", picture.name)
            continue
        if image.mode not in MODES:
            report.leave_out(f"pixels of mode {image.mode}", picture.name)
            continue
        side = side or image.width
        if size is None and image.size != (side, side):
            raise ValueError(
                f"{picture.name}: expected {side} x {side} as the first picture, got "
                f"{image.width} x {image.height}; give a size to cut and scale"
            )
        if min(image.size) < side:
            report.leave_out(f"smaller than {side} x {side}", picture.name)
            continue
        yield picture, _png(to_rgb(image), side)


def to_rgb(image: Image.Image) -> Image.Image:
    """In three channels, alpha over white."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _png(image: Image.Image, size: int) -> bytes:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """With a constant date, so that the same pictures give the same file."""
    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
