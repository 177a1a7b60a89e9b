"""DPM-Solver++ through diffusers, against its formula in float64 and an exact solution."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from diffit.diffusion import GaussianDiffusion, ImageNoise, dpm_solver_sample
from tests.diffit.diffusion.toys import waves
from tests.numeric_rule import assert_numeric_rule

SHAPE = (2, 4, 3, 5)


ABAR = GaussianDiffusion().alphas_cumprod


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nearly that of data which is N(0, 1/4), and not linear: (B, 2C, H, W)."""
    a = ABAR[t].to(x.dtype).view(-1, 1, 1, 1)
    eps = (1 - a).sqrt() * x / (a / 4 + 1 - a) + 0.1 * torch.sin(3 * x)
    return torch.cat([eps, eps], dim=1)


def steps_of(num_steps: int) -> list[int]:
    """Evenly from 999, without the last, 0."""
    return [round(999 * i / num_steps) for i in range(num_steps, 0, -1)]


def multistep(x: Tensor, num_steps: int) -> Tensor:
    """Algorithm 2 of Lu et al. 2022, its last step of first order, in the dtype of x."""
    abar = ABAR.tolist()
    alphas = [math.sqrt(abar[t]) for t in steps_of(num_steps)] + [1.0]
    sigmas = [math.sqrt(1 - abar[t]) for t in steps_of(num_steps)] + [0.0]
    lambdas = [math.log(a / s) if s else math.inf for a, s in zip(alphas, sigmas, strict=True)]
    before = None
    for i, t in enumerate(steps_of(num_steps)):
        eps = model(x, torch.full((len(x),), t))[:, : x.shape[1]]
        x0 = (x - sigmas[i] * eps) / alphas[i]
        d = x0
        h = lambdas[i + 1] - lambdas[i]
        if before is not None and i < num_steps - 1:
            d = x0 + h / (2 * (lambdas[i] - lambdas[i - 1])) * (x0 - before)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * d
        before = x0
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 20, 25])
def test_equals_its_formula(num_steps: int) -> None:
    """The numeric rule: diffusers keeps coefficients in float32 and rounds the state to it."""
    x = waves(0, SHAPE)
    got = dpm_solver_sample(model, x, num_steps=num_steps)
    assert got.dtype == torch.float64
    plain, truth = multistep(x.float(), num_steps), multistep(x, num_steps)
    assert_numeric_rule({"x": got}, {"x": plain.double()}, {"x": truth})


@pytest.mark.parametrize("num_steps", [2, 20])
def test_formula_equals_that_of_diffusers(num_steps: int) -> None:
    """To 1e-9, where the updates of the scheduler get coefficients and state in float64."""
    scheduler = pytest.importorskip("diffusers").DPMSolverMultistepScheduler()
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == steps_of(num_steps)
    abar = ABAR[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), abar.new_zeros(1)])
    x, outputs = waves(0, SHAPE), []
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        eps = model(x, t.expand(len(x)))[:, :4]
        outputs.append(scheduler.convert_model_output(eps, sample=x))
        if 0 < i < num_steps - 1:
            x = scheduler.multistep_dpm_solver_second_order_update(outputs[-2:], sample=x)
        else:
            x = scheduler.dpm_solver_first_order_update(outputs[-1], sample=x)
    torch.testing.assert_close(x, multistep(waves(0, SHAPE), num_steps), rtol=1e-9, atol=1e-9)


def test_image_depends_on_its_seed_only() -> None:
    def sample(seeds: list[int]) -> Tensor:
        return dpm_solver_sample(model, ImageNoise(seeds).randn((len(seeds), 3, 5, 7)))

    together = sample([9, 4, 0, 77, 5, 3, 2])
    for sizes in ([[9], [4], [0], [77], [5], [3], [2]], [[9, 4, 0], [77, 5, 3], [2]]):
        assert torch.equal(torch.cat([sample(seeds) for seeds in sizes]), together)


def test_wrong_arguments() -> None:
    x = waves(0, SHAPE)
    for num_steps in (0, 1000):
        with pytest.raises(ValueError, match=f"num_steps: expected 1..999, got {num_steps}"):
            dpm_solver_sample(model, x, num_steps=num_steps)
    with pytest.raises(
        ValueError, match="diffusion: expected a process without respacing, got 250"
    ):
        dpm_solver_sample(model, x, diffusion=GaussianDiffusion(respacing=250))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^diffusers is needed here .* 'diffit\[latent\]'$"):
        dpm_solver_sample(model, waves(0, SHAPE))


def test_is_optional() -> None:
    """Importing the packages that can use diffusers does not import it."""
    code = "import sys, diffit.diffusion, diffit.models.vae; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
