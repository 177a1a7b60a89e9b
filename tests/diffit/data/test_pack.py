"""Packing pictures: every source, labels, what is left out, what is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffit.data.pack import pack

EMOJI = Path(__file__).parents[3] / "examples/data/emoji32.zip"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def contents(path: Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The pictures and the index of a packed zip."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("dataset.json"))
        names = [name for name in archive.namelist() if name != "dataset.json"]
        assert names == [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(names))]
        if index["labels"] is not None:
            assert [name for name, _ in index["labels"]] == names
        return [np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names], index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, one picture each, and a third in a deeper folder."""
    for i, name in enumerate(("cat/a.png", "dog/b.png", "dog/more/c.png")):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(picture(5, 5, i)))
    return tmp_path / "set"


def test_folders_are_classes(folder: Path, tmp_path: Path) -> None:
    report = pack(folder, tmp_path / "out.zip")
    images, index = contents(tmp_path / "out.zip")
    assert str(report) == "kept 3"
    assert [label for _, label in index["labels"]] == [0, 1, 1]
    assert index["classes"] == ["cat", "dog"]
    for i, image in enumerate(images):
        assert np.array_equal(image, np.asarray(picture(5, 5, i)))


def test_without_classes(folder: Path, tmp_path: Path) -> None:
    """One picture beside the folders: the folders mean nothing."""
    (folder / "z.png").write_bytes(png(picture(5, 5)))
    pack(folder, tmp_path / "out.zip")
    assert contents(tmp_path / "out.zip")[1] == {"labels": None, "classes": None}


