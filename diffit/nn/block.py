"""The transformer block of DiffiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from diffit.nn.fusible import are_idle, are_linear, are_norms, are_unhooked, is_softmax
from diffit.nn.tmsa import TMSA
from diffit_kernels import add_layer_norm, layer_norm, mlp
from diffit_kernels.block import Weights
from diffit_kernels.ops.block import block, is_fused


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear, plus a residual if one is given: (..., dim) -> (..., dim)."""

    def __init__(
        self,
        dim: int,
        hidden_features: int,
        *,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Dropout after both layers, as in timm; without it the fused operator runs.

        Layers that are more than their parameters, with an adapter or a hook, are called instead.
        """
        fc1, fc2 = self.fc1, self.fc2
        fused = are_linear(fc1, fc2) and are_idle(self.drop)
        if fused and fc1.bias is not None and fc2.bias is not None:
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)
        y = self.drop(fc2(self.drop(gelu(fc1(x), approximate="tanh"))))
        return y if residual is None else residual + y


class DiffiTBlock(nn.Module):
    """``x = x + TMSA(LN(x), temb)``, ``x = x + MLP(LN(x))`` (DiffiT, equations 7 and 8).

    Args:
        dim: channels C.
        num_heads: attention heads.
        temb_dim: width T of the time token, or None for a block without one.
        window_size: tokens of an attention window, (wh, ww) or one number for both.
        mlp_ratio: width of the hidden layer over C.
        qkv_bias, rel_pos_bias, attn_drop, proj_drop: as in ``TMSA``; ``proj_drop`` also acts in
            the MLP.
        device, dtype: of the parameters.

    The layer norms have eps 1e-6 and no parameters, as the published weights expect.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        temb_dim: int | None = None,
        window_size: int | tuple[int, int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = int(dim * mlp_ratio)
        if hidden_features < 1:
            raise ValueError(f"mlp_ratio: expected at least 1 / dim = 1 / {dim}, got {mlp_ratio}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.attn = TMSA(
            dim,
            num_heads,
            temb_dim=temb_dim,
            window_size=window_size,
            qkv_bias=qkv_bias,
            rel_pos_bias=rel_pos_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **factory,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.mlp = MLP(dim, hidden_features, drop=proj_drop, **factory)

    def forward(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        *,
        row: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """x (B, L, C), temb (B, T) -> (B, L, C); ``row`` and ``grid_size`` as in ``TMSA``."""
        fused = self._fused(x, temb, row, grid_size)
        if fused is not None:
            return fused
        attention = self.attn(self.normed(x), temb, row=row, grid_size=grid_size)
        x, normed = self.add_normed(x, attention)
        return self.mlp(normed, residual=x)

    def _fused(
        self,
        x: Tensor,
        temb: Tensor | None,
        row: Tensor | None,
        grid_size: tuple[int, int] | None,
    ) -> Tensor | None:
        """The result by one operator, or None where layers are to be called or none takes them."""
        attn, perceptron, kind = self.attn, self.mlp, type(self)
        methods = (kind.normed, kind.add_normed, type(attn).forward, type(perceptron).forward)
        # Compilers know neither this processor nor the rows.
        if torch.compiler.is_compiling() or methods != _METHODS:
            return None
        qkv, token, proj, norm1, norm2 = attn.qkv, attn.qkv_temb, attn.proj, self.norm1, self.norm2
        fc1, fc2 = perceptron.fc1, perceptron.fc2
        if not (
            isinstance(x, Tensor)
            and all(_is_for_each_sample(entry, x) for entry in (temb, row))
            and are_unhooked(attn, perceptron)
            and are_norms(norm1, norm2)
            and are_linear(qkv, token, proj, fc1, fc2)
            and is_softmax(attn.softmax)
            and are_idle(attn.attn_drop, attn.proj_drop, perceptron.drop)
        ):
            return None
        b1, b2 = fc1.bias, fc2.bias
        if b1 is None or b2 is None:
            return None
        weights = Weights(
            qkv.weight,
            qkv.bias,
            None if token is None else token.weight,
            None if token is None else token.bias,
            attn.relative_position_bias_table,
            proj.weight,
            proj.bias,
            fc1.weight,
            b1,
            fc2.weight,
            b2,
        )
        if not is_fused(x, weights, attn.num_heads, attn.window_size):
            return None
        attn.check(x, temb, row, weights.qkv)
        return block(
            x,
            temb,
            row,
            weights,
            num_heads=attn.num_heads,
            window_size=attn.window_size,
            grid_size=grid_size,
            scale=attn.scale,
            eps=(norm1.eps, norm2.eps),
        )

    def normed(self, x: Tensor) -> Tensor:
        """``norm1(x)``."""
        return layer_norm(x, self.norm1.eps) if are_norms(self.norm1) else self.norm1(x)

    def add_normed(self, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, and ``norm2`` of it."""
        if are_norms(self.norm2):
            return add_layer_norm(x, attention, self.norm2.eps)
        x = x + attention
        return x, self.norm2(x)


def _is_for_each_sample(entry: Tensor | None, x: Tensor) -> bool:
    if entry is None:
        return True
    return isinstance(entry, Tensor) and entry.dim() == 2 and entry.shape[0] == x.shape[0]


# What derived classes, as those of FSDP2, leave as it is, and nobody has patched.
_METHODS = (DiffiTBlock.normed, DiffiTBlock.add_normed, TMSA.forward, MLP.forward)
