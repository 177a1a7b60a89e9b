"""EDM's non-leaking augmentation: the network is told what was done (Karras 2022, appendix F.2).

With probability ``p`` each, in this order: a flip upside down or not, scaling by ``2^(0.2 a)``, a
turn, stretching by ``2^(0.2 a)`` along one direction and the inverse across it, and a shift by an
eighth of the picture times a; a ~ N(0, 1), angles uniform. The flip left to right is a fair coin,
whatever p is. Flips move pixels; the rest is one bicubic resampling with reflection at the
border, where EDM filters with a wavelet.

The label, 0 where nothing was done::

    0      flipped left to right, 0 or 1
    1      flipped upside down, 0 or 1
    2      a of scaling
    3, 4   cos(angle) - 1 and sin(angle) of the turn
    5, 6   a cos(direction) and a sin(direction) of stretching
    7, 8   a of the shift to the right and down

Stretching by a along a direction and by -a along its opposite share a label, as in EDM.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

AUGMENT_DIM = 9
NUMBERS = 13  # that are drawn for each image
SCALE_STD = STRETCH_STD = 0.2  # of the binary logarithm
SHIFT_STD = 1 / 8  # of the picture


def augment(images: Tensor, numbers: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Augment a batch, each image by its own random numbers.

    Args:
        images: (B, C, H, W), square, float.
        numbers: (B, 13), normal.
        p: probability of each augmentation.

    Returns:
        (B, C, H, W), and the labels (B, 9), float32.
    """
    numbers = numbers.double()
    coin = torch.special.ndtr(numbers[:, :9])  # uniform in 0..1
    gate = (coin[:, :5] < p).double()
    angle, direction = ((2 * coin[:, i] - 1) * math.pi for i in (7, 8))
    normal = numbers[:, 9:]

    flip_x = (coin[:, 5] < 0.5).double()
    flip_y = (coin[:, 6] < 0.5).double() * gate[:, 0]
    scale, turn, stretch = normal[:, 0] * gate[:, 1], angle * gate[:, 2], normal[:, 1] * gate[:, 3]
    shift = normal[:, 2:] * gate[:, 4:]
    labels = torch.stack(
        [
            flip_x,
            flip_y,
            scale,
            turn.cos() - 1,
            turn.sin(),
            stretch * direction.cos(),
            stretch * direction.sin(),
            shift[:, 0],
            shift[:, 1],
        ],
        dim=1,
    )
    images = _flip(_flip(images, flip_x, 3), flip_y, 2)
    moved = gate[:, 1:].any(1)
    if moved.any():
        where_from = _where_from(scale, turn, stretch, direction, shift)[moved]
        images = images.clone()
        images[moved] = _resample(images[moved], where_from)
    return images, labels.float()


def _flip(images: Tensor, which: Tensor, dim: int) -> Tensor:
    rows = which.nonzero()[:, 0]
    return images.index_copy(0, rows, images[rows].flip(dim)) if len(rows) else images


def _where_from(
    scale: Tensor, turn: Tensor, stretch: Tensor, direction: Tensor, shift: Tensor
) -> Tensor:
    """(B, 2, 3): from a point of the result to where it was, coordinates -1..1, y down.

    A point goes to ``stretch turn scale x + shift``; this is the inverse.
    """
    factor = torch.exp2(-SCALE_STD * scale)[:, None, None]
    along = torch.exp2(-STRETCH_STD * stretch)
    squeeze = torch.diag_embed(torch.stack([along, 1 / along], dim=1))
    axes = _rotation(direction)
    linear = factor * _rotation(-turn) @ axes @ squeeze @ axes.mT
    offset = -linear @ (2 * SHIFT_STD * shift)[:, :, None]
    return torch.cat([linear, offset], dim=2)


def _rotation(angle: Tensor) -> Tensor:
    """(B,) -> (B, 2, 2), from the x axis towards the y axis."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], dim=1), torch.stack([s, c], dim=1)], dim=1)


def _resample(images: Tensor, where_from: Tensor) -> Tensor:
    grid = affine_grid(where_from.to(images.dtype), list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
