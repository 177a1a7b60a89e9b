"""Pictures on disk: what counts as there, and the exact layout of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffit.cli.gallery import Gallery, Pixels, pixels_of, replacing

HEIGHT, WIDTH = 3, 5


def picture(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def notes_of(*seeds: int, label: int | None = 1) -> dict[int, dict[str, Any]]:
    return {seed: {"steps": 18, "guidance": 1.5, "class": label} for seed in seeds}


def filled(out: Path, notes: dict[int, dict[str, Any]]) -> Gallery:
    gallery = Gallery(str(out))
    with gallery.opened():
        for seed, note in notes.items():
            gallery.add(seed, picture(seed), note)
    return gallery


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (7, 3, 3)])
def test_grid(tmp_path: Path, count: int, rows: int, columns: int) -> None:
    seeds = list(range(20, 20 + count))[::-1]
    out = tmp_path / "grid.png"
    filled(out, notes_of(*seeds)).finish(notes_of(*seeds))
    grid = pixels_of(out)
    assert grid.shape == (rows * HEIGHT, columns * WIDTH, 3)
    cells = (
        grid.reshape(rows, HEIGHT, columns, WIDTH, 3).swapaxes(1, 2).reshape(-1, HEIGHT, WIDTH, 3)
    )
    assert all((cell == picture(seed)).all() for cell, seed in zip(cells, seeds, strict=False))
    assert (cells[count:] == 255).all()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("label", [4, None])
def test_npz(tmp_path: Path, label: int | None) -> None:
    notes = notes_of(3, 1, 2, label=label)
    filled(tmp_path / "all.npz", notes).finish(notes)
    with np.load(tmp_path / "all.npz") as arrays:
        assert sorted(arrays) == (["arr_0"] if label is None else ["arr_0", "arr_1"])
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == np.stack([picture(seed) for seed in (3, 1, 2)])).all()
        if label is not None:
            assert arrays["arr_1"].dtype == np.int64
            assert arrays["arr_1"].tolist() == [4, 4, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_folder(tmp_path: Path) -> None:
    notes = notes_of(3, 1234567)
    gallery = filled(tmp_path / "pictures", notes)
    gallery.finish(notes)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["000003.png", "1234567.png"]
    assert (pixels_of(tmp_path / "pictures" / "000003.png") == picture(3)).all()
    assert gallery.missing(notes) == []


@pytest.mark.parametrize("length", [0, 5, 50, -1])
def test_a_truncated_picture_is_missing(tmp_path: Path, length: int) -> None:
    notes = notes_of(0, 1, 2)
    gallery = filled(tmp_path / "grid.png", notes)
    path = tmp_path / "grid.png.partial" / "000001.png"
    path.write_bytes(path.read_bytes()[:length])
    assert gallery.missing(notes) == [1]


@pytest.mark.parametrize(
    ("key", "value", "message"), [("steps", 20, "steps 18 not 20"), ("class", 2, "class 1 not 2")]
)
def test_a_picture_made_otherwise_is_not_taken(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    notes = notes_of(0, 1)
    gallery = filled(tmp_path / "pictures", notes)
    with pytest.raises(ValueError, match=rf"000000.png: .*\({message}\).*--out"):
        gallery.missing({seed: note | {key: value} for seed, note in notes.items()})


def test_a_picture_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "000000.png")
    with pytest.raises(ValueError, match="made otherwise"):
        Gallery(str(tmp_path)).missing(notes_of(0))


def test_an_empty_folder_does_not_stay(tmp_path: Path) -> None:
    for out in ("grid.png", "pictures"):
        with pytest.raises(KeyError), Gallery(str(tmp_path / out)).opened():
            raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with Gallery(str(tmp_path / "mine")).opened():
        pass
    assert (tmp_path / "mine").is_dir()


def test_files_of_others_stay(tmp_path: Path) -> None:
    notes = notes_of(0)
    gallery = filled(tmp_path / "grid.png", notes)
    (gallery.folder / "notes.txt").write_text("mine")
    (gallery.folder / ".000001.png.tmp").write_text("of a run that was killed")
    gallery.finish(notes)
    assert [path.name for path in gallery.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["grid.jpg", "grid.PNG", "all.npy", "v1.2"])
def test_unknown_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected a folder or a file that ends in \.png or \.npz"
    ):
        Gallery(str(tmp_path / name))
    assert Gallery(str(tmp_path / name) + "/").folder == tmp_path / name


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="--out: there is no folder"):
        Gallery(str(tmp_path / "nowhere" / "grid.png"))


def test_replacing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
