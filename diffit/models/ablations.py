"""The networks with which the paper compares its own: what differs, and the FID it reports.

The columns are those of ``presets.py``. Where one side of a comparison is the paper's network
itself (window 4 on CIFAR-10, say), that has no second preset. The paper prints windows as
percentages, from which their FIDs are derived. docs/networks.md sets all side by side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffit.models.ddpmpp import DDPMpp
from diffit.models.mla import ViTMLA
from diffit.models.presets import CIFAR10, EDM_18, MAIN, Preset


def _cifar10(parameters: float, gflops: float, fid: float, **changes: Any) -> Preset:
    return _changed("diffit_cifar10_32", parameters, gflops, fid, changes)


def _ffhq(parameters: float, gflops: float, fid: float, **changes: Any) -> Preset:
    return _changed("diffit_ffhq_64", parameters, gflops, fid, changes)


def _emoji(parameters: float, gflops: float, fid: None, **changes: Any) -> Preset:
    return _changed("diffit_emoji_32", parameters, gflops, fid, changes)


def _changed(
    base: str, parameters: float, gflops: float, fid: float | None, changes: dict[str, Any]
) -> Preset:
    options = {**MAIN[base].options, **changes}
    return replace(MAIN[base], parameters=parameters, gflops=gflops, fid=fid, options=options)


def _vit(parameters: float, gflops: float, fid: float) -> Preset:
    return Preset(ViTMLA, EDM_18, parameters, gflops, fid, CIFAR10)


def _unet(parameters: float, gflops: float, fid: float, **options: Any) -> Preset:
    return Preset(DDPMpp, EDM_18, parameters, gflops, fid, {**CIFAR10, **options})


WIDE_CIFAR10 = {"channels": (256, 512, 512)}
WIDE_FFHQ = {"channels": (256, 512, 512, 512)}
SCALE = {"time_entry": "scale"}
TMSA = {"tmsa": True, "num_heads": 8}  # heads of 32 channels, as in DiffiT

# fmt: off
ABLATIONS: dict[str, Preset] = {
    # name                              params  GFLOPs  FID
    # Channels of the time token and of the spatial tokens; 512 and 256 in DiffiT.
    "diffit_cifar10_32_tokens_512_512": _cifar10(100.9,  27.8, 1.99, **WIDE_CIFAR10),
    "diffit_cifar10_32_tokens_256_256": _cifar10( 25.3,   7.0, 2.13, temb_dim=256),
    "diffit_ffhq_64_tokens_512_512":    _ffhq(   159.0, 121.2, 2.27, **WIDE_FFHQ),
    "diffit_ffhq_64_tokens_256_256":    _ffhq(    39.8,  30.7, 2.41, temb_dim=256),
    # Encoder and decoder.
    "diffit_cifar10_32_design_a":       _vit(    109.5,  24.2, 5.34),
    "diffit_cifar10_32_design_b":       _cifar10( 22.2,   4.8, 4.64, **SCALE, decoder="mla"),
    "diffit_cifar10_32_design_c":       _cifar10( 30.7,   7.0, 3.71, **SCALE),
    "diffit_cifar10_32_design_d":       _cifar10( 29.4,   7.0, 2.27, decoder_time_entry="scale"),
    # Convolutional networks, and the same with DiffiT's attention.
    "ncsnpp_cifar10_32":                _unet(    56.4,  21.2, 3.77, ncsnpp=True),
    "ncsnpp_cifar10_32_tmsa":           _unet(    58.8,  21.2, 3.49, ncsnpp=True, **TMSA),
    "ddpmpp_cifar10_32":                _unet(    55.7,  21.2, 3.01),
    "ddpmpp_cifar10_32_tmsa":           _unet(    58.1,  21.2, 2.76, **TMSA),
    # Where time enters.
    "diffit_cifar10_32_time_bias":      _cifar10( 25.6,   7.0, 3.97, time_entry="bias"),
    "diffit_cifar10_32_time_mlp":       _cifar10( 24.4,   7.0, 3.81, time_entry="mlp"),
    "diffit_emoji_32_time_bias":        _emoji(    2.6,   0.5, None, time_entry="bias"),
    "diffit_emoji_32_time_mlp":         _emoji(    1.9,   0.5, None, time_entry="mlp"),
    # Attention on the time token apart from that on the spatial tokens.
    "diffit_cifar10_32_separate_token": _cifar10( 24.4,   7.0, 2.28, time_entry="separate"),
    "diffit_ffhq_64_separate_token":    _ffhq(    38.5,  30.7, 2.59, time_entry="separate"),
    # Random Fourier features of the noise level.
    "diffit_cifar10_32_fourier":        _cifar10( 28.6,   7.0, 2.02, time_embedding="fourier"),
    "diffit_ffhq_64_fourier":           _ffhq(    44.8,  30.8, 2.37, time_embedding="fourier"),
    # Attention window; 4 in DiffiT on CIFAR-10, 8 on FFHQ-64.
    "diffit_cifar10_32_window_2":       _cifar10( 28.6,   7.0, 2.54, window_size=2),
    "diffit_cifar10_32_window_8":       _cifar10( 28.7,   7.1, 1.92, window_size=8),
    "diffit_ffhq_64_window_2":          _ffhq(    44.7,  29.9, 2.58, window_size=2),
    "diffit_ffhq_64_window_4":          _ffhq(    44.7,  30.1, 2.30, window_size=4),
}
# fmt: on
