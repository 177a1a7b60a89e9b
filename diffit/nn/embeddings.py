"""Embeddings of time, class and position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """``[cos(t f), sin(t f)]`` with ``f = 10000 ** (-k / (dim / 2))``: (B,) -> (B, dim), float32.

    Vaswani et al. 2017, section 3.5, in the order and with the frequencies of ADM.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(k * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(grid: int, dim: int) -> Tensor:
    """Fixed embedding of the positions of a square grid: (grid * grid, dim), float32.

    The first half of the channels comes from x, the second from y, each ``[sin, cos]`` of
    ``position * 10000 ** (-k / (dim / 4))``. Computed in float64.
    """
    k = torch.arange(dim // 4, dtype=torch.float64, device="cpu")
    angles = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * MAX_PERIOD ** (
        -k / (dim // 4)
    )
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, dim / 2)
    x, y = line.expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1).float()


def _dtype(layer: nn.Module) -> torch.dtype:
    """That of the weights, or of biases where the weights are quantised."""
    dtypes = (parameter.dtype for parameter in layer.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class FourierEmbedding(nn.Module):
    """``[cos(2 pi t f), sin(2 pi t f)]``, f ~ N(0, 16^2) drawn once: (B,) -> (B, dim), float32.

    Tancik et al. 2020, with the deviation of NCSN++ (Song et al. 2021).
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(dim // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new frequencies."""
        nn.init.normal_(self.frequencies, std=16.0)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, dim)."""
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies.float()
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """``mlp(sinusoidal_embedding(t))``: (B,) -> (B, dim), in the dtype of the weights."""

    WIDTH = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.WIDTH, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, dim)."""
        return self.mlp(sinusoidal_embedding(t, self.WIDTH).to(_dtype(self.mlp)))


class LabelEmbedder(nn.Module):
    """A row per class and one for no class, which replaces labels while training.

    Args:
        num_classes: classes; ``num_classes`` itself is the label that means none.
        dim: width of a row.
        dropout: probability that a label is replaced, for classifier-free guidance.
    """

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """labels (B,) int64 in 0..num_classes -> (B, dim)."""
        if self.training and self.dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class NoiseEmbedder(nn.Module):
    """The time token of the image networks: noise level, class and augmentation (EDM, appendix C).

    ``token = silu(fc2(silu(fc1(embed(c_noise) + W_class y sqrt(classes) + W_augment a))))``.

    Args:
        width: channels of the embedding of the noise level.
        temb_dim: channels of the token.
        label_dim: classes, 0: none.
        augment_dim: numbers that tell how the picture was augmented, 0: none.
        label_dropout: probability that a label is zeroed while training, for guidance.
        fourier: random Fourier features instead of the sinusoidal embedding.
    """

    def __init__(
        self,
        width: int,
        temb_dim: int,
        *,
        label_dim: int,
        augment_dim: int,
        label_dropout: float,
        fourier: bool,
    ) -> None:
        super().__init__()
        self.width = width
        self.label_dropout = label_dropout
        self.fourier = FourierEmbedding(width) if fourier else None
        self.label = nn.Linear(label_dim, width) if label_dim else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.mlp = nn.Sequential(
            nn.Linear(width, temb_dim), nn.SiLU(), nn.Linear(temb_dim, temb_dim), nn.SiLU()
        )

    def forward(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """(B,), (B, label_dim), (B, augment_dim) -> (B, temb_dim); None counts as zeros."""
        dtype = _dtype(self.mlp)
        if self.fourier is None:
            x = sinusoidal_embedding(noise_labels, self.width).to(dtype)
        else:
            x = self.fourier(noise_labels).to(dtype)
        if self.label is not None:
            if class_labels is None:
                class_labels = x.new_zeros(1, self.label.in_features)
            class_labels = class_labels.to(dtype)
            if self.training and self.label_dropout > 0:
                keep = torch.rand(len(class_labels), 1, device=x.device) >= self.label_dropout
                class_labels = class_labels * keep
            x = x + self.label(class_labels * math.sqrt(self.label.in_features))
        if self.augment is not None and augment_labels is not None:
            x = x + self.augment(augment_labels.to(dtype))
        return self.mlp(x)
