"""DPM-Solver++ (Lu et al. 2022), of second order with several steps: diffusers' scheduler, run."""

from __future__ import annotations

import torch
from torch import Tensor

from diffit.diffusion.gaussian import GaussianDiffusion, Model, in_dtype
from diffit.extras import import_extra


@torch.no_grad()
def dpm_solver_sample(
    model: Model, noise: Tensor, *, num_steps: int = 20, diffusion: GaussianDiffusion | None = None
) -> Tensor:
    """Sample with few evaluations, one a step; deterministic. Needs the extra ``latent``.

    Args:
        model: ``model(x, t)``, as for ``GaussianDiffusion``.
        noise: (B, C, H, W), normal.
        num_steps: 20 to 25 are usual.
        diffusion: the process that the model was trained on, without respacing; None: 1000 linear
            steps with a learned variance.

    Returns:
        (B, C, H, W), float64. The scheduler itself computes a step in float32.

    Raises:
        ImportError: diffusers is missing.
        ValueError: an argument that does not fit, naming it.
    """
    diffusion = diffusion or GaussianDiffusion()
    full = int(diffusion.timestep_map[-1]) + 1
    if len(diffusion) != full:
        raise ValueError(
            f"diffusion: expected a process without respacing, got {len(diffusion)} of its steps"
        )
    if not 1 <= num_steps < full:
        raise ValueError(f"num_steps: expected 1..{full - 1}, got {num_steps}")
    scheduler = import_extra("diffusers", "latent").DPMSolverMultistepScheduler(
        num_train_timesteps=full,
        trained_betas=diffusion.betas.tolist(),
        algorithm_type="dpmsolver++",
        solver_order=2,
    )
    scheduler.set_timesteps(num_steps)
    model = in_dtype(model, noise.dtype)
    x = noise.double()
    for t in scheduler.timesteps:
        eps, _ = diffusion.predict(model, x, torch.full((len(x),), int(t), device=x.device))
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x
