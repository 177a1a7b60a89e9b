"""One random generator per image: an image depends on its seed, not on the images beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_SEED = 2**32 - 1  # PyTorch's generator for the CPU reads no more bits


class ImageNoise:
    """Random numbers for a batch of B images, each from a generator of its own.

    The generators are those of the CPU, whatever the device of the result: a seed gives the same
    numbers everywhere. What an image gets depends on its seed and on what was drawn before.

    Args:
        seeds: one per image, each 0..2**32 - 1.

    Raises:
        ValueError: a seed out of range.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.seeds = list(seeds)
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seeds: expected numbers 0..{MAX_SEED}, got {seed}")
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def randn(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Normal numbers.

        Args:
            shape: (B, ...), that of the whole batch.
            dtype, device: of the result. Another dtype is another sequence of numbers.

        Raises:
            ValueError: the batch is not one image per seed.
        """
        if not shape or shape[0] != len(self):
            raise ValueError(
                f"shape: expected ({len(self)}, ...), one image per seed, got {tuple(shape)}"
            )
        images = [torch.randn(shape[1:], generator=g, dtype=dtype) for g in self._generators]
        return torch.stack(images).to(device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Normal numbers in the shape, dtype and device of x (B, ...)."""
        return self.randn(x.shape, dtype=x.dtype, device=x.device)

    def randint(self, high: int, *, device: torch.device | str = "cpu") -> Tensor:
        """(B,), int64: for each image a number 0..high - 1, for example a class."""
        numbers = [torch.randint(high, (), generator=g) for g in self._generators]
        return torch.stack(numbers).to(device)
