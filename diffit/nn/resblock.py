"""The residual block of the image networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

NORM_EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least four channels."""
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"channels: expected a multiple of min(32, channels / 4) groups, got {channels}"
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class DiffiTResBlock(nn.Module):
    """``h = Conv3x3(Swish(GN(x)))``, ``Block(h, temb) + x`` (DiffiT, equations 9 and 10).

    Args:
        in_channels: channels of x; where they differ from ``dim``, a 1x1 convolution brings x to
            the sum.
        dim: channels of the result.
        block: takes tokens (B, L, dim), the token and ``grid_size``: a ``DiffiTBlock`` or a
            variant of it.
        dropout: of what enters the convolution, as in EDM.
    """

    def __init__(
        self, in_channels: int, dim: int, block: nn.Module, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.block = block
        self.shortcut = nn.Identity() if in_channels == dim else nn.Conv2d(in_channels, dim, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, in_channels, H, W), temb (B, T) -> (B, dim, H, W)."""
        hidden = self.conv(self.dropout(silu(self.norm(x))))
        tokens = hidden.permute(0, 2, 3, 1).flatten(1, 2)  # no copy where channels come last
        tokens = self.block(tokens, temb, grid_size=tuple(hidden.shape[2:]))
        return tokens.unflatten(1, hidden.shape[2:]).permute(0, 3, 1, 2) + self.shortcut(x)
