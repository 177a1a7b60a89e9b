"""The numeric rule for the CUDA C++ kernels: on the GPU, or in the emulator without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels import cuda, reference
from tests.cases import LAYOUTS, AttentionCase
from tests.diffit_kernels.cuda.emulated import emulated
from tests.numeric_rule import assert_numeric_rule

DEVICE = "cpu" if cuda.unavailable() else "cuda"
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (8, 32, 40, 64, 72, 128)

# Window, windows of the grid, heads, batch. Four windows of up to 16 tokens go to a block, and a
# sample has no multiple of that.
SHAPES = [
    ((1, 1), (3, 3), 2, 3),
    ((3, 5), (3, 2), 2, 1),
    ((4, 4), (1, 3), 1, 3),
    ((7, 7), (1, 2), 1, 2),
    ((8, 8), (2, 1), 1, 2),
    ((16, 16), (1, 1), 1, 1),
]
CASES = [
    AttentionCase(
        window,
        width,
        windows=windows,
        heads=heads,
        batch=batch,
        device=DEVICE,
        table=window != (1, 1),  # a single row, of zero gradient
    )
    for window, windows, heads, batch in SHAPES
    for width in WIDTHS
]
# Tiles of 64 and of 32 that a window does not fill, and several windows of whole tiles.
ODD = [
    AttentionCase(window, width, windows=windows, heads=heads, batch=batch, device=DEVICE)
    for window, width, windows, heads, batch in [
        ((2, 2), 96, (3, 1), 2, 1),
        ((1, 17), 16, (2, 1), 2, 3),
        ((13, 3), 112, (1, 1), 1, 2),
        ((5, 20), 72, (1, 1), 1, 2),
        ((67, 1), 48, (1, 2), 1, 2),
        ((2, 67), 24, (1, 1), 2, 1),
        ((9, 16), 40, (3, 1), 1, 2),
        ((8, 16), 72, (2, 1), 1, 3),
    ]
]
SMALL = AttentionCase((3, 5), 24, windows=(3, 2), device=DEVICE)
LARGE = AttentionCase((5, 14), 24, windows=(1, 2), batch=1, heads=1, device=DEVICE)
REGIMES = pytest.mark.parametrize("case", [SMALL, LARGE], ids=["small", "large"])


def name_of(value: object) -> str | None:
    """Test ids that say the shape."""
    if isinstance(value, AttentionCase):
        return f"{value.window[0]}x{value.window[1]}-d{value.head_dim}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cuda":
        monkeypatch.setattr(cuda, "_BLOCKS", 4)  # as in the emulator: several windows to a block
        with dk.use_backend("cuda"):
            yield
    else:
        with emulated():
            yield


def check(case: AttentionCase) -> None:
    assert_numeric_rule(case.operator(), case.plain(), case.truth())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES + ODD, ids=name_of)
def test_shapes(case: AttentionCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@REGIMES
@pytest.mark.parametrize("absent", [("table",), ("q_row",), ("v_row",), ("q_row", "v_row")])
def test_optional_inputs(case: AttentionCase, absent: tuple[str, ...]) -> None:
    check(replace(case, dtype=torch.bfloat16, **dict.fromkeys(absent, False)))


@REGIMES
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [-1.0, 50.0])
def test_scale(case: AttentionCase, scale: float, dtype: torch.dtype) -> None:
    """50 standard deviations: logits around 200, so that many probabilities underflow."""
    check(replace(case, dtype=dtype, scale=scale))


@REGIMES
def test_equal_tokens(case: AttentionCase) -> None:
    check(replace(case, dtype=torch.bfloat16, constant=True))


def outputs(case: AttentionCase, contiguous: bool = False) -> dict[str, torch.Tensor]:
    """One draw of the operator."""
    return case._outputs(
        lambda *tensors: torch.ops.diffit.window_attention(*tensors, *case.arguments),
        torch.Tensor.contiguous if contiguous else torch.Tensor.detach,
        draws=1,
    )


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@REGIMES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(case: AttentionCase, layout: str) -> None:
    case = replace(
        case,
        windows=(1, 2),
        dtype=torch.bfloat16,
        layout=layout,
        grad_layout=layout,
        strided=True,
    )
    assert_same_bits(outputs(case), outputs(case, contiguous=True))


@REGIMES
def test_two_calls_are_equal(case: AttentionCase, default_algorithms: None) -> None:
    case = replace(case, dtype=torch.bfloat16)
    assert_same_bits(outputs(case), outputs(case))


@REGIMES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_window(
    case: AttentionCase, part: int, value: float
) -> None:
    """It is where the equations have it, and every other window is what it was."""
    case = replace(case, dtype=torch.bfloat16, windows=(2, 1), heads=1, batch=1)
    tokens = case.problem.tokens
    grad = case.grad_out()

    def run(broken: bool, exact: bool = False) -> list[torch.Tensor]:
        inputs = case.inputs()
        if broken:
            inputs["qkv"].view(1, tokens, 3, -1)[0, 7, part] = value
        tensors = [x.double() if exact else x for x in inputs.values()]
        leaf = tensors[0].requires_grad_()
        if exact:
            out, _ = reference.window_attention(case.problem, *tensors, case.arguments[-1])
        else:
            out, _ = torch.ops.diffit.window_attention(*tensors, *case.arguments)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]

    for clean, broken, truth in zip(run(False), run(True), run(True, exact=True), strict=True):
        assert torch.equal(clean[:, tokens // 2 :], broken[:, tokens // 2 :])
        assert torch.equal(broken.isfinite(), truth.isfinite())
        assert not broken.isfinite().all()


@pytest.mark.parametrize("window", [(3, 5), (5, 20)], ids=str)
def test_bias_that_masks(window: tuple[int, int]) -> None:
    """-inf takes distant keys away, here all of the first tile for some rows, and nothing else."""
    case = AttentionCase(window, 24, dtype=torch.bfloat16, heads=1, batch=1, device=DEVICE)
    inputs = case.inputs()
    dy, dx = (torch.arange(1 - side, side).abs() > 1 for side in window)
    inputs["rel_pos_table"][(dy[:, None] | dx).flatten()] = -torch.inf
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = torch.ops.diffit.window_attention(*leaves, *case.arguments)
    grads = torch.autograd.grad(out, leaves, case.grad_out())
    assert all(tensor.isfinite().all() for tensor in (out, lse, *grads))


def test_one_token_has_no_table_gradient() -> None:
    case = AttentionCase((1, 1), 8, windows=(1, 3), dtype=torch.bfloat16, device=DEVICE)
    assert not outputs(case)["grad_rel_pos_table"].any()
