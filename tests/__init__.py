"""The tests. Without a GPU, Triton's interpreter runs its kernels; it has to be asked before."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
