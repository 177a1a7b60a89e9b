"""Small networks with the protocols of the real ones, computed element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def waves(i: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in the place of noise, float64."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    return torch.cos(1 + n * (2 + i))


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """No denoiser of any data, but one that is not linear: (B, C, H, W), (B,)."""
    s = sigma.view(-1, 1, 1, 1)
    return (x + 0.3 * s * torch.cos(x)) / (1 + s**2)


def gaussian_denoiser(deviation: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact one of data that is N(0, deviation^2)."""
    return lambda x, sigma: x * deviation**2 / (deviation**2 + sigma.view(-1, 1, 1, 1) ** 2)


def noise_and_range(x: Tensor, t: Tensor) -> Tensor:
    """In the place of a network that predicts noise and variance: (B, 2C, H, W)."""
    s = t.view(-1, 1, 1, 1).to(x.dtype) / 1000
    return torch.cat([torch.sin(x * (1 + s)) + 0.1 * s, torch.cos(3 * x - s)], dim=1)


class ToyLatent(nn.Module):
    """``LatentDiffiT``'s protocol, one parameter."""

    def __init__(self, num_classes: int = 6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.gain = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == self.gain.dtype
        assert x.shape[:1] == t.shape == y.shape
        self.batches.append(len(x))
        label = (1 + y.view(-1, 1, 1, 1)).to(x.dtype)
        return noise_and_range(self.gain * x + label / 7, t)


class ToyImage(nn.Module):
    """``ImageDiffiT``'s protocol, two parameters."""

    def __init__(self, label_dim: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 4, 2, label_dim
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.labels = nn.Parameter(torch.linspace(-1, 1, label_dim, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        assert x.dtype == self.gain.dtype
        assert noise_labels.shape == x.shape[:1]
        shift = noise_labels.to(x.dtype)
        if class_labels is not None:
            assert class_labels.shape == (len(x), self.label_dim)
            shift = shift + class_labels.to(x.dtype) @ self.labels
        if augment_labels is not None:
            shift = shift + augment_labels.to(x.dtype).sum(1)
        return torch.sin(self.gain * x + shift.view(-1, 1, 1, 1))
