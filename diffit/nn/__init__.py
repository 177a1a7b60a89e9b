"""Layers: thin compositions of the operators in ``diffit_kernels``."""

from diffit.nn.block import MLP, DiffiTBlock
from diffit.nn.resblock import DiffiTResBlock
from diffit.nn.tmsa import TMSA, TMSA2d

__all__ = ["MLP", "TMSA", "DiffiTBlock", "DiffiTResBlock", "TMSA2d"]
