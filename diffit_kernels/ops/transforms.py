"""Transforms of functions (``torch.func``), where an operator has to know of them."""

from __future__ import annotations

import torch


def are_active() -> bool:
    """Whether this runs inside ``torch.func.grad``, ``vmap`` or another of them."""
    return torch._C._are_functorch_transforms_active()
