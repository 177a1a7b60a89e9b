"""Small networks with weights that do something, and the networks' formulas written plainly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, gelu, layer_norm, linear, silu

from diffit.models import DDPMpp, ImageDiffiT, LatentDiffiT, ViTMLA
from diffit.nn import DiffiTBlock
from tests.published import parameters_of, published_tmsa

PICTURES = {"img_resolution": 12, "label_dim": 4, "augment_dim": 9, "temb_dim": 24}


def stirred(network: nn.Module, seed: int = 0) -> Any:
    """The network with noise on all parameters: heads and ends of branches start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.5 / max(parameter[0].numel(), 4) ** 0.5))
    return network.eval()


def small_latent(**options: Any) -> LatentDiffiT:
    """4 x 6 x 6 latents, 9 tokens of 16 channels, two blocks, five classes."""
    torch.manual_seed(0)
    sizes = {"input_size": 6, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return stirred(LatentDiffiT(**{**sizes, **options}))


def small_image(**options: Any) -> ImageDiffiT:
    """3 x 12 x 12 pictures, two resolutions, windows of 3, four classes, augmentation labels."""
    torch.manual_seed(0)
    sizes = {"channels": (16, 32), "depths": (1, 2), "head_dim": 8, "window_size": 3}
    return stirred(ImageDiffiT(**{**PICTURES, **sizes, **options}))


def small_vit(**options: Any) -> ViTMLA:
    """The same pictures; 16 tokens of 16 channels, four blocks."""
    torch.manual_seed(0)
    sizes = {"patch_size": 3, "hidden_size": 16, "depth": 4, "num_heads": 2, "decoder_width": 16}
    return stirred(ViTMLA(**{**PICTURES, **sizes, **options}))


def small_ddpmpp(**options: Any) -> DDPMpp:
    """The same pictures; two resolutions, attention at the lower."""
    torch.manual_seed(0)
    sizes = {"stem_channels": 8, "channels": (16, 24), "num_blocks": 1, "attn_resolutions": (6,)}
    return stirred(DDPMpp(**{**PICTURES, **sizes, **options}))


def latent_inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, t and y of ``small_latent``; the last y is no class."""
    x = torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, torch.tensor([0, 417, 999, 1, 2][:batch]), torch.tensor([4, 0, 5, 1, 2][:batch])


def image_inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, noise_labels, class_labels and augment_labels of ``small_image`` and the like."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 12, 12, generator=generator)
    noise = torch.randn(batch, generator=generator)
    classes = torch.eye(5)[torch.arange(batch) % 5, :4]
    augment = torch.randn(batch, 9, generator=generator)
    return tuple(tensor.to(dtype) for tensor in (x, noise, classes, augment))


def plain_block(block: DiffiTBlock, x: Tensor, temb: Tensor, grid: tuple[int, int]) -> Tensor:
    """``x = x + TMSA(LN(x), temb)``, ``x = x + MLP(LN(x))``, operation by operation."""
    x = x + published_tmsa(
        layer_norm(x, x.shape[-1:], eps=1e-6),
        temb,
        **parameters_of(block.attn),
        num_heads=block.attn.num_heads,
        window_size=block.attn.window_size,
        grid_size=grid,
    )
    mlp = block.mlp
    hidden = linear(layer_norm(x, x.shape[-1:], eps=1e-6), mlp.fc1.weight, mlp.fc1.bias)
    return x + linear(gelu(hidden, approximate="tanh"), mlp.fc2.weight, mlp.fc2.bias)


def plain_latent(network: LatentDiffiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The latent network from the names and shapes of its state dict alone."""
    state = network.state_dict()
    patch, grid = network.patch_size, network.grid
    f = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    angles = t.float()[:, None] * f
    c = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    c = linear(c, state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"])
    c = linear(silu(c), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])
    c = c + embedding(y, state["y_embedder.embedding_table.weight"])
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens = conv2d(x, weight, bias, stride=patch).flatten(2).mT + state["pos_embed"]
    for block in network.blocks:
        tokens = plain_block(block, tokens, c, (grid, grid))
    tokens = silu(layer_norm(tokens, tokens.shape[-1:], eps=1e-6))
    out = linear(tokens, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    picture = out.new_empty(len(x), network.out_channels, network.input_size, network.input_size)
    for token in range(grid**2):
        row, column = divmod(token, grid)
        for i in range(patch):
            for j in range(patch):
                start = (i * patch + j) * network.out_channels
                picture[:, :, row * patch + i, column * patch + j] = out[
                    :, token, start : start + network.out_channels
                ]
    return picture
