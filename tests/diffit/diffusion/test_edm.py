"""EDM: preconditioning, loss, and the sampler against exact solutions and k-diffusion's numbers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffit.diffusion import EDMDenoiser, ImageNoise, edm_loss, edm_sample, edm_sigmas
from tests.diffit.diffusion.toys import ToyImage, denoiser, gaussian_denoiser, waves

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "edm_k_diffusion.json").read_text())
SHAPE = (2, 1, 2, 3)


def close(got: Tensor, expected: Tensor | list[float] | float, rtol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected.view_as(got), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["options"]))
def test_equals_k_diffusion(case: dict[str, Any]) -> None:
    """Recorded; k-diffusion counts the noise of a step even where it adds none."""
    options = case["options"]
    sigmas = edm_sigmas(options["num_steps"])
    close(sigmas, case["sigmas"])
    s_min, s_max = options.get("s_min", 0.0), options.get("s_max", math.inf)
    noisy = iter([i for i, s in enumerate(sigmas[:-1].tolist()) if s_min <= s <= s_max])
    x = edm_sample(
        denoiser, waves(0, SHAPE), **options, randn_like=lambda x: waves(1 + next(noisy), x.shape)
    )
    assert x.dtype == torch.float64
    close(x, case["sample"])


def test_two_steps_by_hand() -> None:
    """A denoiser k x: with r = 1 - k, dx/dsigma = r x / sigma, worked out on paper."""
    k, first, last, gamma, s_noise = 0.3, 10.0, 0.5, math.sqrt(2) - 1, 1.01
    r = 1 - k
    x, noise = waves(0, SHAPE), waves(1, SHAPE)

    def heun(hat: float, sigma_next: float) -> float:
        h = sigma_next - hat
        return 1 + h * (r / hat + r / sigma_next * (1 + h * r / hat)) / 2

    options: dict[str, Any] = {"num_steps": 2, "sigma_min": last, "sigma_max": first}
    close(edm_sample(lambda x, s: k * x, x, **options), x * first * heun(first, last) * k)

    hat, last_hat = first * (1 + gamma), last * (1 + gamma)
    churned = (x * first + math.sqrt(hat**2 - first**2) * s_noise * noise) * heun(hat, last)
    churned = (churned + math.sqrt(last_hat**2 - last**2) * s_noise * noise) * k
    got = edm_sample(
        lambda x, s: k * x, x, **options, s_churn=9, s_noise=s_noise, randn_like=lambda x: noise
    )
    close(got, churned)


def test_one_step_denoises_once() -> None:
    x = waves(0, SHAPE)
    close(edm_sample(denoiser, x, num_steps=1), denoiser(80 * x, torch.full((2,), 80.0)))


def test_second_order() -> None:
    """Gaussian data: x sqrt(sd^2 + sigma^2) is the flow; twice the steps, a quarter of the error.

    The last step, to sigma = 0, is Euler's and known exactly.
    """
    deviation, low, high = 0.5, 0.002, 80.0
    x = waves(0, SHAPE)
    flow = math.sqrt((deviation**2 + low**2) / (deviation**2 + high**2))
    exact = x * high * flow * deviation**2 / (deviation**2 + low**2)
    errors = [
        (edm_sample(gaussian_denoiser(deviation), x, num_steps=n) - exact).abs().max().item()
        for n in (65, 129, 257)
    ]
    for coarse, fine in pairwise(errors):
        assert 3.8 < coarse / fine < 4.2


def test_number_of_evaluations() -> None:
    """35 for 18 steps (EDM, table 2)."""
    seen: list[Tensor] = []

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        assert x.dtype == sigma.dtype == torch.float64
        return denoiser(x, sigma)

    edm_sample(recording, torch.zeros(3, 1, 2, 2))
    assert len(seen) == 35
    assert all(sigma.shape == (3,) for sigma in seen)


def test_keeps_to_the_networks_noise_levels() -> None:
    network = EDMDenoiser(ToyImage(), sigma_min=0.1, sigma_max=5.0)
    x = waves(0, (1, 2, 4, 4))
    expected = edm_sample(EDMDenoiser(ToyImage()), x, sigma_min=0.1, sigma_max=5.0)
    assert torch.equal(edm_sample(network, x), expected)


def test_denoiser_is_its_formula() -> None:
    """At the odd sigmas and at sigma = sd, where c_skip is 1/2; float32 around the network."""
    network, sd = ToyImage(), 0.6
    sigma = torch.tensor([0.002, 0.6, 77.7])
    x, labels = waves(0, (3, 2, 4, 4)), torch.eye(3)
    augment = waves(1, (3, 9)).float()
    got = EDMDenoiser(network, sd)(x, sigma, labels, augment_labels=augment)
    s = sigma.double().view(-1, 1, 1, 1)
    inner = ToyImage(dtype=torch.float64)(
        x / (s**2 + sd**2).sqrt(), sigma.double().log() / 4, labels, augment
    )
    c_out = s * sd / (s**2 + sd**2).sqrt()
    assert got.dtype == torch.float32
    close(got, sd**2 / (s**2 + sd**2) * x + c_out * inner, rtol=1e-5)
    assert EDMDenoiser(network, sd)(x, 0.6).shape == x.shape  # one sigma for all


def test_class_ids_are_one_hot_rows() -> None:
    network = EDMDenoiser(ToyImage())
    x, sigma = waves(0, (4, 2, 4, 4)), torch.full((4,), 2.0)
    rows = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    assert torch.equal(network(x, sigma, torch.arange(4)), network(x, sigma, rows))
    assert torch.equal(network(x, sigma, torch.full((4,), 3)), network(x, sigma))


def test_network_in_bfloat16() -> None:
    """Weights in bfloat16: the result is float32, and as close as bfloat16 lets it be."""
    x, sigma = waves(0, (2, 2, 4, 4)), torch.tensor([0.1, 30.0])
    got = EDMDenoiser(ToyImage(dtype=torch.bfloat16))(x, sigma, torch.tensor([0, 2]))
    expected = EDMDenoiser(ToyImage())(x, sigma, torch.tensor([0, 2]))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.5 * 2**-6)


class KnowsNothing(nn.Module):
    """F = 0."""

    img_resolution, img_channels, label_dim = 8, 3, 0

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: None) -> Tensor:
        return torch.zeros_like(x)


def test_loss_of_a_network_that_knows_nothing_is_one() -> None:
    """In expectation, at every noise level: what the weight is made for."""
    noise = ImageNoise(range(4000))
    images = 0.6 * noise.randn((4000, 3, 8, 8))
    loss = edm_loss(EDMDenoiser(KnowsNothing(), 0.6), images, randn_like=noise.randn_like)
    assert abs(loss.mean().item() - 1) < 4 * loss.std().item() / math.sqrt(4000)
    assert loss.std() < 0.2


def test_loss_is_its_formula() -> None:
    """ln sigma = -1.2 + 1.2 n, in float64 beside it; labels and augmentation pass through."""
    images = waves(0, (5, 2, 4, 4)).float()
    labels, augment = torch.tensor([0, 1, 2, 3, 1]), waves(3, (5, 9)).float()
    network = EDMDenoiser(ToyImage(), 0.6)
    draws = {(5,): waves(1, (5,)).float(), (5, 2, 4, 4): waves(2, (5, 2, 4, 4)).float()}
    loss = edm_loss(
        network, images, labels, randn_like=lambda x: draws[*x.shape], augment_labels=augment
    )
    s = (-1.2 + 1.2 * draws[5,].double()).exp()
    noisy = images.double() + s.view(-1, 1, 1, 1) * draws[5, 2, 4, 4].double()
    denoised = EDMDenoiser(ToyImage(), 0.6)(noisy, s, labels, augment_labels=augment)
    error = (denoised.double() - images.double()).square().mean((1, 2, 3))
    assert loss.shape == (5,)
    close(loss, (s**2 + 0.36) / (s * 0.6) ** 2 * error, rtol=1e-5)


def test_loss_of_parts_is_the_loss_of_the_batch() -> None:
    """Noise by seed: accumulation and more processes change neither loss nor gradient."""
    images, labels = waves(0, (7, 2, 4, 4)).float(), torch.arange(7) % 4
    seeds = list(range(40, 47))

    def run(sizes: list[int]) -> tuple[Tensor, Tensor]:
        network = EDMDenoiser(ToyImage())
        losses = []
        for part in torch.arange(7).split(sizes):
            noise = ImageNoise([seeds[i] for i in part])
            loss = edm_loss(network, images[part], labels[part], randn_like=noise.randn_like)
            (loss.sum() / 7).backward()
            losses.append(loss.detach())
        gradient = network.model.gain.grad
        assert gradient is not None
        return torch.cat(losses), gradient

    loss, gradient = run([7])
    for sizes in ([1] * 7, [3, 3, 1]):
        part_loss, part_gradient = run(sizes)
        assert torch.equal(part_loss, loss)
        torch.testing.assert_close(part_gradient, gradient)
    assert gradient != 0


def test_loss_of_a_wrapped_denoiser() -> None:
    network, images = EDMDenoiser(ToyImage(), 0.7), waves(0, (2, 2, 4, 4)).float()
    noise = [ImageNoise([1, 2]).randn_like for _ in range(2)]
    wrapped = edm_loss(
        lambda *a, **k: network(*a, **k), images, sigma_data=0.7, randn_like=noise[0]
    )
    assert torch.equal(wrapped, edm_loss(network, images, randn_like=noise[1]))


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [3, 4]])
def test_image_depends_on_its_seed_only(s_churn: float, sizes: list[int]) -> None:
    """Bit for bit."""

    def sample(seeds: list[int]) -> Tensor:
        noise = ImageNoise(seeds)
        x = noise.randn((len(seeds), 3, 5, 7))
        labels = noise.randint(10)
        return edm_sample(
            lambda x, s: denoiser(x, s) + 0.01 * labels.view(-1, 1, 1, 1),
            x,
            num_steps=5,
            s_churn=s_churn,
            randn_like=noise.randn_like,
        )

    seeds = [9, 4, 0, 77, 5, 3, 2]
    together = sample(seeds)
    parts = [sample([int(s) for s in part]) for part in torch.tensor(seeds).split(sizes)]
    assert torch.equal(torch.cat(parts), together)
    assert torch.equal(sample(seeds[::-1]), together.flip(0))
    assert len(together.flatten(1).unique(dim=0)) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"sigma_min": 80.0}, "sigma_min: expected 0 < sigma_min < sigma_max < inf, got sigma_min"),
        ({"sigma_min": 0.0}, "sigma_min: expected 0 < sigma_min < sigma_max < inf, got sigma_min"),
        ({"sigma_max": math.inf}, "sigma_min: expected 0 < sigma_min < sigma_max < inf"),
        ({"rho": 0.0}, "rho: expected a positive number, got 0.0"),
        ({"s_churn": -1.0}, "s_churn: expected at least 0, got -1.0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edm_sample(denoiser, waves(0, SHAPE), **options)


def test_wrong_denoiser() -> None:
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        EDMDenoiser(ToyImage(), 0.0)
    with pytest.raises(ValueError, match="sigma_min: expected 0 <= sigma_min < sigma_max = 1"):
        EDMDenoiser(ToyImage(), sigma_min=2.0, sigma_max=1.0)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 4]), ValueError, r"expected 0..2, or 3 for no class, got 4"),
        (torch.tensor([-1, 0]), ValueError, r"expected 0..2, or 3 for no class, got -1"),
        (torch.tensor([0.0, 1.0]), TypeError, "expected integers, got torch.float32"),
        (torch.zeros(2, 4), ValueError, r"expected \(B,\) ids or \(B, 3\) one-hot, got shape"),
    ],
)
def test_wrong_labels(labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"class_labels: {message}"):
        EDMDenoiser(ToyImage())(waves(0, (2, 2, 4, 4)), torch.ones(2), labels)
