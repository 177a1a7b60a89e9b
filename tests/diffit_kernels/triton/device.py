"""Cases on the device of the Triton kernels: a GPU, else the interpreter on the CPU."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tests.cases import AddLayerNormCase, MLPCase
from tests.numeric_rule import assert_numeric_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds and multiplies bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16) + (torch.bfloat16,) * (DEVICE == "cuda")

Case = TypeVar("Case", MLPCase, AddLayerNormCase)


def on_device(x: Tensor) -> Tensor:
    """The same view of the same memory."""
    if DEVICE == "cpu":
        return x.detach()
    memory = x.detach().untyped_storage().cuda()
    return x.new_empty(0, device=DEVICE).set_(memory, x.storage_offset(), x.shape, x.stride())


def outputs(case: Case, draws: int | None = None) -> dict[str, Tensor]:
    """What the operator of a case gives there, brought back."""
    return {name: x.cpu() for name, x in case.operator(draws, on_device).items()}


def check(case: Case) -> None:
    assert_numeric_rule(outputs(case), case.plain(), case.truth())


def name_of(value: object) -> str | None:
    """Test ids that say the shape or the dtype."""
    if isinstance(value, MLPCase):
        return f"{'x'.join(map(str, value.shape))}-{value.hidden}-{value.out}"
    if isinstance(value, tuple):
        return "x".join(map(name_of, value))
    return str(value).removeprefix("torch.")
