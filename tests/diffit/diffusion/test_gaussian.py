"""GaussianDiffusion against Bayes' rule, exact solutions, and diffusers' schedulers in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.diffusion import GaussianDiffusion, ImageNoise
from tests.diffit.diffusion.toys import ToyLatent, noise_and_range, waves

SHAPE = (1, 4, 3, 5)
RTOL = 1e-9


def close(got: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype).expand_as(got)
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=RTOL)


def test_linear_schedule() -> None:
    """The betas of DDPM, and their product with plain numbers."""
    diffusion = GaussianDiffusion()
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    product = 1.0
    for i, beta in enumerate(betas):
        product *= 1 - beta
        assert float(diffusion.betas[i]) == pytest.approx(beta, rel=1e-12)
        assert float(diffusion.alphas_cumprod[i]) == pytest.approx(product, rel=1e-12)
    half = GaussianDiffusion(500)
    assert float(half.betas[0]) == pytest.approx(2e-4, rel=1e-12)
    assert float(half.betas[-1]) == pytest.approx(0.04, rel=1e-12)


def test_respacing() -> None:
    steps = GaussianDiffusion(respacing=250).timestep_map
    assert steps.dtype == torch.int64
    assert steps[:5].tolist() == [0, 4, 8, 12, 16]
    assert steps[-1] == 999
    gaps = steps.diff().tolist()
    assert set(gaps) == {4, 5}
    assert gaps.count(5) == 999 - 249 * 4
    assert GaussianDiffusion(respacing="ddim50").timestep_map.tolist() == list(range(0, 1000, 20))
    assert GaussianDiffusion(respacing=1).timestep_map.tolist() == [0]
    assert GaussianDiffusion().timestep_map.tolist() == list(range(1000))
    # 10 * 49.95 = 499.5 rounds to 500; added up, as IDDPM does, it stays below.
    assert GaussianDiffusion(respacing=21).timestep_map[10] == 499


def test_respaced_process_has_the_same_marginals() -> None:
    full, spaced = GaussianDiffusion(), GaussianDiffusion(respacing=250)
    assert len(spaced) == 250
    close(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map])
    close(torch.cumprod(1 - spaced.betas, 0), spaced.alphas_cumprod)


@pytest.mark.parametrize("respacing", [None, 250, "ddim50"])
def test_posterior_by_bayes(respacing: int | str | None) -> None:
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two Gaussians."""
    diffusion = GaussianDiffusion(respacing=respacing)
    x0, x = 0.7, -1.1
    for i in (1, 2, len(diffusion) - 1):
        beta, before = float(diffusion.betas[i]), float(diffusion.alphas_cumprod[i - 1])
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) * x / beta + math.sqrt(before) * x0 / (1 - before)) / precision
        abar = float(diffusion.alphas_cumprod[i])
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        for v, log_variance in (
            (-1.0, -math.log(precision)),
            (1.0, math.log(beta)),
            (0.2, 0.6 * math.log(beta) - 0.4 * math.log(precision)),
        ):
            out = torch.tensor([eps, v], dtype=torch.float64).view(1, 2, 1, 1)
            p = diffusion.p_mean_variance(
                lambda x, t, out=out: out,
                torch.full((1, 1, 1, 1), x, dtype=torch.float64),
                torch.tensor([i]),
            )
            close(p.mean, mean)
            close(p.pred_xstart, x0)
            close(p.log_variance, log_variance)
            close(p.variance, math.exp(log_variance))


def test_variances_that_are_not_learned() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False, respacing=250)
    x, t = waves(0, (250, 1, 1, 2)), torch.arange(250)
    p = diffusion.p_mean_variance(lambda x, t: 0 * x, x, t)
    close(p.variance[1:], diffusion.betas[1:].view(-1, 1, 1, 1).expand(-1, 1, 1, 2))
    beta, before, abar = (
        diffusion.betas[1],
        diffusion.alphas_cumprod[0],
        diffusion.alphas_cumprod[1],
    )
    close(p.variance[0], float(beta * (1 - before) / (1 - abar)))


