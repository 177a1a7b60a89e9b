"""timm's Swin Transformers on the fused window attention: weights and their names stay.

model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
accelerate(model)
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from diffit.nn.fusible import are_linear
from diffit_kernels.ops.tmsa import attend_with_row

_logger = logging.getLogger(__name__)


class _Split(NamedTuple):
    """Which windows of an image a mask touches."""

    mask: Tensor  # (windows, N, N), the mask itself: another tensor is another mask
    free: Tensor  # indices of the windows whose mask is zero
    masked: Tensor  # indices of the others
    masked_mask: Tensor  # (masked windows, N, N)
    order: Tensor  # takes cat(free, masked) back to the order of the image


class SwinWindowAttention(nn.Module):
    """What ``accelerate`` puts in front of timm's ``WindowAttention`` in the class of a layer.

    ``softmax(q k^T * scale + B + mask) v`` in each window, and the projections. Windows without a
    mask are samples of ``diffit_kernels.window_attention`` whose grid is the window. The windows at
    the seam of a shifted image, whose mask is not zero, and all windows while attention dropout is
    active go through timm's own ``forward``.
    """

    num_heads: int
    window_size: tuple[int, int]
    scale: float
    relative_position_bias_table: nn.Parameter
    qkv: nn.Linear
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout
    _split: _Split | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside the windows.

        Args:
            x: (B * windows, N, C), windows of an image adjacent; N tokens of a window.
            mask: (windows, N, N), added to the logits, or None.

        Returns:
            (B * windows, N, C).
        """
        if self.training and self.attn_drop.p > 0:
            return super().forward(x, mask)
        if mask is None:
            return self._fused(x)
        split = self._split
        if split is None or split.mask is not mask:
            if torch.compiler.is_compiling():  # which windows are masked is not known to a trace
                return super().forward(x, mask)
            split = self._split_by(mask)
        if len(split.masked) == 0:
            return self._fused(x)
        if len(split.free) == 0:
            return super().forward(x, mask)
        images = x.unflatten(0, (-1, mask.shape[0]))
        free = self._fused(images.index_select(1, split.free).flatten(0, 1))
        masked = super().forward(
            images.index_select(1, split.masked).flatten(0, 1), split.masked_mask
        )
        parts = [part.unflatten(0, (images.shape[0], -1)) for part in (free, masked)]
        return torch.cat(parts, dim=1).index_select(1, split.order).flatten(0, 1)

    def _fused(self, x: Tensor) -> Tensor:
        row = None
        if are_linear(self.qkv) and self.qkv.bias is not None:
            qkv, row = linear(x, self.qkv.weight), self.qkv.bias.expand(x.shape[0], -1)
        else:
            qkv = self.qkv(x)
        out = attend_with_row(
            qkv,
            row,
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out))

    @torch.inference_mode(False)  # what is kept here must also serve a later backward pass
    def _split_by(self, mask: Tensor) -> _Split:
        """Find the windows that a mask touches and remember them; waits for the device."""
        touched = mask.flatten(1).any(dim=1)
        free, masked = ((touched == side).nonzero().flatten() for side in (False, True))
        order = torch.cat([free, masked]).argsort()
        self._split = _Split(mask, free, masked, mask[masked], order)
        return self._split

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a layer is made at run time and cannot be found by its name.
        return _empty_layer, (type(self).__mro__[2],), self.__dict__


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        _classes[base] = type("SwinWindowAttention", (SwinWindowAttention, base), {})
    return _classes[base]


def _empty_layer(base: type[nn.Module]) -> nn.Module:
    layer_class = _fused_class(base)
    return layer_class.__new__(layer_class)


def accelerate(model: nn.Module) -> nn.Module:
    """Run the window attention of timm's Swin Transformers on the fused operator.

    In place: each layer of class ``timm.models.swin_transformer.WindowAttention`` gets a subclass
    of it as its class. Parameters, buffers, hooks, keys of the state dict and timm's methods
    (``set_input_size``) stay what they are. Every swapped layer, and every other layer whose class
    is called an attention with the reason why it was left alone, is logged at level INFO by the
    logger ``diffit.integrations.timm``. Attention maps that timm's ``AttentionExtract`` takes from
    ``softmax`` or ``attn_drop`` exist only for windows that timm's own ``forward`` computes.

    The windows that a mask touches are found here and kept until the mask is another tensor: after
    ``model.to(device)`` or ``set_input_size`` the next call finds them again, which waits for the
    device once. A compiled graph cannot: before ``torch.compile``, call ``accelerate`` again, or
    shifted blocks run wholly in timm's formula, with the same result. A model made with
    ``strict_img_size=False`` makes new masks, and waits, at each call.

    Args:
        model: any module, or such a layer itself.

    Returns:
        ``model``.

    Warns:
        UserWarning: it has no layer that can be swapped; it is returned unchanged.
    """
    swapped: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SwinWindowAttention):
            if "Attention" not in type(layer).__name__:
                continue
            reason = _why_not(layer)
            if reason is not None:
                left[name or "model"] = reason
                continue
            layer.__class__ = _fused_class(type(layer))
        swapped.append(name or "model")
    for block in model.modules():
        layer, mask = getattr(block, "attn", None), getattr(block, "attn_mask", None)
        if isinstance(layer, SwinWindowAttention) and mask is not None and not mask.is_meta:
            layer._split_by(mask)
    for name in swapped:
        _logger.info("on the fused window attention: %s", name)
    for name, reason in left.items():
        _logger.info("left alone: %s: %s", name, reason)
    if not swapped:
        found = "; ".join(dict.fromkeys(left.values())) or "it has no attention layers"
        warnings.warn(f"accelerate: nothing was swapped in this model ({found})", stacklevel=2)
    return model


def _why_not(layer: nn.Module) -> str | None:
    """The reason to leave a layer alone, or None."""
    layer_class = type(layer)
    path = f"{layer_class.__module__}.{layer_class.__qualname__}"
    if path == "timm.models.swin_transformer_v2.WindowAttention":
        return f"{path} has cosine attention"
    if path != "timm.models.swin_transformer.WindowAttention":
        return f"{path} is not timm.models.swin_transformer.WindowAttention"
    return None
