"""Autocast, where an operator has to know of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Those on which the operators take part in it.
DEVICES = ("cpu", "cuda")


def is_active(x: Tensor) -> bool:
    """Whether autocast converts the inputs of an operator that takes ``x``."""
    device = x.device.type
    return device in DEVICES and torch.is_autocast_enabled(device)


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype to which active autocast converts ``x``."""
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def disabled(x: Tensor) -> AbstractContextManager[object]:
    """No autocast inside the ``with`` block, at no cost where there was none."""
    return torch.autocast(x.device.type, enabled=False) if is_active(x) else nullcontext()
