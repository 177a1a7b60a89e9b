"""From seeds to pictures: a network with its sampler, guidance and decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from diffit.models import DiffusionNetwork, ImageNetwork, LatentDiffiT, Sampling
from diffit.models.vae import LatentCodec

# The networks of each sampler.
NETWORKS: dict[str, type[DiffusionNetwork]] = {
    "edm": ImageNetwork,
    "ddpm": LatentDiffiT,
    "ddim": LatentDiffiT,
    "dpm++": LatentDiffiT,
}


class Batch(NamedTuple):
    """Pictures, and what they cost.

    Attributes:
        pixels: (B, H, W, 3), uint8.
        evaluated: how many noisy pictures the network saw.
        saved: how many more it would have seen, were guidance not skipped where its weight is 1.
    """

    pixels: Pixels
    evaluated: int
    saved: int


class Painter:
    """A network with all that turns seeds into pictures.

    Args:
        network: in evaluation mode, on its device.
        sampling: the settings.
        interval: time steps, or noise levels of the edm sampler, between which guidance is on;
            None: the schedule of ``sampling``.
        vae: folder or repository of the decoder, for a latent network only.
        compiled: compile the network.

    Raises:
        ValueError: settings that do not fit the network.
        ImportError, OSError: no decoder.
    """

    def __init__(
        self,
        network: DiffusionNetwork,
        sampling: Sampling,
        *,
        interval: tuple[float, float] | None = None,
        vae: str | None = None,
        compiled: bool = False,
    ) -> None:
        sampler, scale = sampling.sampler, sampling.guidance_scale
        if not isinstance(network, NETWORKS[sampler]):
            fit = [name for name, kind in NETWORKS.items() if isinstance(network, kind)]
            raise ValueError(
                f"--sampler: expected {' or '.join(fit)} for {type(network).__name__}, "
                f"got {sampler}"
            )
        if (scale != 1 or interval is not None) and not network.num_classes:
            raise ValueError("--guidance: the network has no classes to guide by")
        self._guidance: Guidance = ConstantGuidance(scale)
        if interval is not None:
            self._guidance = IntervalGuidance(scale, *interval)
        elif sampling.guidance_schedule == "power-cosine":
            self._guidance = PowerCosineGuidance(scale)
        self._network = network
        compile_: Any = torch.compile
        self._model: nn.Module = compile_(network) if compiled else network
        self._codec: LatentCodec | None = None
        self._sampler, self._steps = sampler, sampling.steps
        if isinstance(network, ImageNetwork):
            if vae is not None:
                raise ValueError("--vae: only latent networks have a decoder")
            size, channels = network.img_resolution, network.img_channels
            self._denoiser: Any = EDMDenoiser(self._model, sampling.sigma_data)
        else:
            assert isinstance(network, LatentDiffiT)
            size, channels = network.input_size, network.in_channels
            self._denoiser = self._model
            self._diffusion = _diffusion(sampling, network.learn_sigma)
            self._codec = _decoder(vae, channels).to(self.device)
        self._shape = (channels, size, size)

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self._network.parameters()).device

    @property
    def evaluations(self) -> int:
        """How many times the network is called for a batch."""
        return 2 * self._steps - 1 if self._sampler == "edm" else self._steps

    @torch.inference_mode()
    def paint(
        self, seeds: Sequence[int], classes: Sequence[int | None], called: Callable[[], None]
    ) -> Batch:
        """Sample one batch.

        Args:
            seeds: of the pictures.
            classes: of the pictures, num_classes for none; None where the network has none.
            called: what to call after each call of the network.

        Raises:
            ValueError: pictures that are not finite.
        """
        noise = ImageNoise(seeds)
        # The class is the first draw of a seed. Given ones leave the noise what it is.
        noise.randint(self._network.num_classes or 1)
        latents = noise.randn((len(seeds), *self._shape), dtype=torch.float64, device=self.device)
        model = self._denoiser
        if self._network.num_classes:
            model = guided(model, torch.tensor(classes, device=self.device), self._guidance)

        def count(*_: Any) -> None:  # what a hook returns would replace the result
            called()

        hook = self._model.register_forward_hook(count)
        try:
            images = self._sample(model, latents, noise)
        finally:
            hook.remove()
        if self._codec is not None:
            images = self._codec.decode(images)
        for seed, is_finite in zip(seeds, images.isfinite().flatten(1).all(1), strict=True):
            if not is_finite:
                raise ValueError(f"seed {seed}: the picture is not finite; try --dtype float32")
        evaluated = getattr(model, "evaluations", len(seeds) * self.evaluations)
        return Batch(to_pixels(images), evaluated, getattr(model, "saved", 0))

    def _sample(self, model: Any, latents: Tensor, noise: ImageNoise) -> Tensor:
        if self._sampler == "edm":
            return edm_sample(model, latents, num_steps=self._steps)
        if self._sampler == "dpm++":
            return dpm_solver_sample(
                model, latents, num_steps=self._steps, diffusion=self._diffusion
            )
        if self._sampler == "ddim":
            return self._diffusion.ddim_sample_loop(model, latents)
        return self._diffusion.p_sample_loop(model, latents, randn_like=noise.randn_like)


def drawn_class(seed: int, num_classes: int) -> int | None:
    """The class that a seed draws, or None where there are none."""
    return int(ImageNoise([seed]).randint(num_classes)) if num_classes else None


def to_pixels(images: Tensor) -> Pixels:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C), uint8, the nearest of 256 levels."""
    levels = ((images.double() + 1) * 127.5).round().clamp(0, 255)
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _diffusion(sampling: Sampling, learn_sigma: bool) -> GaussianDiffusion:
    spacings: dict[str, int | str] = {"ddpm": sampling.steps, "ddim": f"ddim{sampling.steps}"}
    try:
        return GaussianDiffusion(learn_sigma=learn_sigma, respacing=spacings.get(sampling.sampler))
    except ValueError as error:
        raise ValueError(f"--steps {sampling.steps}: {error}") from error


def _decoder(vae: str | None, channels: int) -> LatentCodec:
    codec = LatentCodec.from_pretrained(vae or LatentCodec.DEFAULT)
    given = codec.vae.config.latent_channels
    if given != channels:
        raise ValueError(f"--vae: expected one for latents of {channels} channels, got {given}")
    return codec
