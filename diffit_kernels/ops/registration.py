"""How an operator of this package enters PyTorch.

As ``torch.library.custom_op``, whose checks cost tens of microseconds more in every call: with the
backward pass, a tenth of the time of a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("diffit", "DEF")


class Operator:
    """``torch.ops.diffit.NAME``, computed by a function whose annotations give the schema.

    The function allocates its results and changes none of its arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.diffit, name).default

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes and strides of the results, for tensors without data."""
        torch.library.register_fake(f"diffit::{self.name}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
    ) -> None:
        """The gradient, as in ``torch.library.register_autograd``; None: asking for it raises."""
        name, overload = self.name, self.overload

        def no_derivative(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(f"diffit::{name} has no derivative: gradients are of first order")

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = overload(*args)
            if setup_context is not None:
                setup_context(ctx, args, result)
            return result

        methods = {"forward": forward, "backward": backward or no_derivative}
        node: Any = type(
            f"diffit::{name}",
            (torch.autograd.Function,),
            {key: staticmethod(method) for key, method in methods.items()},
        )

        def autograd(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(
                arg.requires_grad for arg in args if isinstance(arg, Tensor)
            ):
                return node.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        _LIBRARY.impl(name, autograd, "Autograd")

    def register_autocast(self, keep: tuple[int, ...] = ()) -> None:
        """Cast floating inputs to autocast's dtype, except at the positions in ``keep``.

        float64 tensors stay as they are, as in PyTorch.
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
                    return self.overload(*cast)

            _LIBRARY.impl(self.name, implementation, key)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an ``Operator``."""
    return lambda function: Operator(name, function)


def _casts(arg: Any, device_type: str) -> bool:
    return (
        isinstance(arg, Tensor)
        and arg.is_floating_point()
        and arg.dtype != torch.float64
        and arg.device.type == device_type
    )