def test_packing_again_changes_nothing(tmp_path: Path) -> None:
    """The set that ships with the project, whose labels and classes are kept."""
    assert str(pack(EMOJI, tmp_path / "a.zip")) == "kept 3812"
    pack(tmp_path / "a.zip", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    images, index = contents(tmp_path / "a.zip")
    before, expected = contents(EMOJI)
    assert index == expected
    assert all(map(np.array_equal, images, before))


def test_cut_and_scaled(tmp_path: Path) -> None:
    """The central square of a wide and of a tall picture, scaled down."""
    (tmp_path / "set").mkdir()
    wide = np.zeros((8, 20, 3), dtype=np.uint8)
    wide[:, 6:14] = (255, 0, 0)
    for name, pixels in (("wide", wide), ("tall", wide.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "set" / f"{name}.png")
    pack(tmp_path / "set", tmp_path / "out.zip", size=4)
    for image in contents(tmp_path / "out.zip")[0]:
        assert image.shape == (4, 4, 3)
        assert (image == (255, 0, 0)).all()


def test_modes(tmp_path: Path) -> None:
    """Grey, palettes and alpha become RGB, alpha over white; more bits are left out."""
    (tmp_path / "set").mkdir()
    grey = Image.new("L", (2, 2), 77)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    palette = Image.new("RGB", (2, 2), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16))
    for name, image in zip("abcde", (grey, clear, half, palette, deep), strict=True):
        image.save(tmp_path / "set" / f"{name}.png")
    report = pack(tmp_path / "set", tmp_path / "out.zip")
    assert str(report) == "kept 4\nleft out 1: pixels of mode I;16 (e.png)"
    colours = [image[0, 0].tolist() for image in contents(tmp_path / "out.zip")[0]]
    assert colours == [[77] * 3, [255] * 3, [127] * 3, [1, 2, 3]]


def test_what_is_left_out(folder: Path, tmp_path: Path) -> None:
    whole = png(picture(9, 9))
    (folder / "cat/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat/text.png").write_text("no picture")
    (folder / "dog/large.png").write_bytes(whole)
    (folder / "notes.txt").write_text("hello")
    report = pack(folder, tmp_path / "out.zip", size=6)
    assert report.kept == 1
    assert report.left_out == {
        "not a picture": ["notes.txt"],
        "smaller than 6 x 6": ["cat/a.png", "dog/b.png", "dog/more/c.png"],
        "cannot be read": ["cat/cut.png", "cat/text.png"],
    }
    assert contents(tmp_path / "out.zip")[1]["labels"] == [["00000/img00000000.png", 1]]


def test_pictures_without_a_label(folder: Path, tmp_path: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": [["dog/b.png", 7]]}))
    report = pack(folder, tmp_path / "out.zip")
    assert report.left_out == {"no label": ["cat/a.png", "dog/more/c.png"]}
    assert contents(tmp_path / "out.zip")[1]["labels"] == [["00000/img00000000.png", 7]]


def test_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images, np.array([2, 0, 2]))
    pack(tmp_path / "a.npz", tmp_path / "out.zip")
    got, index = contents(tmp_path / "out.zip")
    assert np.array_equal(got, images)
    assert [label for _, label in index["labels"]] == [2, 0, 2]
    np.savez(tmp_path / "b.npz", images)
    pack(tmp_path / "b.npz", tmp_path / "out.zip")
    assert contents(tmp_path / "out.zip")[1]["labels"] is None


def cifar10(path: Path, **replaced: bytes) -> np.ndarray:
    """A python archive of two pictures a batch, in the layout of the real one."""
    rng, images = np.random.default_rng(0), []
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
            content: dict[bytes, Any] = {b"label_names": [b"plane", b"car"]}
            if name != "batches.meta":
                data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
                content = {b"data": data, b"labels": [1, 0], b"filenames": [b"a", b"b"]}
                if name != "test_batch":
                    images.append(data)
            data = replaced.get(name, pickle.dumps(content, protocol=4))
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_cifar10(tmp_path: Path) -> None:
    """The archive, and the folder that it unpacks to."""
    expected = cifar10(tmp_path / "cifar-10-python.tar.gz")
    shutil.unpack_archive(tmp_path / "cifar-10-python.tar.gz", tmp_path)
    for source in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        assert pack(tmp_path / source, tmp_path / "out.zip").kept == 10
        images, index = contents(tmp_path / "out.zip")
        assert np.array_equal(images, expected)
        assert index["classes"] == ["plane", "car"]
        assert [label for _, label in index["labels"]] == [1, 0] * 5


class Harm:
    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: Any) -> None:
    cifar10(tmp_path / "a.tar.gz", data_batch_3=pickle.dumps(Harm()))
    with pytest.raises(
        ValueError, match=r"not CIFAR-10.s python archive: it holds builtins\.print"
    ):
        pack(tmp_path / "a.tar.gz", tmp_path / "out.zip")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "replaced",
    [
        {"batches.meta": b"no pickle"},
        {"batches.meta": pickle.dumps([1])},
        {"batches.meta": pickle.dumps({b"label_names": [1]})},
        {"batches.meta": pickle.dumps({b"label_names": [b"plane"]})},
        {"data_batch_2": b""},
        {"data_batch_2": pickle.dumps(3)},
        {"data_batch_2": pickle.dumps({b"data": None, b"labels": None})},
        {"data_batch_2": pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 0]})},
        {"data_batch_2": pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]})},
    ],
)
def test_odd_cifar10(tmp_path: Path, replaced: dict[str, bytes]) -> None:
    cifar10(tmp_path / "a.tar.gz", **replaced)
    with pytest.raises(ValueError, match=r"a\.tar\.gz: not CIFAR-10's python archive: [^\n]+$"):
        pack(tmp_path / "a.tar.gz", tmp_path / "out.zip")


def test_archives_that_are_cut_off(folder: Path, tmp_path: Path) -> None:
    """Wherever: a line that names the archive, and no zip."""
    cifar10(tmp_path / "whole.tar.gz")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.write(folder / "cat/a.png", "a.png")
    np.savez_compressed(tmp_path / "whole.npz", np.zeros((2, 4, 4, 3), np.uint8))
    for whole in sorted(tmp_path.glob("whole.*")):
        content = whole.read_bytes()
        cut = tmp_path / whole.name.replace("whole", "cut")
        for length in (20, len(content) // 2):
            cut.write_bytes(content[:length])
            with pytest.raises((ValueError, OSError), match=rf"{cut.name}: [^\n]+$"):
                pack(cut, tmp_path / "out.zip")
            assert not list(tmp_path.glob("*out.zip*"))


def test_a_directory_of_a_zip_that_is_broken(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(folder / "cat/a.png", "a.png")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"PK\1\2", b"PK\1\1"))
    with pytest.raises(OSError, match=r"a\.zip: cannot be read: Bad magic number"):
        pack(tmp_path / "a.zip", tmp_path / "out.zip")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", r"expected an object with labels, got \[\]$"),
        (b"7", "expected an object with labels, got 7$"),
        (b"{", "cannot be read: Expecting property name"),
        (b"\xff\xfe{", "cannot be read: 'utf-16-le' codec"),
        (b"[" * 10**5, "cannot be read: (maximum recursion depth|Stack overflow)"),
        (b'{"labels": 7}', r"expected labels, a list of \[file, class\], got 7$"),
        (b'{"labels": [7]}', r"expected labels, a list of \[file, class\], got \[7\]$"),
        (b'{"labels": ["abc"]}', r"expected labels, a list of \[file, class\], got \['abc'\]$"),
        (b'{"labels": [["a.png", true]]}', "a.png: expected a class, got True$"),
        (b'{"classes": 7}', "expected classes, a list of names, got 7$"),
        (b'{"classes": [7]}', r"expected classes, a list of names, got \[7\]$"),
    ],
)
def test_odd_indices(folder: Path, tmp_path: Path, index: bytes, message: str) -> None:
    """In a folder and in a zip."""
    (folder / "dataset.json").write_bytes(index)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder).as_posix())
    for source in (folder, tmp_path / "set.zip"):
        with pytest.raises(ValueError, match=rf"{source}: dataset\.json: {message}"):
            pack(source, tmp_path / "out.zip")


