"""k-diffusion: its samplers call ``model(x, sigma, **extra_args)`` and expect the denoised picture.

``EDMDenoiser`` has that protocol already: ``sample_heun(denoiser, x, sigmas,
extra_args={"class_labels": y})``. ``EpsDenoiser`` gives it to the latent network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffit.diffusion import GaussianDiffusion


class EpsDenoiser(nn.Module):
    """``D(x; sigma) = x - sigma eps(x / sqrt(sigma^2 + 1), t(sigma))``, eps the network.

    ``sigma_t = sqrt((1 - abar_t) / abar_t)``; between two steps t is interpolated in ln sigma, and
    it stays within the steps, as in k-diffusion's wrappers of discrete networks.

    Args:
        model: predicts the noise, in its first channels: ``model(x, t, ...)``, as ``LatentDiffiT``.
        diffusion: the process that it was trained on; None: 1000 linear steps.

    Attributes:
        sigmas: (steps,), float64, rising.
        sigma_min, sigma_max: the first and the last of them.
    """

    sigmas: Tensor

    def __init__(self, model: nn.Module, diffusion: GaussianDiffusion | None = None) -> None:
        super().__init__()
        self.model = model
        abar = (diffusion or GaussianDiffusion()).alphas_cumprod
        self.register_buffer("sigmas", ((1 - abar) / abar).sqrt(), persistent=False)
        self.sigma_min, self.sigma_max = self.sigmas[0].item(), self.sigmas[-1].item()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The step, a fraction between two: (B,) -> (B,), float64."""
        logs, log_sigma = self.sigmas.log(), sigma.double().log()
        low = (torch.searchsorted(logs, log_sigma, right=True) - 1).clamp(0, len(logs) - 2)
        fraction = (log_sigma - logs[low]) / (logs[low + 1] - logs[low])
        return low + fraction.clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """Denoise.

        Args:
            x: (B, C, H, W), latents plus sigma times noise, in any dtype.
            sigma: (B,).
            extra: for the network, for example ``y``, its classes.

        Returns:
            (B, C, H, W), the dtype of x.
        """
        wide = sigma.to(x.dtype).view(-1, 1, 1, 1)
        scaled = x / (wide**2 + 1).sqrt()
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)
        eps = self.model(scaled.to(dtype), self.sigma_to_t(sigma), **extra)[:, : x.shape[1]]
        return x - wide * eps.to(x.dtype)
