"""The autoencoder between pictures and latents: diffusers' AutoencoderKL with the usual scale."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffit.extras import import_extra

LATENT_SCALE = 0.18215  # latents get a deviation near 1 (Rombach et al. 2022)


class LatentCodec(nn.Module):
    """Pictures to latents and back. Not trained, and one picture at a time to bound the memory.

    Args:
        vae: diffusers' ``AutoencoderKL``, in any dtype and on any device.
    """

    DEFAULT = "stabilityai/sd-vae-ft-ema"  # the one of the published networks

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.vae.enable_slicing()

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] = DEFAULT, **options: Any
    ) -> LatentCodec:
        """Load from a folder or the hub. Needs the extra ``latent``.

        Args:
            source: folder or hub id.
            options: those of diffusers, for example ``torch_dtype``.

        Raises:
            ImportError: diffusers is missing.
            OSError: there is no whole autoencoder at that place, or no way to it.
        """
        autoencoder = import_extra("diffusers", "latent").AutoencoderKL
        options.setdefault("low_cpu_mem_usage", False)  # it would need accelerate
        try:
            return cls(autoencoder.from_pretrained(os.fspath(source), **options))
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"found no autoencoder at {str(source)!r}: {reason}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save, so that ``from_pretrained(folder)`` finds it."""
        self.vae.save_pretrained(os.fspath(folder))

    @property
    def downscale(self) -> int:
        """Height of a picture over that of its latent: 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(
        self, images: Tensor, randn_like: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Pictures to latents: the mean of the posterior, or a sample of it, times 0.18215.

        Args:
            images: (B, 3, 8 h, 8 w) in [-1, 1].
            randn_like: the source of noise for a sample; None: the mean.

        Returns:
            (B, 4, h, w), the dtype of the autoencoder.

        Raises:
            ValueError: another shape.
        """
        channels, down = self.vae.config.in_channels, self.downscale
        if (
            images.dim() != 4
            or images.shape[1] != channels
            or any(n % down for n in images.shape[2:])
        ):
            raise ValueError(
                f"images: expected (B, {channels}, H, W), H and W multiples of {down}, "
                f"got shape {tuple(images.shape)}"
            )
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean
        if randn_like is not None:
            latents = latents + posterior.std * randn_like(latents)
        return latents * LATENT_SCALE

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures.

        Args:
            latents: (B, 4, h, w), as ``encode`` gives them and the samplers make them, any dtype.

        Returns:
            (B, 3, 8 h, 8 w), around [-1, 1], the dtype of the autoencoder.

        Raises:
            ValueError: another shape.
        """
        channels = self.vae.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents: expected (B, {channels}, h, w), got shape {tuple(latents.shape)}"
            )
        return self.vae.decode((latents / LATENT_SCALE).to(self.vae.dtype)).sample
