"""The attention layers of the real networks, as a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from diffit_kernels import WindowAttentionProblem

# A GPU is fed with larger batches than a processor.
CUDA_BATCHES = 8


@dataclass(frozen=True)
class Shape:
    """One attention layer of a network: a square grid of tokens cut into square windows."""

    name: str
    batch: int
    grid: int
    window: int
    dim: int
    num_heads: int
    temb_dim: int

    def problem(self, dtype: torch.dtype, device: torch.device) -> WindowAttentionProblem:
        """The problem that the operators and the peers solve."""
        return WindowAttentionProblem(
            batch=self.batch * (CUDA_BATCHES if device.type == "cuda" else 1),
            grid_size=(self.grid, self.grid),
            window_size=(self.window, self.window),
            num_heads=self.num_heads,
            head_dim=self.dim // self.num_heads,
            dtype=dtype,
            device_type=device.type,
        )


# Largest layers first: the time for compiled peers is spent in this order. Names of the image
# networks end in the grid of the stage; "-thin" is a stage of FFHQ-64 with half the channels.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("imagenet256", 4, 16, 16, 1152, 16, 1152),
        Shape("imagenet512", 1, 32, 32, 1152, 16, 1152),
        Shape("ffhq64-32", 8, 32, 8, 256, 8, 512),
        Shape("ffhq64-32-thin", 8, 32, 8, 128, 4, 512),
        Shape("cifar10-32", 16, 32, 4, 128, 4, 512),
        Shape("ffhq64-64", 8, 64, 8, 128, 4, 512),
        Shape("ffhq64-16", 8, 16, 8, 256, 8, 512),
        Shape("ffhq64-8", 8, 8, 8, 256, 8, 512),
        Shape("cifar10-16", 16, 16, 4, 256, 8, 512),
        Shape("cifar10-8", 16, 8, 4, 256, 8, 512),
    )
}
# One of each network, small enough for a minute.
QUICK = {
    "imagenet256": replace(SHAPES["imagenet256"], batch=1),
    "ffhq64-16": SHAPES["ffhq64-16"],
    "cifar10-8": SHAPES["cifar10-8"],
}
