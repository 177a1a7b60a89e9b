"""Autocast for operators some of whose inputs keep their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("diffit", "FRAGMENT")


def register_autocast(name: str, operator: Callable[..., Any], keep: tuple[int, ...] = ()) -> None:
    """Cast the floating inputs of ``diffit::name`` to autocast's dtype.

    Positions in ``keep`` (and float64 tensors, as in PyTorch) stay as they are.
    """
    for device_type in ("cpu", "cuda"):
        key = f"Autocast{device_type.upper()}"
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def implementation(
            *args: Any, device_type: str = device_type, excluded: Any = excluded
        ) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast = [
                arg.to(dtype) if position not in keep and _casts(arg, device_type) else arg
                for position, arg in enumerate(args)
            ]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*cast)

        _LIBRARY.impl(name, implementation, key)


def is_active(x: Tensor) -> bool:
    """Whether autocast converts the inputs of an operator that takes ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _casts(arg: Any, device_type: str) -> bool:
    return (
        isinstance(arg, Tensor)
        and arg.is_floating_point()
        and arg.dtype != torch.float64
        and arg.device.type == device_type
    )
