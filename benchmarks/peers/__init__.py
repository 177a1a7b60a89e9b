"""What the fused operators are compared with: the ways to run the layer in PyTorch alone."""

from peers import compiled, eager, flex, sdpa
from peers.layer import Peer, PeerBlock, peer_attention

PEERS = (eager.PEER, sdpa.PEER, *compiled.PEERS, flex.PEER)

__all__ = ["PEERS", "Peer", "PeerBlock", "peer_attention"]
