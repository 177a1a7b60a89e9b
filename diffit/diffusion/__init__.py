"""Diffusion: noise levels, losses, samplers and guidance, for any network with their protocols."""

from diffit.diffusion.dpm_solver import dpm_solver_sample
from diffit.diffusion.edm import EDMDenoiser, edm_loss, edm_sample, edm_sigmas
from diffit.diffusion.gaussian import GaussianDiffusion
from diffit.diffusion.guidance import (
    ConstantGuidance,
    Guidance,
    Guided,
    IntervalGuidance,
    PowerCosineGuidance,
    guided,
)
from diffit.diffusion.noise import ImageNoise

__all__ = [
    "ConstantGuidance",
    "EDMDenoiser",
    "GaussianDiffusion",
    "Guidance",
    "Guided",
    "ImageNoise",
    "IntervalGuidance",
    "PowerCosineGuidance",
    "dpm_solver_sample",
    "edm_loss",
    "edm_sample",
    "edm_sigmas",
    "guided",
]
