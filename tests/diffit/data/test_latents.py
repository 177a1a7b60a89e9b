"""Latents come out by index, whichever shard they are in; shards that do not fit are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffit.data.latents import LatentDataset
from tests.diffit.training.tiny import CLASSES, latents


def opened(path: Path) -> LatentDataset:
    return LatentDataset(path, shape=(4, 4, 4), num_classes=CLASSES)


def test_latents_come_by_index(tmp_path: Path) -> None:
    dataset = opened(latents(tmp_path / "set"))
    expected = torch.randn(11, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.stack([dataset.read(i) for i in range(len(dataset))]).equal(expected)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [i % CLASSES for i in range(11)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("index", torch.tensor([0, 1, 2, 3, 3]), "index 3 is in another shard too"),
        ("index", torch.tensor([0, 1, 2, 3, 11]), "index 4 is missing"),
        ("labels", torch.tensor([0, 1, 2, 3, 0]), r"index 3: expected a class 0\.\.2, got 3"),
        ("labels", torch.zeros(4, dtype=torch.int64), "got .* and 4 labels"),
        ("latents", torch.zeros(5, 4, 4, 5), r"expected \(5, 4, 4, 4\)"),
    ],
)
def test_wrong_shards_are_named(
    tmp_path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    folder = latents(tmp_path / "set")
    shard = folder / "1.safetensors"
    save_file({**load_file(shard), name: value}, shard)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_broken_files_and_values(tmp_path: Path) -> None:
    folder = latents(tmp_path / "set")
    shard = folder / "1.safetensors"
    tensors = load_file(shard)
    tensors["latents"][2, 0, 0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ValueError, match="index 2 is not finite"):
        opened(folder).read(2)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"1.safetensors: not a whole shard"):
        opened(folder)
    with pytest.raises(NotADirectoryError):
        opened(shard)
    with pytest.raises(ValueError, match="no latents"):
        opened(_empty(tmp_path))


def _empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"
