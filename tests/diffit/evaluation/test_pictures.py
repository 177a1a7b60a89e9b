"""Batches of pictures from every kind of source, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.evaluation import PictureSet

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def save(folder: Path, pixels: np.ndarray = PIXELS) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """The same pictures three times."""
    folder = save(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    np.savez(tmp_path / "a.npz", PIXELS)
    return [folder, tmp_path / "a.zip", tmp_path / "a.npz"]


def test_sources(sources: list[Path]) -> None:
    """Channels first, in order; the last batch is what is left."""
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    for source in sources:
        pictures = PictureSet(source)
        assert len(pictures) == 5
        batches = list(pictures.batches(range(5), 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat(batches), expected)
        assert torch.equal(torch.cat(list(pictures.batches([4, 1], 9))), expected[[4, 1]])


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "a/0.png")
    (batch,) = PictureSet(tmp_path / "a").batches([0], 1)
    assert (batch == 255).all()


def test_broken_pictures(tmp_path: Path, sources: list[Path]) -> None:
    """Their names are said: text, a cut file, another size, sixteen bits, a flipped bit."""
    whole = (sources[0] / "3.png").read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6)).save(buffer, "png")
    deep = io.BytesIO()
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(deep, "png")
    for content, message in (
        (b"text", "3.png: cannot be read: no picture$"),
        (whole[: len(whole) // 2], "3.png: cannot be read: "),
        (buffer.getvalue(), "3.png: expected 6 x 4 as the first picture, got 6 x 6"),
        (deep.getvalue(), "3.png: pixels of mode I;16"),
    ):
        (sources[0] / "3.png").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(PictureSet(sources[0]).batches(range(5), 2))
    content = bytearray(sources[1].read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    sources[1].write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: 0\.png: cannot be read: Bad CRC-32"):
        list(PictureSet(sources[1]).batches(range(5), 2))


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: there are no pictures in it"):
        PictureSet(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        PictureSet(tmp_path / "nowhere")
