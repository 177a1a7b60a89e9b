"""The numeric rule for windowed attention, on every backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffit_kernels as dk
from diffit_kernels import reference
from tests.cases import DTYPES, LAYOUTS, AttentionCase
from tests.numeric_rule import assert_numeric_rule

WIDTHS = (8, 24, 32, 40, 64, 72, 96, 128)

# (window, head widths, windows of the grid, heads, batch)
SHAPES = [
    ((3, 5), WIDTHS, (2, 1), 2, 2),
    ((7, 7), WIDTHS, (1, 2), 2, 1),
    ((1, 1), (8, 40), (3, 2), 3, 2),
    ((2, 2), (24, 96), (1, 3), 2, 3),
    ((1, 17), (32,), (3, 1), 1, 2),
    ((13, 3), (40,), (1, 1), 2, 1),
    ((4, 4), (32, 72), (2, 3), 2, 2),
    ((8, 8), (32, 64, 128), (2, 1), 2, 1),
    ((5, 32), (8,), (1, 1), 2, 1),
    ((16, 16), (32, 72), (1, 1), 2, 2),
    ((31, 9), (40,), (1, 1), 2, 1),
    ((32, 32), (24, 72), (1, 1), 2, 1),
]
CASES = [
    AttentionCase(window, width, windows=windows, heads=heads, batch=batch)
    for window, widths, windows, heads, batch in SHAPES
    for width in widths
]
SMALL = AttentionCase((3, 5), 24, windows=(2, 2))


def name_of(value: object) -> str | None:
    """Test ids that say the shape."""
    if isinstance(value, AttentionCase):
        return f"{value.window[0]}x{value.window[1]}-d{value.head_dim}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def check(case: AttentionCase) -> None:
    assert_numeric_rule(case.operator(), case.plain(), case.truth())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(backend: str, case: AttentionCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("v_row", [False, True])
@pytest.mark.parametrize("q_row", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_optional_inputs(
    backend: str, table: bool, q_row: bool, v_row: bool, dtype: torch.dtype
) -> None:
    check(replace(SMALL, table=table, q_row=q_row, v_row=v_row, dtype=dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["layout", "grad_layout"])
def test_layouts(backend: str, argument: str, layout: str, dtype: torch.dtype) -> None:
    check(replace(SMALL, dtype=dtype, **{argument: layout}))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strided_table_and_rows(backend: str, dtype: torch.dtype) -> None:
    check(replace(SMALL, dtype=dtype, strided=True))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [0.0, -1.0, 0.3, 50.0])
@pytest.mark.parametrize("window", [(3, 5), (7, 7), (16, 16)])
def test_scale(backend: str, window: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    """50 standard deviations: logits around 200, so that many probabilities underflow."""
    check(AttentionCase(window, 24, scale=scale, dtype=dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shift", [-170.0, -40.0, 40.0, 170.0])
@pytest.mark.parametrize("window", [(3, 5), (7, 7), (8, 8)])
def test_logits_far_from_zero(
    backend: str, window: tuple[int, int], shift: float, dtype: torch.dtype
) -> None:
    """Their exponentials themselves overflow or underflow."""
    check(AttentionCase(window, 24, shift=shift, dtype=dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("window", [(3, 5), (7, 7)])
def test_equal_tokens(
    backend: str, window: tuple[int, int], scale: float, dtype: torch.dtype
) -> None:
    check(AttentionCase(window, 24, scale=scale, dtype=dtype, constant=True))


@st.composite
def small_cases(draw: st.DrawFn) -> AttentionCase:
    size = st.tuples(st.integers(1, 6), st.integers(1, 6))
    return AttentionCase(
        window=draw(size),
        head_dim=8 * draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from(DTYPES)),
        windows=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        heads=draw(st.integers(1, 4)),
        batch=draw(st.integers(1, 3)),
        table=draw(st.booleans()),
        q_row=draw(st.booleans()),
        v_row=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 0.3, 4.0))),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        grad_layout=draw(st.sampled_from(sorted(LAYOUTS))),
    )


# The fixture chooses one backend for all examples, so it need not be made anew for each.
@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=small_cases())
def test_random_cases(backend: str, case: AttentionCase) -> None:
    check(case)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 1, 2)], ids=["q", "k", "v", "qkv"])
def test_non_finite_token_stays_in_its_window(
    backend: str, parts: tuple[int, ...], value: float, dtype: torch.dtype
) -> None:
    """It is non-finite where the equations are, and every other window is what it was."""
    case = AttentionCase((3, 5), 24, windows=(2, 2), dtype=dtype)
    clean, broken = case.inputs(), case.inputs()
    token = 2 * 10 + 3  # row 2, column 3 of the 6 x 10 grid: in the window at the top left
    for part in parts:
        broken["qkv"].view(2, 60, 3, -1)[0, token, part] = value
    grid = torch.zeros(2, 6, 10, dtype=torch.bool)
    grid[0, :3, :5] = True
    in_window = grid.flatten(1)

    exact = {name: tensor.double() for name, tensor in broken.items()}
    expected = _out_and_grad_qkv(case, exact, on_reference=True)
    before = _out_and_grad_qkv(case, clean)
    after = _out_and_grad_qkv(case, broken)
    for one, other, truth in zip(after, before, expected, strict=True):
        assert torch.equal(one[~in_window], other[~in_window])
        assert not truth[in_window].isfinite().all()
        assert torch.equal(one.isfinite(), truth.isfinite())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", [(3, 5), (7, 7)], ids=str)
def test_bias_that_masks(backend: str, window: tuple[int, int], dtype: torch.dtype) -> None:
    """-inf in the table takes distant keys away, and leaves every gradient finite."""
    case = AttentionCase(window, 16, windows=(1, 2), dtype=dtype)
    inputs = case.inputs()
    dy, dx = (torch.arange(1 - side, side).abs() > 1 for side in window)
    inputs["rel_pos_table"][(dy[:, None] | dx).flatten()] = -torch.inf
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out, _ = torch.ops.diffit.window_attention(*leaves.values(), *case.arguments)
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out().to(out.dtype))
    assert all(tensor.isfinite().all() for tensor in (out, *grads))


def _out_and_grad_qkv(
    case: AttentionCase, inputs: dict[str, torch.Tensor], on_reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, *others = inputs.values()
    qkv = qkv.clone().requires_grad_()
    if on_reference:
        out, _ = reference.window_attention(case.problem, qkv, *others, case.arguments[-1])
    else:
        out, _ = torch.ops.diffit.window_attention(qkv, *others, *case.arguments)
    (grad,) = torch.autograd.grad(out, qkv, case.grad_out().to(out.dtype))
    return out.detach(), grad


# One of each shape.
DISTINCT = [next(case for case in CASES if case.window == window) for window, *_ in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", DISTINCT, ids=name_of)
def test_two_calls_are_equal(
    backend: str, default_algorithms: None, case: AttentionCase, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    first, second = (case.operator(draws=1) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", DISTINCT, ids=name_of)
def test_threads_do_not_change_a_bit(
    backend: str,
    threads: Callable[[int], None],
    default_algorithms: None,
    case: AttentionCase,
    dtype: torch.dtype,
) -> None:
    if backend == "reference":
        pytest.skip("the reference is made of PyTorch's products, which do not promise it")
    case = replace(case, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(case.operator(draws=1))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        assert torch.equal(tensor, results[2][name]), name


def test_defaults() -> None:
    """Scale d ** -0.5; the grid is the window if it has L tokens, else a square."""
    case = AttentionCase((2, 3), 8)
    qkv, *_ = case.inputs().values()
    given_all = dk.window_attention(
        qkv, num_heads=2, window_size=(2, 3), grid_size=(2, 3), scale=8**-0.5
    )
    assert torch.equal(dk.window_attention(qkv, num_heads=2, window_size=(2, 3)), given_all)

    case = AttentionCase((2, 2), 8, windows=(2, 2))
    qkv, *_ = case.inputs().values()
    square = dk.window_attention(qkv, num_heads=2, window_size=(2, 2), grid_size=(4, 4))
    assert torch.equal(dk.window_attention(qkv, num_heads=2, window_size=2), square)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_table_in_the_dtype_of_a_half_module(backend: str, dtype: torch.dtype) -> None:
    """It is computed with in float32 and gets its gradient in its own dtype."""
    case = replace(SMALL, dtype=dtype)
    qkv, table, *_ = case.inputs().values()
    half = table.to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    options = {"num_heads": 2, "window_size": (3, 5), "grid_size": (6, 10)}
    outs = [dk.window_attention(qkv, leaf, **options) for leaf in (half, full)]
    assert torch.equal(*outs)
    for out in outs:
        out.sum().backward()
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, full.grad.to(dtype))


# The longest sum here has fewer than 2 ** 10 terms; four products follow one another.
FLOAT64_ROUNDING = 2**12 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("case", [SMALL, AttentionCase((7, 7), 8), AttentionCase((1, 4), 8)])
def test_reference_backward_is_the_derivative_of_the_forward(case: AttentionCase) -> None:
    case = replace(case, dtype=torch.float64)
    with dk.use_backend("reference"):
        explicit = case.operator()
    for name, exact in case.plain().items():
        error = (explicit[name] - exact).abs().max()
        assert error <= FLOAT64_ROUNDING * exact.abs().max(), name


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_gradcheck(table: bool, rows: bool) -> None:
    case = AttentionCase((2, 3), 2, windows=(1, 2), batch=1, dtype=torch.float64)
    case = replace(case, table=table, q_row=rows, v_row=rows)
    inputs = {name: x for name, x in case.inputs().items() if x is not None}

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return dk.window_attention(
            **dict(zip(inputs, tensors, strict=True)),
            num_heads=2,
            window_size=(2, 3),
            grid_size=(2, 6),
        )

    with dk.use_backend("reference"):
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def test_nothing_of_size_tokens_squared_is_kept(backend: str) -> None:
    """What the backward pass needs grows with the tokens, not with their pairs."""
    case = AttentionCase((16, 16), 8, batch=1)
    kept: list[int] = []
    inputs = [tensor.requires_grad_() for tensor in case.inputs().values()]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        torch.ops.diffit.window_attention(*inputs, *case.arguments)
    assert kept
    assert max(kept) <= 256 * 3 * 16


def test_relative_position_index() -> None:
    """The equation, element by element, on a window that is not square."""
    wh, ww = 2, 3
    index = dk.relative_position_index((wh, ww))
    for i in range(wh * ww):
        for j in range(wh * ww):
            down, across = i // ww - j // ww + wh - 1, i % ww - j % ww + ww - 1
            assert index[i, j] == down * (2 * ww - 1) + across
