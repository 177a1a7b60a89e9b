"""The augmentation does what its label says, and depends on the seed of the image only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffit.diffusion import ImageNoise
from diffit.training.augment import NUMBERS, _resample, _where_from, augment

SEEDS = range(4000)
SIZE = 33
PIXEL = 2 / SIZE  # in coordinates from -1 to 1


def blobs(count: int, size: int = SIZE) -> Tensor:
    """A bump right of the middle, on black: (count, 1, size, size)."""
    axis = torch.linspace(-1, 1, size + 1)[:-1] + 1 / size
    bump = torch.exp(-((axis[None, :] - 0.25) ** 2 + (axis[:, None] - 0.0) ** 2) / 0.02)
    return bump.expand(count, 1, -1, -1).clone()


def numbers(seeds: Sequence[int]) -> Tensor:
    return ImageNoise(seeds).randn((len(seeds), NUMBERS))


def centre(images: Tensor) -> Tensor:
    """x (right) and y (down) of the centre of mass, (B, 2)."""
    size = images.shape[-1]
    axis = torch.linspace(-1, 1, size + 1)[:-1] + 1 / size
    mass = images.sum((1, 2, 3))
    x = (images.sum((1, 2)) * axis).sum(1) / mass
    return torch.stack([x, (images.sum((1, 3)) * axis).sum(1) / mass], dim=1)


def move(**parameters: list[float]) -> Tensor:
    """The bump after one transformation."""
    values = {
        name: torch.tensor(parameters.get(name, [0.0]), dtype=torch.float64)
        for name in ("scale", "turn", "stretch", "direction")
    }
    shift = torch.tensor([parameters.get("shift", [0.0, 0.0])], dtype=torch.float64)
    return centre(_resample(blobs(1), _where_from(**values, shift=shift)))[0]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (0.25, 0.0)),
        ({"scale": [2.0]}, (0.25 * 2**0.4, 0.0)),
        ({"turn": [math.pi / 2]}, (0.0, 0.25)),
        ({"turn": [-math.pi / 2]}, (0.0, -0.25)),
        ({"stretch": [1.5]}, (0.25 * 2**0.3, 0.0)),
        ({"stretch": [1.5], "direction": [math.pi / 2]}, (0.25 * 2**-0.3, 0.0)),
        ({"shift": [1.0, -2.0]}, (0.5, -0.5)),
        # scaled, then turned, then stretched, then shifted
        (
            {"scale": [1.0], "turn": [math.pi / 2], "stretch": [1.0], "shift": [1.0, 0.0]},
            (0.25, 0.25 * 2**0.2 * 2**-0.2),
        ),
    ],
)
def test_points_go_where_the_label_says(
    parameters: dict[str, list[float]], expected: tuple[float, float]
) -> None:
    # PyTorch's cubic kernel keeps the centre of a bump to less than a tenth of a pixel.
    assert move(**parameters).tolist() == pytest.approx(expected, abs=PIXEL / 10)


def test_flips_move_pixels_exactly_and_are_labelled() -> None:
    images = torch.randn(len(SEEDS), 1, 5, 5, generator=torch.Generator().manual_seed(0))
    result, labels = augment(images, numbers(SEEDS), 0.12)
    only_flipped = labels[:, 2:].abs().sum(1) == 0
    seen = set()
    for image, moved, label in zip(
        images[only_flipped], result[only_flipped], labels[only_flipped].tolist(), strict=True
    ):
        x, y = label[:2]
        seen.add((x, y))
        expected = image.flip(2) if x else image
        assert moved.equal(expected.flip(1) if y else expected)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("p", [0.0, 0.12, 1.0])
def test_how_often_and_how_much(p: float) -> None:
    """Each mean is within five standard deviations of what is stated."""
    _, labels = augment(torch.zeros(len(SEEDS), 1, 4, 4), numbers(SEEDS), p)
    on = labels.double()

    def near(values: Tensor, mean: float) -> None:
        spread = max(math.sqrt(max(mean * (1 - mean), 0.0) / len(SEEDS)), 1e-12)
        assert abs(values.double().mean().item() - mean) <= 5 * spread

    near(on[:, 0], 0.5)
    near(on[:, 1], p / 2)
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        near((on[:, columns] != 0).any(1), p)
    if p == 1:
        for column in (2, 7, 8):
            assert abs(on[:, column].mean()) < 5 / math.sqrt(len(SEEDS))
            assert on[:, column].std().item() == pytest.approx(1, abs=0.06)
        assert (on[:, 3] + 1).square().add(on[:, 4].square()).allclose(torch.ones(1).double())
        # cos^2 and sin^2 of a uniform angle, times the variance 1
        assert on[:, 5].square().mean().item() == pytest.approx(0.5, abs=0.08)
        assert on[:, 6].square().mean().item() == pytest.approx(0.5, abs=0.08)


def where(label: list[float], sign: int) -> Tensor:
    """Where the bump is by its label, but for the sign of the stretching."""
    x, _, scale, cos, sin, along_x, along_y, right, down = label
    a, direction = sign * math.hypot(along_x, along_y), math.atan2(along_y, along_x)
    u = torch.tensor([math.cos(direction), math.sin(direction)])
    v = torch.tensor([-math.sin(direction), math.cos(direction)])
    turn = torch.tensor([[cos + 1, -sin], [sin, cos + 1]])
    point = 2 ** (0.2 * scale) * turn @ torch.tensor([-0.25 if x else 0.25, 0.0])
    point = 2 ** (0.2 * a) * u.dot(point) * u + 2 ** (-0.2 * a) * v.dot(point) * v
    return point + torch.tensor([right, down]) / 4


def test_labels_belong_to_the_pictures() -> None:
    """The whole pipe: where the label says, to half a pixel, the picture is bright."""
    result, labels = augment(blobs(200), numbers(range(200)), 1.0)
    checked = 0
    for image, label in zip(result, labels.tolist(), strict=True):
        points = torch.stack([where(label, sign) for sign in (1, -1)])
        if points.abs().max() < 1:
            checked += 1
            x, y = ((points + 1) / PIXEL).long().unbind(1)
            assert image[0, y, x].max() > 0.6  # 1 at its middle; it is two to four pixels wide
    assert checked > 100


def test_an_image_depends_on_its_seed_only() -> None:
    images = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, labels = augment(images, numbers(range(7)), 0.5)
    for i in range(7):
        alone, label = augment(images[i : i + 1], numbers([i]), 0.5)
        assert alone.equal(whole[i : i + 1])
        assert label.equal(labels[i : i + 1])
