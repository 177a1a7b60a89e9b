"""Pictures come out as they went in; what is wrong with a set is one line that names it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.data.dataset import ImageDataset
from tests.diffit.training.tiny import CLASSES, pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pictures of a zip, as files."""
    with zipfile.ZipFile(pictures(tmp_path / "set.zip")) as archive:
        archive.extractall(tmp_path / "set")
    return tmp_path / "set"


def opened(path: Path, num_classes: int = CLASSES) -> ImageDataset:
    return ImageDataset(path, resolution=8, num_classes=num_classes)


def test_zip_and_folder_hold_the_same_pictures(folder: Path) -> None:
    ours, theirs = opened(folder.with_suffix(".zip")), opened(folder)
    assert len(ours) == len(theirs) == 11
    for i, name in enumerate(ours.names):
        expected = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1)
        assert ours.read(i).equal(expected)
        assert theirs.read(i).equal(expected)
        assert ours.read(i).dtype == torch.uint8
    assert ours.labels is not None
    assert ours.labels.tolist() == [i % CLASSES for i in range(11)]
    ours.check()


@pytest.mark.parametrize("size", [32, 64])
def test_the_project_s_emoji_can_be_read(size: int) -> None:
    data = Path(__file__).parents[3] / "examples" / "data" / f"emoji{size}.zip"
    dataset = ImageDataset(data, resolution=size, num_classes=9)
    assert len(dataset) == 3812
    dataset.check()


def test_labels_are_not_read_where_there_are_no_classes(folder: Path) -> None:
    (folder / "dataset.json").unlink()
    assert opened(folder, num_classes=0).labels is None


def test_the_fingerprint_tells_contents_apart(folder: Path) -> None:
    path = folder.with_suffix(".zip")
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    assert opened(path, num_classes=0).fingerprint != before
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(next(folder.rglob("*.png")), "one_more.png")
    assert opened(path, num_classes=0).fingerprint != opened(folder, num_classes=0).fingerprint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no dataset.json in it"),
        ("{", "dataset.json: cannot be read: Expecting property name"),
        ('{"labels": null}', "img00000000.png: expected a class 0..2, got no label"),
        ("[]", r"expected an object with labels, got \[\]"),
        ('{"labels": []}', "img00000000.png: expected a class 0..2, got no label"),
        (3, "img00000003.png: expected a class 0..2, got 3"),
        (-1, "img00000003.png: expected a class 0..2, got -1"),
        (True, "img00000003.png: expected a class 0..2, got True"),
        ("1", "expected an object with labels, got 1"),
        ('{"labels": [1]}', r"expected labels, a list of \[file, class\], got \[1\]"),
    ],
)
def test_wrong_labels_are_named(folder: Path, labels: object, message: str) -> None:
    index = folder / "dataset.json"
    if labels is None:
        index.unlink()
    elif isinstance(labels, str):
        index.write_text(labels)
    else:
        content = json.loads(index.read_text())
        content["labels"][3][1] = labels
        index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("RGB", (8, 9)), "expected 8 x 8, RGB, got 8 x 9, RGB"),
        (Image.new("RGBA", (8, 8)), "expected 8 x 8, RGB, got 8 x 8, RGBA"),
        (Image.new("L", (8, 8)), "expected 8 x 8, RGB, got 8 x 8, L"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_picture_is_named(folder: Path, picture: Image.Image | None, message: str) -> None:
    file = folder / "00000" / "img00000007.png"
    if picture is None:
        file.write_bytes(file.read_bytes()[:60])
    else:
        picture.save(file)
    with pytest.raises(ValueError, match=message) as caught:
        opened(folder).check()
    assert "img00000007.png" in str(caught.value)


@pytest.mark.parametrize(
    ("mark", "name"), [(b"IDAT", "img00000000.png"), (b'{"labels": ', "dataset.json")]
)
def test_a_flipped_bit_in_a_zip_is_seen(folder: Path, mark: bytes, name: str) -> None:
    path = folder.with_suffix(".zip")
    content = bytearray(path.read_bytes())
    content[content.index(mark) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"set.zip: .*{name}: cannot be read: Bad CRC-32"):
        opened(path).check()


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        opened(tmp_path / "missing.zip")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="a folder or a zip"):
        opened(tmp_path / "no.zip")
