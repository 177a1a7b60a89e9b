"""Which picture comes when, and seeds for all that is drawn: functions of one seed, no state."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch


def stream_seed(seed: int, *position: int | str) -> int:
    """A seed of 32 bits for one stream of random numbers, 0..2**32 - 1.

    Args:
        seed: of the run.
        position: what the stream is for, for example ``"order", epoch``. Any two differ.
    """
    text = repr((seed, *position)).encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little")


class Order:
    """Pictures without end: each epoch is a permutation, drawn from the seed and its number.

    Args:
        length: pictures in the set.
        seed: of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        # Two: a batch may end one epoch and begin the next.
        self._permutation = lru_cache(maxsize=2)(self._draw)
        self._seed = seed

    def __getitem__(self, position: int) -> int:
        """The picture at a position: ``position = epoch * length + k``."""
        epoch, k = divmod(position, self.length)
        return int(self._permutation(epoch)[k])

    def _draw(self, epoch: int) -> Any:
        generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
        # As numpy's: an element of it is read ten times as fast.
        return torch.randperm(self.length, generator=generator).numpy()