def test_a_flipped_bit_in_the_index(tmp_path: Path) -> None:
    content = bytearray(EMOJI.read_bytes())
    content[content.rindex(b"dataset.json", 0, content.index(b"PK\1\2")) + 100] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: dataset\.json: cannot be read: "):
        pack(tmp_path / "a.zip", tmp_path / "out.zip")


def wrong_sources(tmp_path: Path) -> dict[str, str]:
    """Names of sources and what is said of them."""
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("hello")
    np.savez(tmp_path / "floats.npz", images.astype(np.float32))
    np.savez(tmp_path / "unnamed.npz", images=images)
    np.savez(tmp_path / "labels.npz", images, np.array([0]))
    np.savez(tmp_path / "negative.npz", images, np.array([0, -1]))
    np.savez(tmp_path / "one.npz", images, 0)
    np.savez(tmp_path / "flat.npz", images[:, :0])
    np.save(tmp_path / "array.npy", images)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for name, size, labels in (
        ("mixed", (5, 4), None),
        ("wide", (5, 5), None),
        ("range", (4, 4), [["a.png", 2]]),
        ("words", (4, 4), [["a.png", "cat"]]),
    ):
        (tmp_path / name).mkdir()
        picture(5 if name != "wide" else 6, 5).save(tmp_path / name / "a.png")
        picture(*size).save(tmp_path / name / "b.png")
        if labels:
            index = {"labels": labels, "classes": ["cat", "dog"]}
            (tmp_path / name / "dataset.json").write_text(json.dumps(index))
    return {
        "nowhere": "no such file or folder",
        "empty": "no pictures to keep; kept 0",
        "text.bin": "expected a folder, a zip, an npz or CIFAR-10's python archive",
        "floats.npz": r"arr_0: expected \(N, H, W, 3\), uint8, got \(2, 4, 4, 3\), float32",
        "unnamed.npz": r"expected arr_0 \(N, H, W, 3\), uint8",
        "labels.npz": "arr_1: expected 2 classes of 0 and more",
        "negative.npz": "arr_1: expected 2 classes of 0 and more",
        "flat.npz": r"arr_0: expected \(N, H, W, 3\), uint8, got \(2, 0, 4, 3\)",
        "one.npz": "arr_1: expected 2 classes of 0 and more",
        "array.npz": r"array.npz: expected arr_0 \(N, H, W, 3\), uint8",
        "cut.npz": "expected arr_0",
        "mixed": "b.png: expected 5 x 5 as the first picture, got 5 x 4; give a size",
        "wide": "a.png: expected 6 x 6 as the first picture, got 6 x 5; give a size",
        "range": "dataset.json: a.png: expected a class, got 2",
        "words": "dataset.json: a.png: expected a class, got 'cat'",
    }


def test_wrong_sources(tmp_path: Path) -> None:
    """One line each, and no zip, whole or half."""
    for name, message in wrong_sources(tmp_path).items():
        before = sorted(tmp_path.iterdir())
        with pytest.raises((ValueError, OSError), match=message) as raised:
            pack(tmp_path / name, tmp_path / "out.zip")
        assert "\n" not in str(raised.value)
        assert sorted(tmp_path.iterdir()) == before


def test_wrong_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: expected a positive number of pixels, got 0"):
        pack(folder, tmp_path / "out.zip", size=0)
