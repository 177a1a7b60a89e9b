"""The exponential moving average of the weights, from which one samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """The average of every parameter, sharded as the parameter is.

    Attributes:
        averages: by the name of the parameter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.averages = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, beta: float) -> None:
        """``average = beta average + (1 - beta) parameter``."""
        # In few launches: one for each parameter is most of what a small network waits for.
        named = dict(network.named_parameters())
        averages = [self.averages[name] for name in named]
        parameters = [parameter.detach() for parameter in named.values()]
        torch._foreach_lerp_(averages, parameters, 1 - beta)

    def state_dict(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's state with averages for parameters, whole, on the CPU.

        Every process has to call it where the parameters are sharded.
        """
        return {
            name: whole(self.averages.get(name, tensor)).cpu()
            for name, tensor in network.state_dict().items()
        }


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a shard."""
    full = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor.detach() if full is None else full().detach()
    return result
