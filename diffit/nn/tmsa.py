"""Time-dependent multi-head self-attention as a layer."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diffit.nn.fusible import are_idle, are_linear, is_softmax
from diffit_kernels import relative_position_index, tmsa
from diffit_kernels.ops import autocast
from diffit_kernels.ops.tmsa import attend_with_row
from diffit_kernels.ops.window_attention import as_grid, as_pair
from diffit_kernels.problem import (
    Described,
    WindowAttentionProblem,
    remembered,
    require_like,
    require_shape,
    shape,
)
from diffit_kernels.reference.window_attention import partition, unpartition


@remembered
def _check(
    x: Described,
    temb: Described | None,
    row: Described | None,
    weight: Described | None,
    cast: bool,
    dim: int,
    temb_dim: int | None,
) -> None:
    """Of what a layer is called with; ``weight`` has their device and, without ``cast``, dtype."""
    if len(x.shape) != 3 or x.shape[-1] != dim or x.shape[0] == 0:
        raise ValueError(
            f"x: expected (B, L, {dim}) with at least one sample, got shape {shape(x)}"
        )
    if weight is not None:
        for name, tensor in (("x", x), ("temb", temb), ("row", row)):
            if tensor is not None:
                require_like(name, tensor, tensor.dtype if cast else weight.dtype, weight)
    batch, tokens, _ = x.shape
    if row is not None:
        if temb is not None:
            raise ValueError("row: it stands in place of temb, got both")
        if len(row.shape) != 2 or row.shape[0] == 0 or batch % row.shape[0]:
            raise ValueError(
                f"row: expected (B, {3 * dim}) with B = {batch} or a divisor of it, "
                f"got shape {shape(row)}"
            )
        require_shape("row", row, (row.shape[0], 3 * dim))
    if temb is None:
        return
    if temb_dim is None:
        raise ValueError("temb: this layer was made without temb_dim and takes no time token")
    if len(temb.shape) not in (2, 3) or temb.shape[-1] != temb_dim:
        raise ValueError(
            f"temb: expected (B, {temb_dim}) or (B, L, {temb_dim}), got shape {shape(temb)}"
        )
    if len(temb.shape) == 3 and temb.shape[1] not in (1, tokens):
        raise ValueError(
            f"temb: expected one token or L = {tokens} of them per sample, got shape {shape(temb)}"
        )
    per_position = len(temb.shape) == 3 and temb.shape[1] > 1
    samples = temb.shape[0]
    if not (samples == batch if per_position else samples > 0 and batch % samples == 0):
        raise ValueError(
            f"temb: expected {batch} samples or a divisor of it, got shape {shape(temb)}"
        )


class TMSA(nn.Module):
    """Windowed self-attention whose q, k and v see the spatial tokens and a time token.

    ``q, k, v = x W_s + b_s + temb W_t + b_t``, ``softmax(q k^T d**-0.5 + B) v`` in each window,
    output projection (DiffiT, equations 3 to 6). No residual, no norm.

    Args:
        dim: channels C, divisible by ``num_heads``.
        num_heads: attention heads.
        temb_dim: width T of the time token; None: the layer takes no token.
        window_size: tokens of a window, (wh, ww) or one number for both. A window may be the
            whole grid.
        qkv_bias: whether the projections of tokens and time token have a bias.
        rel_pos_bias: whether there is a relative position bias.
        attn_drop: dropout of the attention probabilities.
        proj_drop: dropout of the output.
        device, dtype: of the parameters.

    The fused operator runs wherever the algebra holds. Active attention dropout, a time token
    per position and ``return_attention`` take the plain formula, with the same result. Projections
    that are more than their parameters, with an adapter or a hook, are called.
    """

    relative_position_bias_table: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        temb_dim: int | None = None,
        window_size: int | tuple[int, int],
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if not isinstance(value, Integral):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        if temb_dim is not None and temb_dim < 1:
            raise ValueError(f"temb_dim: expected a positive integer or None, got {temb_dim}")
        window = as_pair("window_size", window_size)
        if min(window) < 1:
            raise ValueError(f"window_size: expected positive integers, got {window}")
        self.dim = dim
        self.num_heads = num_heads
        self.temb_dim = temb_dim
        self.window_size = window
        self.scale = (dim // num_heads) ** -0.5

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.qkv_temb = (
            None if temb_dim is None else nn.Linear(temb_dim, 3 * dim, bias=qkv_bias, **factory)
        )
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = (
            nn.Parameter(torch.empty(rows, num_heads, **factory)) if rel_pos_bias else None
        )
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as PyTorch's default; the bias table normal with deviation 0.02."""
        for layer in (self.qkv, self.qkv_temb, self.proj):
            if layer is not None:
                layer.reset_parameters()
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        *,
        row: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend inside the windows.

        Args:
            x: (B, L, C), tokens in row-major order of the grid; or (windows * B, M, C),
                partitioned, windows of a sample adjacent.
            temb: (B, T) or (B, 1, T), one token per sample; (B, L, T), one per position; or None:
                plain relative-position-biased attention.
            row: (B, 3C), ``qkv_temb(temb)`` computed elsewhere, in place of ``temb``:
                ``diffit_kernels.time_rows`` gives those of all layers by one product.
            grid_size: (H, W) with H * W = L. Default: the window if it has L tokens, else a
                square.
            return_attention: also return the attention probabilities.

        Returns:
            (B, L, C); with ``return_attention`` also (B * windows, heads, M, M).

        Raises:
            TypeError, ValueError: an input that does not fit, naming it.
        """
        qkv, qkv_temb, proj = self.qkv, self.qkv_temb, self.proj
        weight = qkv.weight if are_linear(qkv) else None
        self.check(x, temb, row, weight)
        if temb is not None and temb.dim() == 3 and temb.shape[1] == 1:
            temb = temb[:, 0]
        per_position = temb is not None and temb.dim() == 3
        by_operator = not (return_attention or per_position)
        by_operator = by_operator and is_softmax(self.softmax) and are_idle(self.attn_drop)
        if by_operator and weight is not None and are_linear(qkv_temb, proj):
            token = None if temb is None else qkv_temb
            out = tmsa(
                x,
                temb,
                weight,
                qkv.bias,
                None if token is None else token.weight,
                None if token is None else token.bias,
                self.relative_position_bias_table,
                proj.weight,
                proj.bias,
                num_heads=self.num_heads,
                window_size=self.window_size,
                grid_size=grid_size,
                scale=self.scale,
                row=row,
            )
            return out if are_idle(self.proj_drop) else self.proj_drop(out)

        packed = qkv(x)
        if temb is not None and qkv_temb is not None:
            row = qkv_temb(temb)
        attention: Any = None
        if by_operator:
            out = attend_with_row(
                packed,
                row,
                self.relative_position_bias_table,
                num_heads=self.num_heads,
                window_size=self.window_size,
                grid_size=grid_size,
                scale=self.scale,
            )
        else:
            if row is not None and not per_position:
                row = row.repeat_interleave(x.shape[0] // row.shape[0], dim=0)[:, None]
            out, attention = self._attend(packed if row is None else packed + row, grid_size)
        out = self.proj_drop(proj(out))
        return (out, attention) if return_attention else out

    def check(
        self, x: Tensor, temb: Tensor | None, row: Tensor | None, weight: Tensor | None
    ) -> None:
        """Raise what ``forward`` would; ``weight`` is that of qkv, where it is computed with."""
        cast = weight is not None and autocast.is_active(weight)
        _check(x, temb, row, weight, cast, self.dim, self.temb_dim)

    def _attend(self, qkv: Tensor, grid_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """The formula as written, with its (B * windows, heads, M, M) probabilities."""
        problem = WindowAttentionProblem.from_tensors(
            qkv,
            None,
            None,
            None,
            self.num_heads,
            self.window_size,
            as_grid(grid_size, qkv.shape[1], self.window_size),
            self.scale,
        )
        q, k, v = partition(problem, qkv, 3)
        logits = (q @ k.transpose(-1, -2)) * self.scale
        if self.relative_position_bias_table is not None:
            index = relative_position_index(self.window_size).to(qkv.device)
            bias = self.relative_position_bias_table[index].permute(2, 0, 1)
            logits = logits + bias.to(logits.dtype)
        attention = self.softmax(logits)
        out = unpartition(problem, (self.attn_drop(attention) @ v)[None])
        return out, attention.flatten(0, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Published weights store this constant; it is accepted and not kept.
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"


class TMSA2d(TMSA):
    """``TMSA`` on feature maps: (B, C, H, W), temb (B, T) -> (B, C, H, W), channels last."""

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend inside the windows of the map; H and W are multiples of the window."""
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        result: Any = super().forward(
            x.flatten(2).transpose(1, 2),
            temb,
            grid_size=(height, width),
            return_attention=return_attention,
        )
        out, *attention = result if return_attention else (result,)
        out = out.transpose(1, 2).unflatten(2, (height, width))
        return (out, *attention) if return_attention else out
