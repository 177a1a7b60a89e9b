"""``torch.compile`` of the eager layer, and of the layer with SDPA."""

from __future__ import annotations

import torch._functorch.config

from peers import eager, sdpa
from peers.layer import Peer

# The backward pass is timed repeatedly on one graph, whose buffers must survive it.
torch._functorch.config.donated_buffer = False

PEERS = (
    Peer("compile", eager.attend, compiled=True),
    Peer("compile-sdpa", sdpa.attend, compiled=True),
)
