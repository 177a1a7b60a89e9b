"""Many processes: replicas (DDP) or shards (FSDP2) of one network, and the blocks it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffit.nn.block import DiffiTBlock
from diffit.nn.resblock import DiffiTResBlock

PARALLEL = ("ddp", "fsdp")


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks: the units that are compiled and sharded."""
    for child in network.children():
        if isinstance(child, DiffiTBlock | DiffiTResBlock):
            yield child
        else:
            yield from blocks(child)


def distribute(module: nn.Module, how: str, device: torch.device, processes: int) -> nn.Module:
    """The module as it is called while training; a single process needs nothing.

    Args:
        module: on the device. With "fsdp" its parameters become sharded, in place.
        how: "ddp": every process holds all and gradients are averaged in the backward pass.
            "fsdp": every process holds its share of parameters, gradients, averages and
            optimiser, and gathers a block when it is its turn.
        device: of the module.
        processes: how many.
    """
    if processes == 1:
        return module
    if how == "fsdp":
        mesh = init_device_mesh(device.type, (processes,))
        for block in blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def reduced_at_once(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """For a backward pass: replicas exchange gradients after the last part of a batch only.

    Shards exchange them after every part: to keep whole gradients would undo the sharding.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def total(numbers: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers
