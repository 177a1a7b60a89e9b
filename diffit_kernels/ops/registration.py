"""How an operator of this package enters PyTorch.

As ``torch.library.custom_op``, whose checks cost tens of microseconds more in every call: with the
backward pass, a tenth of the time of a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter

from diffit_kernels.ops import transforms
from diffit_kernels.ops.autocast import DEVICES

_LIBRARY = torch.library.Library("diffit", "DEF")


def _bits(*names: str) -> int:
    """Dispatch keys as the bits of a set: those of functions and those of devices."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return reduce(int.__or__, (key.raw_repr() for key in keys))


_AUTOGRAD = _bits("AutogradCPU") & _bits("AutogradCUDA")
_AUTOCAST = _bits("AutocastCPU", "AutocastCUDA")
# What of tensors and threads calls nothing but the gradient and the function of an operator.
_PLAIN_THREAD = _bits("BackendSelect", "ADInplaceOrView")
_PLAIN_TENSOR = _AUTOGRAD | _AUTOCAST | _bits("CPU", "CUDA", "ADInplaceOrView")
_PLAIN_TYPES = (type(None), int, float, bool, tuple, torch.dtype)


class Operator:
    """``torch.ops.diffit.NAME``, computed by a function, whose annotations else give the schema.

    The function allocates its results and changes none of its arguments. A call of the object is
    one of the operator, without the dispatcher where that would find nothing else to do: no
    subclass of a tensor, no transform or mode, no autocast, no profiler. Kernels that somebody else
    registers for the operator are seen by calls of ``torch.ops.diffit.NAME`` only.
    """

    def __init__(self, name: str, function: Callable[..., Any], schema: str | None = None) -> None:
        self.name = name
        schema = schema or torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.diffit, name).default
        self._function = self._recorded = function

    def __call__(self, *args: Any) -> Any:
        """The results of ``torch.ops.diffit.NAME(*args)``."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        excluded = torch._C._dispatch_tls_local_exclude_set().raw_repr()
        if not (_is_plain_thread(excluded) and _are_plain(args)):
            return self.overload(*args)
        return (self._function if excluded & _AUTOGRAD else self._recorded)(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes and strides of the results, for tensors without data."""
        torch.library.register_fake(f"diffit::{self.name}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        *,
        refusal: str = "gradients are of first order",
    ) -> None:
        """The gradient, as in ``torch.library.register_autograd``; None: asking for it raises."""
        name = self.name

        def no_derivative(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(f"diffit::{name} has no derivative: {refusal}")

        def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
            def compute(*args: Any) -> Any:
                # Nor are views noted: a result that is one could not be changed in place.
                with torch._C._AutoDispatchBelowADInplaceOrView():
                    return function(*args)

            def forward(ctx: Any, *args: Any) -> Any:
                if transforms.are_active():
                    # For outer transforms, which take their turn inside.
                    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                        result = compute(*args)
                else:
                    result = compute(*args)
                if setup_context is not None:
                    setup_context(ctx, args, result)
                return result

            def node(base: type) -> Any:
                methods = {"forward": forward, "backward": backward or no_derivative}
                statics = {key: staticmethod(method) for key, method in methods.items()}
                return type(f"diffit::{name}", (base,), statics)

            # Inside transforms, tensors are those of the innermost already. ``Function`` would ask
            # for rules of all; its base class records for this one alone, as PyTorch's own
            # ``custom_function_call`` does in the end.
            plain, innermost = node(Function), node(_SingleLevelFunction)

            def record(*args: Any) -> Any:
                if not transforms.are_active():
                    return plain.apply(*args)
                with enable_single_level_autograd_function():
                    return innermost.apply(*args)

            def autograd(*args: Any) -> Any:
                if forward_ad._current_level >= 0 and _has_tangent(args):
                    raise NotImplementedError(f"diffit::{name} has no forward-mode derivative")
                if torch.is_grad_enabled():
                    for arg in args:
                        if isinstance(arg, Tensor) and arg.requires_grad:
                            return record(*args)
                return compute(*args)

            return autograd

        self._recorded = recorded(self._function)
        _LIBRARY.impl(name, recorded(self.overload), "Autograd")

    def register_autocast(self, keep: tuple[int, ...] = ()) -> None:
        """Cast floating inputs to autocast's dtype, except at the positions in ``keep``.

        float64 tensors stay as they are, as in PyTorch.
        """
        for device_type in DEVICES:
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


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an ``Operator``."""
    return lambda function: Operator(name, function, schema)


def _is_plain_thread(excluded: int) -> bool:
    """Whether this thread, which excludes these keys, has nothing to do in the dispatcher."""
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    return not (
        included & ~_PLAIN_THREAD
        or _AUTOCAST & ~excluded
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
    )


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether arguments have nothing to do in the dispatcher but to be told their gradient."""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if torch._C._dispatch_keys(arg).raw_repr() & ~_PLAIN_TENSOR:
                return False
        elif kind not in _PLAIN_TYPES:
            return False
    return True


def _has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether a derivative is carried forward with one of them; it would be lost."""
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _casts(arg: Any, device_type: str) -> bool:
    return (
        isinstance(arg, Tensor)
        and arg.is_floating_point()
        and arg.dtype != torch.float64
        and arg.device.type == device_type
    )
