"""Whole networks to compare with: ours with the blocks of a peer, and diffusers' DiT."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from diffit.models import DiffusionNetwork, ImageDiffiT, LatentDiffiT
from diffit.nn import DiffiTBlock
from diffit_kernels import WindowAttentionProblem
from peers.layer import Peer, PeerBlock


class NetworkBlock(PeerBlock):
    """A peer's block where a network has ours; the grid is the one that it was made for."""

    def forward(
        self, x: Tensor, temb: Tensor, *, grid_size: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C)."""
        return super().forward(x, temb)


def blocks(network: DiffusionNetwork) -> Iterator[tuple[str, DiffiTBlock, WindowAttentionProblem]]:
    """Name, block and the problem of its attention, for one sample, of every block.

    Raises:
        ValueError: another network than those of the paper, or a block that is a variant.
    """
    for name, block in network.named_modules():
        if not isinstance(block, DiffiTBlock):
            continue
        if type(block) is not DiffiTBlock:
            raise ValueError(f"{name}: no peer is written for {type(block).__name__}")
        if isinstance(network, LatentDiffiT):
            grid = network.grid
        elif isinstance(network, ImageDiffiT):
            grid = network.img_resolution >> int(name.split(".")[1])  # encoder.LEVEL.…
        else:
            raise ValueError(f"no peer is written for {type(network).__name__}")
        weight = block.attn.qkv.weight
        problem = WindowAttentionProblem(
            batch=1,
            grid_size=(grid, grid),
            window_size=block.attn.window_size,
            num_heads=block.attn.num_heads,
            head_dim=block.attn.dim // block.attn.num_heads,
            dtype=weight.dtype,
            device_type=weight.device.type,
        )
        yield name, block, problem


def peer_network(network: DiffusionNetwork, peer: Peer) -> DiffusionNetwork:
    """A copy of the network with the peer's blocks in place of ours, on the same parameters."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    copy = deepcopy(network, memo=shared)  # id -> what stands for it
    for name, block, problem in list(blocks(network)):
        assert block.attn.temb_dim is not None
        peer_block = NetworkBlock(peer, problem, block.attn.temb_dim, block.state_dict())
        copy.set_submodule(name, peer_block.train(block.training))
    return copy


class DiffusersDiT(nn.Module):
    """diffusers' DiT in the size of a latent network, randomly initialised: its cost alone.

    Raises:
        ImportError: diffusers is missing.
    """

    def __init__(self, network: LatentDiffiT, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        attn = next(network.blocks.children()).attn
        assert isinstance(attn, nn.Module)
        heads = int(attn.num_heads)  # type: ignore[arg-type]
        self.num_classes = network.num_classes
        self.learn_sigma, self.out_channels = network.learn_sigma, network.out_channels
        self.in_channels, self.input_size = network.in_channels, network.input_size
        self.model = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
            num_attention_heads=heads,
            attention_head_dim=network.pos_embed.shape[-1] // heads,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            num_layers=len(network.blocks),
            sample_size=network.input_size,
            patch_size=network.patch_size,
            num_embeds_ada_norm=network.num_classes,
        )
        self.to(device, dtype).eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, in_channels, H, W), t (B,), y (B,) -> (B, out_channels, H, W)."""
        model: nn.Module = self.get_submodule("model")
        return model(x, timestep=t, class_labels=y, return_dict=False)[0]
