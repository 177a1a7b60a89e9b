"""The networks of diffit.models, through their samplers and losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.diffusion import (
    ConstantGuidance,
    EDMDenoiser,
    GaussianDiffusion,
    Guidance,
    ImageNoise,
    PowerCosineGuidance,
    dpm_solver_sample,
    edm_loss,
    edm_sample,
    guided,
)
from tests.diffit.models.networks import small_image, small_latent

LABELS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize(
    ("guidance", "scale_pow"), [(PowerCosineGuidance(4.4), 4.0), (ConstantGuidance(4.4), 0.0)]
)
@pytest.mark.parametrize("step", [0, 417, 650])
@torch.no_grad()
def test_guided_equals_forward_with_cfg(guidance: Guidance, scale_pow: float, step: int) -> None:
    """Its first half, where w is not 1."""
    network, x = small_latent(), ImageNoise([0, 1, 2]).randn((3, 4, 6, 6))
    t = torch.full((3,), step)
    got = guided(network, LABELS, guidance)(x, t)
    labels = torch.cat([LABELS, torch.full((3,), 5)])
    both = network.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), labels, 4.4, scale_pow)
    torch.testing.assert_close(got, both[:3], rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, network(x, t, LABELS))


def latent_sample(sampler: str, dtype: torch.dtype, seeds: list[int]) -> tuple[Tensor, Any]:
    network = small_latent().to(dtype)
    noise = ImageNoise(seeds)
    x, labels = noise.randn((len(seeds), 4, 6, 6)), noise.randint(5)
    model = guided(network, labels, PowerCosineGuidance(4.4))
    if sampler == "ddpm":
        ddpm = GaussianDiffusion(respacing=10)
        return ddpm.p_sample_loop(model, x, randn_like=noise.randn_like), model
    if sampler == "ddim":
        return GaussianDiffusion(respacing="ddim10").ddim_sample_loop(model, x), model
    return dpm_solver_sample(model, x, num_steps=10), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_latent_network_samples(sampler: str, dtype: torch.dtype) -> None:
    """In the dtype of its weights; the saving is reported."""
    x, model = latent_sample(sampler, dtype, [3, 1, 4])
    assert x.shape == (3, 4, 6, 6)
    assert x.dtype == torch.float64
    assert x.isfinite().all()
    assert model.evaluations + model.saved == 60
    assert 0 < model.saved < 30


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_latent_sample_depends_on_its_seed(sampler: str) -> None:
    """To rounding: products of matrices may sum in another order for another batch."""
    seeds = [3, 1, 4, 15, 9]
    together, _ = latent_sample(sampler, torch.float32, seeds)
    alone = torch.cat([latent_sample(sampler, torch.float32, [seed])[0] for seed in seeds])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3 * together.std().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_network_samples(dtype: torch.dtype) -> None:
    denoiser = EDMDenoiser(small_image().to(dtype), 0.6)
    noise = ImageNoise([3, 1, 4])
    x, labels = noise.randn((3, 3, 12, 12)), noise.randint(4)
    model = guided(denoiser, labels, ConstantGuidance(2.0))
    y = edm_sample(model, x, num_steps=4, s_churn=5, randn_like=noise.randn_like)
    assert y.shape == x.shape
    assert y.dtype == torch.float64
    assert y.isfinite().all()
    assert (model.evaluations, model.saved) == (42, 0)


def test_image_network_trains() -> None:
    """Gradients of EDM's loss reach the network; labels by id or row, augmentation beside."""
    denoiser = EDMDenoiser(small_image(), 0.6)
    images = ImageNoise([1, 2, 3]).randn((3, 3, 12, 12))
    for labels in (torch.tensor([3, 4, 0]), torch.eye(5, 4)[torch.tensor([3, 4, 0])]):
        noise = ImageNoise([1, 2, 3])
        loss = edm_loss(
            denoiser,
            images,
            labels,
            randn_like=noise.randn_like,
            augment_labels=torch.ones(3, 9),
        )
        loss.mean().backward()
        assert loss.shape == (3,)
    gradients = [p.grad for p in denoiser.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients if g is not None) == len(gradients)


def test_latent_network_trains() -> None:
    network, diffusion = small_latent(), GaussianDiffusion()
    noise = ImageNoise([1, 2, 3])
    x0, eps = noise.randn((3, 4, 6, 6)), noise.randn((3, 4, 6, 6))
    losses = diffusion.training_losses(
        partial(network, y=LABELS), x0, torch.tensor([0, 500, 999]), eps
    )
    losses.loss.mean().backward()
    assert losses.loss.shape == (3,)
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_unconditional_image_network() -> None:
    denoiser = EDMDenoiser(small_image(label_dim=0))
    y = edm_sample(denoiser, torch.zeros(2, 3, 12, 12), num_steps=2)
    assert y.shape == (2, 3, 12, 12)
    with pytest.raises(ValueError, match="model: expected a network with classes"):
        guided(denoiser, LABELS[:2], ConstantGuidance(2.0))
