"""What the networks share: checkpointing, starting anew, checks, files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffit.models.weights import Pretrained


class DiffusionNetwork(Pretrained):
    """A network that can checkpoint its blocks, start anew, and be saved and loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters a block, and compute the block again in the backward pass."""
        self.grad_checkpointing = enable

    def _run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            result: Any = checkpoint(block, *inputs, use_reentrant=False)
            return result
        return block(*inputs)

    def _reset_layers(self) -> None:
        """What each layer does by itself; also after ``to_empty``."""
        for layer in self.modules():
            reset = getattr(layer, "reset_parameters", None)
            if layer is not self and callable(reset):
                reset()


def require_images(x: Tensor, channels: int, size: int) -> None:
    """Raise ValueError unless x is (B, channels, size, size)."""
    if x.dim() != 4 or x.shape[1:] != (channels, size, size):
        raise ValueError(f"x: expected (B, {channels}, {size}, {size}), got shape {tuple(x.shape)}")


def zero_(layer: nn.Module) -> None:
    """Set the parameters of a layer to zero, so that its branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
