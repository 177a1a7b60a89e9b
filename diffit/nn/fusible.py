"""Whether an operator may compute a layer from its parameters, without calling it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def are_fusible(*layers: nn.Module | None) -> bool:
    """Whether these layers do no more than the operators that compute them.

    So do ``Linear``, norms over the last dimension without parameters, softmax, and dropout that is
    not active. Not so where an adapter (LoRA), a quantised layer or another module stands in the
    place of one, where it has hooks, or where its weight is computed or a quantised or distributed
    tensor: such a layer has to be called.
    """
    return all(layer is None or _is_fusible(layer) for layer in layers)


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


def _is_fusible(layer: Any) -> bool:
    if _is_hooked(layer):
        return False
    forward = getattr(type(layer), "forward", None)
    weight = layer.__dict__["_parameters"].get("weight", _ELSEWHERE)
    if forward is _LINEAR:
        if type(weight) is nn.Parameter:
            return True
        return weight is not _ELSEWHERE and not is_traceable_wrapper_subclass(weight)
    if forward is _NORM:
        return weight is None and len(layer.normalized_shape) == 1
    if forward is _DROPOUT:
        return not (layer.training and layer.p > 0)
    return forward is _IDENTITY or (forward is _SOFTMAX and layer.dim == -1)
