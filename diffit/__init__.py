"""DiffiT networks (Diffusion Vision Transformers, ECCV 2024) on fused operators."""

from diffit_kernels import __version__

__all__ = ["__version__"]
