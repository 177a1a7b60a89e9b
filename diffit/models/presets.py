"""The networks of the paper, with what it reports of each, and the settings they are sampled with.

``ablations.py`` has those that it compares them with; ``PRESETS`` holds both.

Sizes: parameters in millions; GFLOPs are multiply-adds of one evaluation, as the paper counts
them, but with the products of attention. FID: of 50,000 samples, as the paper reports it; None: no
such network there. A test counts the sizes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffit.models.base import DiffusionNetwork
from diffit.models.image import ImageDiffiT
from diffit.models.latent import LatentDiffiT


@dataclass(frozen=True)
class Sampling:
    """How a network is sampled.

    Args:
        sampler: "edm" (Heun's method), "ddpm", "ddim" or "dpm++".
        steps: of the sampler.
        sigma_data: deviation of the data that EDM's preconditioning assumes.
        guidance_scale: weight of classifier-free guidance; 1: none.
        guidance_schedule: "constant" or "power-cosine".
    """

    sampler: str
    steps: int
    sigma_data: float = 0.5
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"


@dataclass(frozen=True)
class Preset:
    """A network, by the arguments of its constructor, and what is known of it."""

    network: type[DiffusionNetwork]
    sampling: Sampling
    parameters: float
    gflops: float
    fid: float | None
    options: Mapping[str, Any] = field(default_factory=dict)


def _image(
    parameters: float, gflops: float, fid: float | None, sampling: Sampling, **options: Any
) -> Preset:
    return Preset(ImageDiffiT, sampling, parameters, gflops, fid, options)


def _latent(
    parameters: float, gflops: float, fid: float | None, sampling: Sampling, **options: Any
) -> Preset:
    return Preset(LatentDiffiT, sampling, parameters, gflops, fid, options)


EDM_18, EDM_40 = Sampling("edm", 18), Sampling("edm", 40)
EMOJI_18 = Sampling("edm", 18, sigma_data=0.6)  # of these pictures: 0.61, 0.62
DDPM_256 = Sampling("ddpm", 250, guidance_scale=4.4, guidance_schedule="power-cosine")
DDPM_512 = Sampling("ddpm", 250, guidance_scale=1.49)

CIFAR10 = {"img_resolution": 32, "augment_dim": 9, "dropout": 0.13}
FFHQ = {
    "img_resolution": 64,
    "augment_dim": 9,
    "dropout": 0.05,
    "channels": (128, 256, 256, 256),
    "window_size": 8,
}
EMOJI = {
    "label_dim": 9,
    "augment_dim": 9,
    "channels": (64, 96, 128),
    "depths": (1, 1, 2),
    "window_size": 8,  # all of the lowest resolution
    "temb_dim": 192,
}
EMOJI_64 = {
    **EMOJI,
    "img_resolution": 64,
    "channels": (64, 96, 128, 160),
    "depths": (1, 1, 1, 2),
    "label_dropout": 0.1,
}
# The widths of DiT (Peebles and Xie 2023, table 1); XL is the default.
S = {"hidden_size": 384, "depth": 12, "num_heads": 6}
B = {"hidden_size": 768, "depth": 12, "num_heads": 12}
L = {"hidden_size": 1024, "depth": 24, "num_heads": 16}

# fmt: off
MAIN: dict[str, Preset] = {
    # name                             params  GFLOPs  FID
    "diffit_cifar10_32":       _image(  28.6,   7.0,  1.95, EDM_18, **CIFAR10, depths=(4, 4, 4)),
    "diffit_cifar10_32_small": _image(  15.8,   4.0,  None, EDM_18, **CIFAR10, depths=(2, 2, 2)),
    "diffit_ffhq_64":          _image(  44.8,  30.8,  2.22, EDM_40, **FFHQ, depths=(4, 4, 4, 4)),
    "diffit_ffhq_64_small":    _image(  23.7,  14.5,  None, EDM_40, **FFHQ, depths=(1, 2, 2, 2)),
    "diffit_emoji_32":         _image(   2.1,   0.5,  None, EMOJI_18, **EMOJI),
    "diffit_emoji_64":         _image(   3.9,   2.3,  None, EMOJI_18, **EMOJI_64),
    "diffit_s_2_256":          _latent( 27.3,   6.1,  None, DDPM_256, **S),
    "diffit_b_2_256":          _latent(108.0,  23.0,  None, DDPM_256, **B),
    "diffit_l_2_256":          _latent(380.5,  80.6,  None, DDPM_256, **L),
    "diffit_xl_2_256":         _latent(561.0, 118.5,  1.73, DDPM_256),
    "diffit_xl_2_512":         _latent(562.4, 524.4,  2.67, DDPM_512, input_size=64),
}
# fmt: on
