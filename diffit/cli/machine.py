"""The machine: its device, a batch that fits into its memory, what to say when one did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffit.models import DiffusionNetwork, ImageNetwork, LatentDiffiT

# Memory of an evaluation over the activations of the widest layer: 23 to 39 as measured on the
# reference backend, 8 to 17 on the CPU kernels.
LIVE_ACTIVATIONS = 40
FREE_SHARE = 0.5  # of the memory that is free
# Larger batches are hardly faster, and a batch is what an interruption loses.
MOST_ON_CPU, MOST = 16, 64


def pick_device(name: str | None) -> torch.device:
    """The device of that name; under torchrun, "cuda" is the one of this process.

    Args:
        name: None: cuda where there is one, else cpu.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # no such type; not built in; no such index
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device: {name} cannot be used here: {reason}") from error
    return device


def batch_that_fits(network: DiffusionNetwork, processes: int) -> int:
    """A batch size by a cautious estimate: guided, on the backend that needs the most memory.

    Args:
        network: on its device.
        processes: how many share the memory of this machine's processor.
    """
    if isinstance(network, LatentDiffiT):
        _, tokens, width = network.pos_embed.shape
    else:
        assert isinstance(network, ImageNetwork)
        tokens, width = network.img_resolution**2, network.head.in_channels
    weight = next(network.parameters())
    picture = 2 * LIVE_ACTIVATIONS * tokens * width * weight.element_size()
    if weight.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(weight.device)[0], MOST
    else:
        free, most = _free_memory() // processes, MOST_ON_CPU
    return max(1, min(most, int(FREE_SHARE * free / picture)))


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return 2**32


@contextmanager
def explained(batch_size: int) -> Iterator[None]:
    """Turn the ways to run out of memory into one, which suggests a smaller batch.

    Raises:
        MemoryError: there was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        ):
            raise
        advice = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "even for one picture"
        raise MemoryError(f"out of memory with --batch-size {batch_size}: {advice}") from error