def test_q_sample() -> None:
    diffusion = GaussianDiffusion()
    x0, noise, t = waves(0, (3, 2, 2, 2)), waves(1, (3, 2, 2, 2)), torch.tensor([0, 500, 999])
    got = diffusion.q_sample(x0, t, noise)
    for i in range(3):
        abar = float(diffusion.alphas_cumprod[t[i]])
        close(got[i], math.sqrt(abar) * x0[i] + math.sqrt(1 - abar) * noise[i])
    assert diffusion.q_sample(x0.float(), t).dtype == torch.float32


def test_clipping() -> None:
    diffusion, x, t = GaussianDiffusion(), waves(0, SHAPE) * 3, torch.tensor([10])
    plain = diffusion.p_mean_variance(noise_and_range, x, t).pred_xstart
    clipped = diffusion.p_mean_variance(noise_and_range, x, t, clip_denoised=True).pred_xstart
    assert plain.abs().max() > 1
    assert torch.equal(clipped, plain.clamp(-1, 1))


def scheduler_in_float64(name: str, **options: Any) -> Any:
    """diffusers keeps its coefficients in float32; with ours of float64 it computes in float64."""
    diffusers = pytest.importorskip("diffusers")
    full = GaussianDiffusion()
    scheduler = getattr(diffusers, name)(
        trained_betas=full.betas.tolist(), clip_sample=False, **options
    )
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), full.alphas_cumprod, rtol=1e-3, atol=0
    )
    scheduler.alphas_cumprod = full.alphas_cumprod
    return scheduler


@pytest.mark.parametrize("respacing", [None, 250, 20])
def test_ddpm_equals_diffusers(respacing: int | None) -> None:
    diffusion = GaussianDiffusion(respacing=respacing)
    scheduler = scheduler_in_float64("DDPMScheduler", variance_type="learned_range")
    scheduler.set_timesteps(timesteps=diffusion.timestep_map.flip(0).tolist())
    x = waves(0, SHAPE)
    got = diffusion.p_sample_loop(noise_and_range, x, randn_like=ImageNoise([5]).randn_like)
    generator = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(noise_and_range(x, t[None]), t, x, generator=generator).prev_sample
    assert got.dtype == torch.float64
    close(got, x)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_diffusers(eta: float) -> None:
    diffusion = GaussianDiffusion(respacing="ddim50")
    scheduler = scheduler_in_float64("DDIMScheduler", timestep_spacing="leading")
    scheduler.set_timesteps(50)
    x = waves(0, SHAPE)
    got = diffusion.ddim_sample_loop(noise_and_range, x, eta, randn_like=ImageNoise([5]).randn_like)
    generator = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        eps = noise_and_range(x, t[None])[:, :4]
        x = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample
    close(got, x)


def exact_noise(deviation: float) -> Any:
    """E[noise | x_t] of data that is N(0, deviation^2)."""
    abar = GaussianDiffusion().alphas_cumprod

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * x / (a * deviation**2 + 1 - a)

    return model


