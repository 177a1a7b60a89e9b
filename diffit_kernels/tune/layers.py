"""What is tuned: the transformer blocks of the networks, and the parameters that are tried."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from diffit_kernels.triton.configs import CUBLASLT, Config


@dataclass(frozen=True)
class Layer:
    """A transformer block on a square grid of tokens, in batches that feed a GPU."""

    batch: int
    grid: int
    window: int
    num_heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        """Channels C."""
        return self.num_heads * self.head_dim


# The most important first. Blocks that share windows and widths differ in their MLP and norm.
LAYERS = (
    Layer(32, 16, 16, 16, 72),  # latent XL/2 at 256 x 256
    Layer(8, 32, 32, 16, 72),  # latent XL/2 at 512 x 512
    Layer(64, 32, 8, 8, 32),  # FFHQ-64
    Layer(128, 32, 4, 4, 32),  # CIFAR-10
    Layer(32, 16, 16, 16, 64),  # latent L/2
    Layer(1, 16, 16, 16, 72),  # one picture
    Layer(32, 16, 16, 12, 64),  # latent B/2
    Layer(32, 16, 16, 6, 64),  # latent S/2
)

# By operator, the most important first. "cuda": whether the CUDA C++ kernels are faster.
CUDA = "cuda"
KERNELS = {
    "window_attention": (
        *("small_forward", "small_backward", "large_forward"),
        *("large_backward_q", "large_backward_kv", "large_backward_table"),
        *("small_forward_in_parts", "large_forward_in_parts", CUDA),
    ),
    "mlp": ("mlp_gelu", "mlp_bias", "mlp_gelu_hidden", "mlp_gelu_backward"),
    "add_layer_norm": ("add_layer_norm", "add_layer_norm_backward"),
}


def _grid(**values: tuple[int, ...]) -> list[Config]:
    """Every combination."""
    return [dict(zip(values, numbers, strict=True)) for numbers in product(*values.values())]


def _tiles(*tiles: tuple[int, int, int, int]) -> list[Config]:
    """From tiles of queries and keys, warps and stages."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


def _products() -> list[Config]:
    """From tiles of rows, columns and sums, warps and stages."""
    tiles = [
        *((64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3)),
        *((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3)),
    ]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [{**dict(zip(names, tile, strict=True)), "GROUP": 8} for tile in tiles] + [CUBLASLT]


def candidates(kernel: str, itemsize: int) -> list[Config]:
    """The parameters that are tried."""
    half = itemsize == 2
    products = _products()
    rows = _grid(ROWS=(1, 2, 4), num_warps=(4, 8)) + _grid(ROWS=(16,), num_warps=(4, 8))
    return {
        "small_forward": _grid(WINDOWS=(2, 4, 8), num_warps=(4, 8), num_stages=(1,))
        + _grid(WINDOWS=(1,), num_warps=(2, 4), num_stages=(1,)),
        "small_backward": _grid(WINDOWS=(1, 2, 4), num_warps=(4, 8), num_stages=(1,))
        + _grid(WINDOWS=(1,), num_warps=(8,), num_stages=(2,)),
        "large_forward": _tiles((128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (64, 32, 4, 2))
        + _tiles((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2)),
        "large_backward_q": _tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3))
        + _tiles((64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2))
        if half
        else _tiles((16, 16, 8, 1), (32, 16, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
        "large_backward_kv": _tiles((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3))
        + _tiles((32, 64, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2))
        if half
        else _tiles((16, 16, 8, 1), (16, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
        "large_backward_table": _tiles((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1))
        + _tiles((64, 32, 4, 1), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2))
        if half
        else _tiles((32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 8, 1), (64, 64, 8, 1)),
        "small_forward_in_parts": _grid(WINDOWS=(1, 4), num_warps=(4, 8), num_stages=(1,)),
        "large_forward_in_parts": _tiles((64, 32, 4, 2), (64, 32, 4, 3))
        + _tiles((64, 16, 4, 2), (128, 32, 8, 2)),
        "mlp_gelu": products,
        "mlp_bias": products,
        "mlp_gelu_hidden": products,
        "mlp_gelu_backward": products,
        "add_layer_norm": rows,
        "add_layer_norm_backward": rows,
    }[kernel]
