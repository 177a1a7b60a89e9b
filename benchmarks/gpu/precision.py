"""The precisions that a GPU is measured in: a dtype, and for float32 with or without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# In the order of what they are worth to who trains and samples.
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
}


@contextmanager
def using(precision: str) -> Iterator[torch.dtype]:
    """The dtype of a precision; products of float32 use TF32 if it says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield PRECISIONS[precision]
    finally:
        torch.set_float32_matmul_precision(before)
