"""The networks: image-space and latent DiffiT, what the paper compares, presets, files."""

from diffit.models.base import DiffusionNetwork, ImageNetwork
from diffit.models.ddpmpp import DDPMpp
from diffit.models.image import ImageDiffiT
from diffit.models.latent import LatentDiffiT
from diffit.models.mla import ViTMLA
from diffit.models.presets import Preset, Sampling
from diffit.models.registry import PRESETS, create_model, get_preset, list_models, load_model
from diffit.models.weights import save_weights

__all__ = [
    "PRESETS",
    "DDPMpp",
    "DiffusionNetwork",
    "ImageDiffiT",
    "ImageNetwork",
    "LatentDiffiT",
    "Preset",
    "Sampling",
    "ViTMLA",
    "create_model",
    "get_preset",
    "list_models",
    "load_model",
    "save_weights",
]
