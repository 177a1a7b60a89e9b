"""The call protocols of k-diffusion's and DiT's sampling code."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffit.diffusion import EDMDenoiser, GaussianDiffusion
from diffit.integrations.k_diffusion import EpsDenoiser
from tests.diffit.models.networks import latent_inputs, small_image, small_latent


def euler(model: object, x: Tensor, sigmas: list[float], extra_args: dict[str, Tensor]) -> Tensor:
    """A sampler as k-diffusion writes them."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = model(x, x.new_full((len(x),), sigma), **extra_args)  # type: ignore[operator]
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


def test_a_sampler_of_k_diffusion() -> None:
    """Runs on both kinds of networks."""
    denoiser = EDMDenoiser(small_image())
    x = torch.randn(2, 3, 12, 12) * 80
    out = euler(denoiser, x, [80.0, 1.0, 0.0], {"class_labels": torch.tensor([1, 4])})
    assert out.isfinite().all()
    latent = EpsDenoiser(small_latent())
    x, _, y = latent_inputs(2)
    out = euler(latent, x * latent.sigma_max, [latent.sigma_max, 1.0, 0.0], {"y": y})
    assert out.isfinite().all()
    assert out.dtype == x.dtype


@pytest.mark.parametrize("step", [0, 1, 417, 998, 999])
def test_denoised_is_the_predicted_x0(step: int) -> None:
    """x / sqrt(1 + sigma^2) is x_t; the denoised picture is the x_0 that DDPM predicts from it."""
    network, diffusion = small_latent().double(), GaussianDiffusion()
    denoiser = EpsDenoiser(network)
    x, _, y = latent_inputs(2, torch.float64)
    abar = diffusion.alphas_cumprod[step].item()
    sigma = math.sqrt((1 - abar) / abar)
    t = torch.full((2,), step)
    prediction = diffusion.p_mean_variance(lambda x, t: network(x, t, y), x, t)
    denoised = denoiser(x / math.sqrt(abar), torch.full((2,), sigma, dtype=torch.float64), y=y)
    torch.testing.assert_close(denoised, prediction.pred_xstart, rtol=1e-9, atol=1e-9)


def test_times_between_steps() -> None:
    """Linear in ln sigma, and never beyond the first and the last."""
    denoiser = EpsDenoiser(small_latent())
    sigmas = denoiser.sigmas
    between = (sigmas[10] * sigmas[11]).sqrt()
    asked = torch.stack([sigmas[0] / 2, sigmas[0], between, sigmas[999], 2 * sigmas[999]])
    expected = torch.tensor([0, 0, 10.5, 999, 999], dtype=torch.float64)
    torch.testing.assert_close(denoiser.sigma_to_t(asked), expected)


def test_sampling_code_of_dit() -> None:
    """``model.forward_with_cfg`` with doubled inputs, as DiT's scripts call it."""
    network = small_latent()
    x, _, y = latent_inputs(2)
    z, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, network.num_classes)])
    diffusion = GaussianDiffusion(respacing=5)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return network.forward_with_cfg(x, t, labels, 4.0)

    samples, _ = diffusion.p_sample_loop(model, z).chunk(2)
    assert samples.shape == x.shape
    assert samples.isfinite().all()
