"""Whether an operator may compute a layer from its parameters, without calling it."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def are_fusible(*layers: nn.Module | None) -> bool:
    """Whether parameters tell all that these layers do: plain ``Linear``, norms without parameters.

    Not so where an adapter (LoRA), a quantised layer or another module stands in the place of one,
    where it has hooks, or where its weight is a quantised or distributed tensor: such a layer has
    to be called.
    """
    return all(layer is None or _is_fusible(layer) for layer in layers)


def _is_fusible(layer: nn.Module) -> bool:
    own = layer.__dict__  # faster than attributes, which modules look for in several places
    if (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    ):
        return False
    forward, weight = type(layer).forward, own["_parameters"].get("weight")
    if forward is nn.LayerNorm.forward:
        return weight is None
    if forward is not nn.Linear.forward:
        return False
    return type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(layer.weight)