def test_ddim_is_a_first_order_solver() -> None:
    """Gaussian data: x over its deviation is what the flow keeps. Twice the steps, half the error.

    To the first step's level; the flow from there to no noise at all is not refined by respacing.
    """
    deviation, abar = 0.5, GaussianDiffusion().alphas_cumprod
    x = waves(0, SHAPE)

    def spread(a: float) -> float:
        return math.sqrt(a * deviation**2 + 1 - a)

    errors = []
    for steps in (101, 201, 401):
        diffusion = GaussianDiffusion(learn_sigma=False, respacing=steps)
        got = diffusion.ddim_sample_loop(exact_noise(deviation), x)
        first = float(abar[0])
        last_step = math.sqrt(first) * deviation**2 / (first * deviation**2 + 1 - first)
        exact = x * spread(first) / spread(float(abar[-1])) * last_step
        errors.append((got - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_ddpm_samples_the_data() -> None:
    """Gaussian data: every step is linear, so the deviation of what the chain makes is known."""
    deviation, diffusion = 0.5, GaussianDiffusion(learn_sigma=False)
    steps = diffusion.p_mean_variance(
        exact_noise(deviation), torch.ones(1000, 1, 1, 1, dtype=torch.float64), torch.arange(1000)
    )
    variance = 1.0
    for i in reversed(range(1000)):
        added = float(steps.variance[i]) if i else 0.0
        variance = float(steps.mean[i]) ** 2 * variance + added
    assert math.sqrt(variance) == pytest.approx(deviation, rel=0.01)


def test_model_sees_steps_of_the_full_process() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return noise_and_range(x, t)

    diffusion = GaussianDiffusion(respacing=20)
    diffusion.p_sample_loop(model, waves(0, (2, 1, 2, 2)))
    assert [t.tolist() for t in seen] == [[t, t] for t in diffusion.timestep_map.flip(0).tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_network_sees_its_own_dtype(dtype: torch.dtype) -> None:
    """ToyLatent asserts it; a callable without parameters sees that of the noise."""
    network = ToyLatent(dtype=dtype)
    bound = _Bound(network)
    diffusion = GaussianDiffusion(respacing=3)
    for x in (waves(0, SHAPE), waves(0, SHAPE).float()):
        assert diffusion.p_sample_loop(bound, x).dtype == torch.float64
        assert diffusion.ddim_sample_loop(bound, x).dtype == torch.float64
    noise = waves(0, SHAPE).to(dtype)
    y = torch.zeros(1, dtype=torch.int64)
    assert diffusion.p_sample_loop(lambda x, t: network(x, t, y), noise).dtype == torch.float64


class _Bound(torch.nn.Module):
    def __init__(self, network: ToyLatent) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, torch.zeros_like(t))


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [3, 4]])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim eta"])
def test_image_depends_on_its_seed_only(sampler: str, sizes: list[int]) -> None:
    """Bit for bit."""
    diffusion = GaussianDiffusion(respacing=6)

    def sample(seeds: list[int]) -> Tensor:
        noise = ImageNoise(seeds)
        x = noise.randn((len(seeds), 3, 5, 7))
        if sampler == "ddpm":
            return diffusion.p_sample_loop(noise_and_range, x, randn_like=noise.randn_like)
        eta = 0.7 if sampler == "ddim eta" else 0.0
        return diffusion.ddim_sample_loop(noise_and_range, x, eta, randn_like=noise.randn_like)

    seeds = [9, 4, 0, 77, 5, 3, 2]
    together = sample(seeds)
    parts = [sample([int(s) for s in part]) for part in torch.tensor(seeds).split(sizes)]
    assert torch.equal(torch.cat(parts), together)
    assert torch.equal(sample(seeds[::-1]), together.flip(0))
    assert len(together.flatten(1).unique(dim=0)) == 7


def constant(eps: Tensor, v: float) -> Any:
    return lambda x, t: torch.cat([eps, torch.full_like(eps, v)], dim=1).to(x.dtype)


def test_losses_by_hand() -> None:
    """Steps 1 and more: the divergence of two Gaussians; (IDDPM, eq. 6), with plain numbers."""
    diffusion = GaussianDiffusion(respacing=250)
    x0, noise, eps, v = 0.3, 0.8, 0.6, 0.2
    for i in (1, 100, 249):
        abar, before = float(diffusion.alphas_cumprod[i]), float(diffusion.alphas_cumprod[i - 1])
        beta = 1 - abar / before
        q = beta * (1 - before) / (1 - abar)
        p = math.exp(0.6 * math.log(beta) + 0.4 * math.log(q))
        weight = beta * math.sqrt(before) / (1 - abar)
        shift = weight * math.sqrt((1 - abar) / abar) * (noise - eps)
        nats = (math.log(p / q) - 1 + q / p + shift**2 / p) / 2
        ones = torch.ones(2, 1, 2, 2, dtype=torch.float64)
        losses = diffusion.training_losses(
            constant(eps * ones, v), x0 * ones, torch.tensor([i, i]), noise * ones
        )
        assert losses.vb is not None
        close(losses.mse, (noise - eps) ** 2)
        close(losses.vb, nats / math.log(2) * 250 / 1000)
        close(losses.loss, losses.mse + losses.vb)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
