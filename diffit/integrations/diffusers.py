"""diffusers: TMSA as an attention processor, and the latent network in ``DiTPipeline``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffit.extras import import_extra
from diffit.models import LatentDiffiT
from diffit.nn.fusible import are_linear
from diffit_kernels import tmsa
from diffit_kernels.ops.tmsa import attend_with_row


class TMSAAttnProcessor(nn.Module):
    """TMSA in place of the self-attention of a diffusers ``Attention``.

    The projections stay those of the layer (to_q, to_k, to_v, to_out). The processor adds the
    projection of the time token and the relative position bias; both start at zero, so a trained
    network is unchanged at first where the window is its whole map.

    diffusers gives a processor the time embedding in the middle block of a UNet alone, see
    ``add_tmsa``.

    Args:
        dim: channels of the layer.
        num_heads: its heads.
        temb_dim: width of the time embedding.
        window_size: height and width of the windows, which tile the map.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        temb_dim: int,
        window_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.qkv_temb = nn.Linear(temb_dim, 3 * dim, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads, device=device, dtype=dtype)
        )
        nn.init.zeros_(self.qkv_temb.weight)
        nn.init.zeros_(self.qkv_temb.bias)
        self.temb: Tensor | None = None  # of the block that runs, where diffusers gives none

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What ``Attention`` calls.

        Args:
            attn: the layer.
            hidden_states: (B, C, H, W), or (B, L, C) of a square map.
            encoder_hidden_states, attention_mask: have to be None.
            temb: (B, temb_dim); None: attention without a time token.
            kwargs: not used.

        Returns:
            Like ``hidden_states``, with the residual and the factor of the layer.

        Raises:
            ValueError: cross-attention, a mask, or a layer that normalises q and k.
        """
        for name, value in (
            ("encoder_hidden_states", encoder_hidden_states),
            ("attention_mask", attention_mask),
            ("attn.spatial_norm", attn.spatial_norm),
            ("attn.norm_q", attn.norm_q),
        ):
            if value is not None:
                raise ValueError(f"{name}: expected None, TMSA is self-attention without a mask")
        temb = self.temb if temb is None else temb
        x = hidden_states
        grid = tuple(x.shape[2:]) if x.dim() == 4 else None
        if grid is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        projections, out = _projections(attn), attn.to_out[0]
        options = {
            "num_heads": attn.heads,
            "window_size": self.window_size,
            "grid_size": grid,
            "scale": attn.scale,
        }
        if are_linear(*projections, out, self.qkv_temb):
            x = tmsa(
                x,
                temb,
                *_packed(projections),
                self.qkv_temb.weight,
                self.qkv_temb.bias,
                self.relative_position_bias_table,
                out.weight,
                out.bias,
                **options,
            )
        else:
            row = None if temb is None else self.qkv_temb(temb)
            qkv = torch.cat([layer(x) for layer in projections], dim=-1)
            x = out(attend_with_row(qkv, row, self.relative_position_bias_table, **options))
        x = attn.to_out[1](x)
        if grid is not None:
            x = x.transpose(1, 2).unflatten(2, grid)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor


def _projections(attn: Any) -> tuple[nn.Module, ...]:
    """Those of q, k and v: one after ``fuse_projections``, else three."""
    if getattr(attn, "fused_projections", False):
        return (attn.to_qkv,)
    return attn.to_q, attn.to_k, attn.to_v


def _packed(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight (3C, C) and bias (3C,) of the layers as one."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers]), bias


def add_tmsa(unet: nn.Module, *, window_size: int) -> nn.Module:
    """Put a ``TMSAAttnProcessor`` into every attention layer of a ``UNet2DModel``.

    diffusers does not pass the time embedding on to the attention of down and up blocks; hooks
    on these blocks do. The new parameters are in ``unet.state_dict()``: to load one that has them,
    call this first.

    Args:
        unet: changed in place.
        window_size: height and width of the windows, at every resolution that attends.

    Returns:
        unet.

    Raises:
        ValueError: it has no attention layers.
    """
    attention = import_extra("diffusers.models.attention_processor", "latent").Attention
    temb_dim: Any = unet.time_embedding.linear_2.out_features  # type: ignore[union-attr]
    layers = [module for module in unet.modules() if isinstance(module, attention)]
    if not layers:
        raise ValueError("unet: expected attention layers, got none")
    for layer in layers:
        # A quantised layer has no weights of the dtype in which it computes.
        parameters = chain(layer.parameters(), unet.parameters())
        weight = next(x for x in parameters if x.is_floating_point())
        layer.set_processor(
            TMSAAttnProcessor(
                layer.inner_dim,
                layer.heads,
                temb_dim=temb_dim,
                window_size=window_size,
                device=weight.device,
                dtype=weight.dtype,
            )
        )
    for block in [*unet.down_blocks, *unet.up_blocks]:  # type: ignore[misc]
        processors = [m for m in block.modules() if isinstance(m, TMSAAttnProcessor)]
        if processors:
            block.register_forward_pre_hook(_pass_on(processors), with_kwargs=True)
    return unet


def _pass_on(processors: list[TMSAAttnProcessor]) -> Any:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        temb = inspect.signature(block.forward).bind(*args, **kwargs).arguments.get("temb")
        for processor in processors:
            processor.temb = temb

    return hook


class DiTTransformer(nn.Module):
    """``LatentDiffiT`` with the protocol of ``DiTTransformer2DModel``, for ``DiTPipeline``.

    The pipeline's null class is 1000, so the network needs 1000 classes. Its guidance has one
    weight for all steps and all channels.

    Args:
        model: the network.
    """

    def __init__(self, model: LatentDiffiT) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(
            sample_size=model.input_size,
            in_channels=model.in_channels,
            out_channels=model.out_channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.model.parameters()).device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """``model(hidden_states, timestep, class_labels)`` as ``.sample``, or a tuple of one."""
        sample = self.model(hidden_states, timestep, class_labels)
        if not return_dict:
            return (sample,)
        outputs = import_extra("diffusers.models.modeling_outputs", "latent")
        return outputs.Transformer2DModelOutput(sample=sample)
