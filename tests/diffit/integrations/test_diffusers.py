"""TMSA in a real UNet2DModel, and the latent network in the real DiTPipeline."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from diffit.integrations.diffusers import DiTTransformer, TMSAAttnProcessor, add_tmsa
from diffit.models import LatentDiffiT
from diffit_kernels import tmsa
from tests.diffit.models.networks import stirred
from tests.published import published_tmsa


def unet(**options: Any) -> UNet2DModel:
    """Attention in down, middle and up blocks, on maps of 4 x 4 and 2 x 2."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**sizes, **options}).eval()


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 700])


def processors(network: nn.Module) -> list[TMSAAttnProcessor]:
    return [module for module in network.modules() if isinstance(module, TMSAAttnProcessor)]


def test_starts_as_it_was() -> None:
    """With the whole map as window, in every layer."""
    plain = unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    network = add_tmsa(copy.deepcopy(plain), window_size=4)
    assert len(processors(network)) == 4
    x, t = inputs()
    torch.testing.assert_close(network(x, t).sample, plain(x, t).sample)


def test_time_reaches_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of each block, though diffusers passes it to the middle one alone."""
    network = stirred(add_tmsa(unet(), window_size=2))
    seen: list[Tensor] = []

    def record(x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(temb)
        return tmsa(x, temb, *args, **kwargs)

    monkeypatch.setattr("diffit.integrations.diffusers.tmsa", record)
    x, t = inputs()
    network(x, t)
    expected = network.time_embedding(network.time_proj(t))
    assert len(seen) == len(processors(network)) == 4
    assert all(torch.equal(temb, expected) for temb in seen)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["map", "tokens"])
@pytest.mark.parametrize("adapted", [False, True])
def test_equals_its_formula(fused: bool, layout: str, adapted: bool) -> None:
    """Norm, TMSA in windows, residual and factor; with an adapter in the place of a projection."""
    torch.manual_seed(0)
    attn = Attention(
        16,
        heads=2,
        dim_head=8,
        bias=True,
        norm_num_groups=4,
        residual_connection=True,
        rescale_output_factor=2.0,
        eps=1e-5,
    )
    processor = TMSAAttnProcessor(16, 2, temb_dim=6, window_size=2)
    attn.set_processor(processor)
    stirred(attn).double()
    state = {name: tensor.detach().clone() for name, tensor in attn.named_parameters()}
    if fused:
        with torch.no_grad():
            attn.fuse_projections()
    if adapted:
        name = "to_qkv" if fused else "to_k"
        setattr(attn, name, nn.Sequential(getattr(attn, name)))
    x, temb = torch.randn(3, 16, 4, 4).double(), torch.randn(3, 6).double()
    normed = torch.nn.functional.group_norm(
        x, 4, state["group_norm.weight"], state["group_norm.bias"], 1e-5
    )
    expected = published_tmsa(
        normed.flatten(2).mT,
        temb,
        torch.cat([state[f"to_{n}.weight"] for n in "qkv"]),
        torch.cat([state[f"to_{n}.bias"] for n in "qkv"]),
        state["processor.qkv_temb.weight"],
        state["processor.qkv_temb.bias"],
        state["processor.relative_position_bias_table"],
        state["to_out.0.weight"],
        state["to_out.0.bias"],
        num_heads=2,
        window_size=(2, 2),
        grid_size=(4, 4),
    )
    expected = (expected.mT.unflatten(2, (4, 4)) + x) / 2
    if layout == "map":
        got = attn(x, temb=temb)
    else:
        got = attn(x.flatten(2).mT, temb=temb).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(got, expected)
    one, each = temb[:1], temb[:1].expand(3, -1)
    torch.testing.assert_close(attn(x, temb=one), attn(x, temb=each))


def test_trains_and_loads() -> None:
    network = add_tmsa(unet(), window_size=2).train()
    stirred(network)
    x, t = inputs()
    network(x, t).sample.square().mean().backward()
    for processor in processors(network):
        for name, parameter in processor.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    other = add_tmsa(unet(), window_size=2)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(x, t).sample, network.eval()(x, t).sample)


def test_what_it_does_not_do() -> None:
    attn = Attention(16, heads=2, dim_head=8)
    attn.set_processor(TMSAAttnProcessor(16, 2, temb_dim=6, window_size=2))
    x = torch.randn(1, 16, 16)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected None"):
        attn(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        attn(x, attention_mask=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="window_size: expected a divisor of grid_size"):
        attn(torch.randn(1, 16, 5, 5))
    with pytest.raises(ValueError, match="unet: expected attention layers, got none"):
        add_tmsa(
            unet(
                down_block_types=("DownBlock2D",) * 3,
                up_block_types=("UpBlock2D",) * 3,
                add_attention=False,
            ),
            window_size=2,
        )


def test_dit_pipeline() -> None:
    """Its pictures are those of DDIM by hand, with the network itself."""
    torch.manual_seed(0)
    network = stirred(LatentDiffiT(4, hidden_size=16, depth=1, num_heads=2, num_classes=1000))
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4
    ).eval()
    pipeline = DiTPipeline(DiTTransformer(network), vae, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"guidance_scale": 1.5, "num_inference_steps": 3}
    pictures = pipeline(
        [7, 900], generator=torch.Generator().manual_seed(1), output_type="pt", **arguments
    ).images

    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    y, null = torch.tensor([7, 900]), torch.tensor([1000, 1000])
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = t.expand(2)
            eps, base = network(x, times, y)[:, :4], network(x, times, null)[:, :4]
            x = scheduler.step(base + 1.5 * (eps - base), t, x).prev_sample
        expected = vae.decode(x / vae.config.scaling_factor).sample
    torch.testing.assert_close(pictures, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
