"""Measures parameters of the Triton kernels on a GPU: ``python -m diffit_kernels.tune``."""
