"""A step sees the same images and noise however its batch is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffit.data.dataset import ImageDataset
from diffit.training.batches import Batch, Batches, ahead
from tests.diffit.training.tiny import CLASSES, pictures


def batches(data: Path, **changes: object) -> Batches:
    options = {"batch_size": 8, "seed": 0, "num_classes": CLASSES, "label_dropout": 0.3}
    options |= {"augment": 0.5, "timesteps": None, **changes}
    dataset = ImageDataset(data, resolution=8, num_classes=CLASSES)
    return Batches(dataset, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("timesteps", [None, 1000])
def test_parts_make_up_the_whole(tmp_path: Path, timesteps: int | None) -> None:
    data = pictures(tmp_path / "set.zip")
    source = batches(data, timesteps=timesteps)
    for step in (0, 1, 7):  # the set has 11 pictures: epochs end within batches
        whole = source.part(step, 0, 8)
        parts = [batches(data, timesteps=timesteps).part(step, a, b) for a, b in ((0, 3), (3, 8))]
        for name in Batch._fields:
            joined = torch.cat([getattr(part, name) for part in parts])
            assert joined.equal(getattr(whole, name)), name


def test_everything_differs_from_image_to_image(tmp_path: Path) -> None:
    source = batches(pictures(tmp_path / "set.zip"))
    noise = torch.cat([source.part(step, 0, 8).noise for step in range(12)]).flatten(1)
    assert len(noise.unique(dim=0)) == 96
    level = torch.cat([source.part(step, 0, 8).level for step in range(12)])
    assert len(level.unique()) == 96
    other = batches(pictures(tmp_path / "set.zip"), seed=1)
    assert not other.part(0, 0, 8).noise.equal(source.part(0, 0, 8).noise)


def test_noise_and_levels_are_normal_and_steps_uniform(tmp_path: Path) -> None:
    data = pictures(tmp_path / "set.zip")
    normal = batches(data, batch_size=4000).part(0, 0, 4000)
    for values in (normal.level, normal.noise):
        assert values.dtype == torch.float32
        assert abs(values.mean()) < 5 / values.numel() ** 0.5
        assert values.std().item() == pytest.approx(1, abs=5 / (2 * values.numel()) ** 0.5)
    steps = batches(data, batch_size=4000, timesteps=10).part(0, 0, 4000).level
    assert steps.dtype == torch.int64
    assert (steps.bincount() - 400).abs().max() < 5 * 360**0.5
    assert len(steps.bincount()) == 10


def test_pictures_labels_and_dropout(tmp_path: Path) -> None:
    source = batches(pictures(tmp_path / "set.zip"), augment=None, label_dropout=0.3)
    dropped = 0
    for step in range(100):
        batch = source.part(step, 0, 8)
        assert batch.augment_labels is None
        assert batch.labels is not None
        for k, label in enumerate(batch.labels.tolist()):
            index = source._order[step * 8 + k]
            expected = source.dataset.read(index).double() / 127.5 - 1
            assert batch.x[k].double().allclose(expected, atol=1e-6)
            dropped += label == CLASSES
            assert label in (CLASSES, index % CLASSES)
    assert abs(dropped / 800 - 0.3) < 5 * (0.3 * 0.7 / 800) ** 0.5


def test_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(ahead(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    assert list(ahead(str, [])) == []
    results = ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
