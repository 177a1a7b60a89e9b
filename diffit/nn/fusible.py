"""Whether an operator may compute a layer from its parameters, without calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def are_linear(*layers: nn.Module | None) -> bool:
    """Whether these are linear layers that do no more than multiply and add, or None.

    Not so where an adapter (LoRA), a quantised layer or another module stands in the place of one,
    where it has hooks, or where its weight is computed or a quantised or distributed tensor: such a
    layer has to be called.
    """
    return all(layer is None or (_runs(layer, _LINEAR) and _has_weight(layer)) for layer in layers)


def are_norms(*layers: Any) -> bool:
    """Whether these are layer norms over the last dimension without parameters."""
    return all(
        _runs(layer, _NORM)
        and layer.__dict__["_parameters"].get("weight", _ELSEWHERE) is None
        and layer.__dict__["_parameters"].get("bias", _ELSEWHERE) is None
        and len(layer.normalized_shape) == 1
        for layer in layers
    )


def are_idle(*dropouts: Any) -> bool:
    """Whether these return what they get."""
    return all(
        _runs(layer, _IDENTITY) or (_runs(layer, _DROPOUT) and not (layer.training and layer.p > 0))
        for layer in dropouts
    )


def is_softmax(layer: Any) -> bool:
    """Whether this is a softmax over the last dimension and nothing else."""
    return _runs(layer, _SOFTMAX) and layer.dim == -1


def are_unhooked(*layers: nn.Module) -> bool:
    """Whether a call of these layers would run the forward of their classes and nothing else."""
    return not (_has_any_global_hook() or any(_is_hooked(layer) for layer in layers))


def _is_hooked(layer: nn.Module) -> bool:
    own = layer.__dict__  # faster than attributes, which modules look for in several places
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


_ELSEWHERE = object()  # where a weight is that is computed in each access, or put in place later
# What PyTorch computes, whatever patches its classes later.
_LINEAR, _NORM, _SOFTMAX, _DROPOUT, _IDENTITY = (
    kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Softmax, nn.Dropout, nn.Identity)
)


def _runs(layer: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a call of the layer would run this function and nothing else."""
    return getattr(type(layer), "forward", None) is forward and not _is_hooked(layer)


def _has_weight(layer: nn.Module) -> bool:
    weight = layer.__dict__["_parameters"].get("weight", _ELSEWHERE)
    if type(weight) is nn.Parameter:
        return True
    return weight is not _ELSEWHERE and not is_traceable_wrapper_subclass(weight)
