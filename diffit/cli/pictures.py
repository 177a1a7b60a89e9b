"""From seeds to pictures: a network with its sampler, guidance and decoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffit.cli.gallery import Pixels
from diffit.diffusion import (
    ConstantGuidance,
    EDMDenoiser,
    GaussianDiffusion,
    Guidance,
    ImageNoise,
    IntervalGuidance,
    PowerCosineGuidance,
    dpm_solver_sample,
    edm_sample,
    guided,
)
from diffit.models import DiffusionNetwork, ImageDiffiT, LatentDiffiT, Sampling

# What each sampler runs on, and its steps where they are not the preset's.
SAMPLERS: dict[str, tuple[type[DiffusionNetwork], int]] = {
    "edm": (ImageDiffiT, 18),
    "ddpm": (LatentDiffiT, 250),
    "ddim": (LatentDiffiT, 50),
    "dpm++": (LatentDiffiT, 25),
}
# Memory of an evaluation, over the activations of the widest layer: 23 to 39 on the reference
# backend, 8 to 17 on the CPU kernels, as measured.
LIVE_ACTIVATIONS = 40
FREE_SHARE = 0.5  # of the memory that is free
# Larger batches are hardly faster, and a batch is what an interruption loses.
MOST_ON_CPU, MOST = 16, 64


@dataclass(frozen=True)
class Painter:
    """A network on its device with all that is needed to sample it.

    Args:
        network: in evaluation mode.
        sampling: the settings.
        interval: time steps, or noise levels of the edm sampler, between which guidance is on;
            None: the schedule of ``sampling``.
        codec: the ``LatentCodec`` of a latent network.
    """

    network: DiffusionNetwork
    sampling: Sampling
    interval: tuple[float, float] | None
    codec: Any

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.network.parameters()).device

    @property
    def evaluations(self) -> int:
        """Steps at which a picture's network is evaluated."""
        return 2 * self.sampling.steps - 1 if self.sampling.sampler == "edm" else self.sampling.steps

    @torch.inference_mode()
    def paint(
        self, seeds: Sequence[int], classes: Sequence[int], evaluated: Callable[[], None]
    ) -> tuple[Pixels, int, int]:
        """Sample one batch.

        Args:
            seeds: of the pictures, B.
            classes: of the pictures, num_classes for none.
            evaluated: called after each of ``evaluations``.

        Returns:
            (B, H, W, 3), and how many unconditional evaluations guidance asked for and saved.

        Raises:
            ValueError: pictures that are not finite.
        """
        noise = ImageNoise(seeds)
        drawn_class(noise, self.network.num_classes)
        model = self._bound(classes)

        def observed(x: Tensor, t: Tensor) -> Tensor:
            out = model(x, t)
            evaluated()
            return out

        result = self._sample(observed, noise)
        ...
