"""What a step trains on: every random number is a function of (seed, position of the image).

So one process, many, or an accumulated batch see the same images with the same noise, and a run
that was interrupted goes on as if it had not been: there is no state to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffit.data.dataset import Dataset
from diffit.data.order import Order, stream_seed
from diffit.training.augment import NUMBERS, augment

Key = TypeVar("Key")
Value = TypeVar("Value")


class Batch(NamedTuple):
    """A part of the batch of a step.

    Attributes:
        x: (B, C, H, W), float32: pictures in [-1, 1], or latents.
        labels: (B,), int64, ``num_classes`` where the class was dropped; None: no classes.
        augment_labels: (B, 9), or None.
        level: (B,): a normal number for the noise level, float32, or the time step, int64.
        noise: like x, normal.
    """

    x: Tensor
    labels: Tensor | None
    augment_labels: Tensor | None
    level: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Batch:
        """On a device, without waiting."""
        if device.type == "cpu":
            return self
        moved: list[Any] = [
            t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self
        ]
        return Batch(*moved)


class Batches:
    """The parts of the batches of all steps.

    Args:
        dataset: read by one thread at a time.
        batch_size: of a step.
        seed: of the run.
        num_classes: also the label that means no class.
        label_dropout: how often a label becomes that.
        augment: probability of each augmentation; None: without labels for it.
        timesteps: of a discrete process; None: noise levels are continuous.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        num_classes: int,
        label_dropout: float,
        augment: float | None,
        timesteps: int | None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.augment = augment
        self.timesteps = timesteps
        self._order = Order(len(dataset), seed)

    def part(self, step: int, start: int, stop: int) -> Batch:
        """Images start..stop - 1 of the batch of a step, on the CPU.

        Raises:
            ValueError, OSError: a picture that cannot be read.
        """
        positions = range(step * self.batch_size + start, step * self.batch_size + stop)
        indices = [self._order[position] for position in positions]
        x = torch.stack([self.dataset.read(index) for index in indices])
        if x.dtype == torch.uint8:
            x = x.float().div_(127.5).sub_(1)
        numbers, level, noise = self._drawn(positions, x)
        labels = self.dataset.labels
        if labels is not None:
            drop = torch.special.ndtr(numbers[:, NUMBERS]) < self.label_dropout
            labels = labels[indices].where(~drop, self.num_classes)
        augment_labels = None
        if self.augment is not None:
            x, augment_labels = augment(x, numbers[:, :NUMBERS], self.augment)
        return Batch(x, labels, augment_labels, level, noise)

    def _drawn(self, positions: range, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image's own stream: numbers for augmentation and label, the level, the noise.

        One generator, and few calls into rows of what is returned: the thread that trains waits
        while this one runs Python.
        """
        numbers = x.new_empty(len(x), NUMBERS + 1)
        if self.timesteps is None:
            level = x.new_empty(len(x))
        else:
            level = torch.empty(len(x), dtype=torch.int64)
        noise = torch.empty_like(x)
        generator = torch.Generator()
        rows = zip(positions, numbers.unbind(), level.unbind(), noise.unbind(), strict=True)
        for position, few, one, many in rows:
            generator.manual_seed(stream_seed(self.seed, "image", position))
            few.normal_(generator=generator)
            if self.timesteps is None:
                one.normal_(generator=generator)
            else:
                one.random_(self.timesteps, generator=generator)
            many.normal_(generator=generator)
        return numbers, level, noise


def ahead(make: Callable[[Key], Value], keys: Iterable[Key]) -> Iterator[Value]:
    """``map(make, keys)``, with one thread that makes the next value meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for key in keys:
            following = pool.submit(make, key)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
