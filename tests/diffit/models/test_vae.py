"""LatentCodec on a tiny random autoencoder: what diffusers computes, the scale, files, checks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffit.diffusion import ImageNoise
from diffit.models.vae import LatentCodec

diffusers = pytest.importorskip("diffusers")


def tiny() -> LatentCodec:
    """4 latent channels, an eighth of the size, 50,000 parameters."""
    torch.manual_seed(0)
    return LatentCodec(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
        )
    )


def pictures(batch: int = 3) -> torch.Tensor:
    return ImageNoise(range(batch)).randn((batch, 3, 24, 40)).clamp(-1, 1)


def test_is_diffusers_autoencoder_with_a_scale() -> None:
    codec, x = tiny(), pictures()
    with torch.no_grad():
        posterior = codec.vae.encode(x).latent_dist
        z = codec.encode(x)
        assert z.shape == (3, 4, 3, 5)
        torch.testing.assert_close(z, posterior.mean * 0.18215)
        y = codec.decode(z)
        assert y.shape == x.shape
        torch.testing.assert_close(y, codec.vae.decode(posterior.mean).sample)
    assert not any(p.requires_grad for p in codec.parameters())
    assert not codec.vae.training


def test_encodes_a_sample_of_the_posterior() -> None:
    codec, x = tiny(), pictures()
    z = codec.encode(x, ImageNoise([4, 5, 6]).randn_like)
    posterior = codec.vae.encode(x).latent_dist
    noise = ImageNoise([4, 5, 6]).randn((3, 4, 3, 5))
    torch.testing.assert_close(z, (posterior.mean + posterior.std * noise) * 0.18215)
    assert not torch.equal(z, codec.encode(x))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    """One at a time, so bit for bit; latents come from samplers in float64."""
    codec = tiny()
    z = codec.encode(pictures()).double()
    y = codec.decode(z)
    assert y.dtype == torch.float32
    assert torch.equal(torch.cat([codec.decode(part) for part in z.split(1)]), y)


def test_runs_in_the_dtype_of_its_weights() -> None:
    codec = tiny().bfloat16()
    assert codec.encode(pictures()).dtype == torch.bfloat16
    assert codec.decode(torch.zeros(1, 4, 3, 5)).dtype == torch.bfloat16


def test_round_trip_of_files(tmp_path: Path) -> None:
    codec = tiny()
    codec.save_pretrained(tmp_path)
    loaded = LatentCodec.from_pretrained(tmp_path)
    for name, tensor in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded.encode(pictures()), codec.encode(pictures()))
    narrow = LatentCodec.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert narrow.vae.dtype == torch.bfloat16


def test_wrong_input(tmp_path: Path) -> None:
    codec = tiny()
    for shape in ((3, 24, 40), (2, 1, 24, 40), (2, 3, 24, 44)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), H and W multiples"):
            codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"latents: expected \(B, 4, h, w\), got shape \(2, 8, 3"):
        codec.decode(torch.zeros(2, 8, 3, 5))
    with pytest.raises(OSError, match=r"^found no autoencoder at '.*config\.json.*$"):
        LatentCodec.from_pretrained(tmp_path)
    codec.save_pretrained(tmp_path)
    for config in ('{"block_out_channels": 3}', '{"latent_channels": 8}', "{"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(OSError, match=rf"^found no autoencoder at '{tmp_path}': [^\n]+$"):
            LatentCodec.from_pretrained(tmp_path)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^diffusers is needed here .* 'diffit\[latent\]'$"):
        LatentCodec.from_pretrained()
