"""ImageNoise: an image's numbers depend on its seed only."""

from __future__ import annotations

import pytest
import torch

from diffit.diffusion import ImageNoise

SEEDS = [5, 0, 2**32 - 1, 17, 17, 3, 8]


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 3, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depends_on_the_seed_only(sizes: list[int], dtype: torch.dtype) -> None:
    parts: list[list[torch.Tensor]] = []
    seeds = iter(SEEDS)
    for size in sizes:
        noise = ImageNoise([next(seeds) for _ in range(size)])
        x = noise.randn((size, 3, 5, 7), dtype=dtype)
        parts.append([x, noise.randint(10), noise.randn_like(x)])
    got = [torch.cat(part) for part in zip(*parts, strict=True)]
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(got[0][i], torch.randn(3, 5, 7, generator=generator, dtype=dtype))
        assert got[1][i] == torch.randint(10, (), generator=generator)
        assert torch.equal(got[2][i], torch.randn(3, 5, 7, generator=generator, dtype=dtype))


def test_images_differ_and_go_on() -> None:
    noise = ImageNoise(range(4))
    x, y = noise.randn((4, 50)), noise.randn((4, 50))
    rows = torch.cat([x, y])
    assert len(rows.unique(dim=0)) == 8
    assert noise.randint(3).shape == (4,)
    assert noise.randint(3).dtype == torch.int64


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seeds: expected numbers 0..4294967295, got {seed}"):
        ImageNoise([1, seed])


@pytest.mark.parametrize("shape", [(), (3, 4), (1, 2, 4)])
def test_one_image_per_seed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape: expected \(2, ...\), one image per seed, got"):
        ImageNoise([1, 2]).randn(shape)
