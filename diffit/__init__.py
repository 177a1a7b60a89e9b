"""DiffiT networks (Diffusion Vision Transformers, ECCV 2024) on fused operators."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffit_kernels import __version__

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """The version, when it is asked for: it comes with PyTorch, which takes seconds to import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffit_kernels import __version__

    return __version__
