"""The processes that torchrun starts, or the one there is without it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Ranks wait for the slowest, who may have been given hours of work.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many; only ``to_first`` is for large objects."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """What the first has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def all(self, value: Any) -> list[Any]:
        """What each has, once all are here."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def to_first(self, value: Any) -> list[Any] | None:
        """What each has, in the first; None elsewhere. Large objects travel once."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.first else None
        dist.gather_object(value, values)
        return values


@contextmanager
def ranks(backend: str = "gloo") -> Iterator[Ranks]:
    """Join the others that torchrun started, if it did.

    Args:
        backend: of torch.distributed; "cpu:gloo,cuda:nccl" where tensors on GPUs are exchanged.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        # A thread of gloo lets go of its last tensors once Python's lock is free, and a group that
        # is deleted waits for that thread with the lock held: without this pause a run may
        # never end.
        time.sleep(0.1)
        dist.destroy_process_group()
