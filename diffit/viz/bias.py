"""The relative position bias that a network has learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffit.nn import TMSA


def bias_tables(network: nn.Module) -> dict[str, NDArray[np.float64]]:
    """By name of the layer: (heads, 2 wh - 1, 2 ww - 1).

    Entry (dy + wh - 1, dx + ww - 1) is added to the logit of a query at (y, x) and a key at
    (y - dy, x - dx).
    """
    tables = {}
    for name, layer in network.named_modules():
        if isinstance(layer, TMSA) and layer.relative_position_bias_table is not None:
            wh, ww = layer.window_size
            table = layer.relative_position_bias_table.detach().double().cpu()
            tables[name] = table.T.unflatten(1, (2 * wh - 1, 2 * ww - 1)).numpy()
    return tables