def test_first_step_codes_a_level(level: int) -> None:
    """Step 0: the probability of one of 256 levels, by math.erf; the outer levels reach on."""
    diffusion = GaussianDiffusion()
    x0, noise, eps, v = level / 127.5 - 1, 0.5, 0.4, 0.5
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    losses = diffusion.training_losses(
        constant(eps * ones, v), x0 * ones, torch.tensor([0]), noise * ones
    )
    abar = 1 - 1e-4
    mean = (math.sqrt(abar) * x0 + math.sqrt(1 - abar) * (noise - eps)) / math.sqrt(abar)
    second = float(diffusion.betas[1]) * 1e-4 / (1 - float(diffusion.alphas_cumprod[1]))
    deviation = math.exp((0.75 * math.log(1e-4) + 0.25 * math.log(second)) / 2)

    def below(x: float) -> float:
        return (1 + math.erf((x - mean) / deviation / math.sqrt(2))) / 2

    low = below(x0 - 1 / 255) if level > 0 else 0.0
    high = below(x0 + 1 / 255) if level < 255 else 1.0
    assert losses.vb is not None
    close(losses.vb, -math.log2(high - low))


def test_perfect_model_loses_nothing() -> None:
    """Noise known and the variance that of the posterior: no loss at any step but the first."""
    diffusion = GaussianDiffusion(respacing=50)
    noise = waves(0, (49, 1, 2, 2))
    losses = diffusion.training_losses(
        constant(noise, -1.0), waves(1, (49, 1, 2, 2)), torch.arange(1, 50), noise
    )
    assert losses.vb is not None
    close(losses.loss, 0.0)
    close(losses.vb, 0.0)


def test_bound_trains_the_variance_only() -> None:
    """The mean is held fixed in vb; without a learned variance there is no vb."""
    eps = waves(0, (3, 1, 2, 2)).requires_grad_()
    v = (waves(1, (3, 1, 2, 2)) / 2).requires_grad_()
    x0, noise, t = waves(2, (3, 1, 2, 2)) / 2, waves(3, (3, 1, 2, 2)), torch.tensor([0, 1, 999])
    losses = GaussianDiffusion().training_losses(
        lambda x, t: torch.cat([eps, v], dim=1), x0, t, noise
    )
    assert losses.vb is not None
    eps_grad, v_grad = torch.autograd.grad(losses.loss.sum(), [eps, v])
    close(eps_grad, 2 * (eps.detach() - noise) / 4)
    assert v_grad.isfinite().all()
    assert (v_grad[1:] != 0).all()

    fixed = GaussianDiffusion(learn_sigma=False).training_losses(lambda x, t: eps, x0, t, noise)
    assert fixed.vb is None
    close(fixed.loss, losses.mse.detach())


def test_losses_in_float32() -> None:
    """In the dtype of x0: within 1e-4 of float64, the smallest variances included."""
    diffusion = GaussianDiffusion()
    x0, noise, t = waves(2, (1000, 1, 2, 2)), waves(3, (1000, 1, 2, 2)), torch.arange(1000)
    exact = diffusion.training_losses(noise_and_range, x0, t, noise)
    got = diffusion.training_losses(noise_and_range, x0.float(), t, noise.float())
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("respacing", [0, -1, 1001, "ddim600", "ddim0", "ddim", "250", 2.5])
def test_unknown_respacing(respacing: Any) -> None:
    with pytest.raises(ValueError, match=f"respacing: expected None, .* got {respacing!r}"):
        GaussianDiffusion(respacing=respacing)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 21, got 0"):
        GaussianDiffusion(0)
    with pytest.raises(ValueError, match="schedule: expected 'linear', got 'cosine'"):
        GaussianDiffusion(schedule="cosine")
    diffusion, x = GaussianDiffusion(respacing=250), waves(0, (2, 4, 3, 5))
    for t in (torch.tensor([0, 250]), torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match=r"t: expected 0..249, got \["):
            diffusion.p_mean_variance(noise_and_range, x, t)
        with pytest.raises(ValueError, match=r"t: expected 0..249, got \["):
            diffusion.q_sample(x, t)
    with pytest.raises(ValueError, match=r"noise: expected the shape of x0, \(2, 4, 3, 5\), got"):
        diffusion.q_sample(x, torch.tensor([0, 1]), x[:1])
    with pytest.raises(ValueError, match=r"t: expected \(2,\), integers, got shape \(1,\)"):
        diffusion.p_mean_variance(noise_and_range, x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"model: expected outputs \(2, 8, 3, 5\) for learn_sigma"):
        diffusion.p_mean_variance(lambda x, t: x, x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"eta: expected 0..1, got 1.5"):
        diffusion.ddim_sample_loop(noise_and_range, x, 1.5)
