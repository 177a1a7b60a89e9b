"""The numeric rule for the perceptron, on every backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffit_kernels as dk
from diffit_kernels.native import layers
from tests.backends import linear_kernels_of_any_size
from tests.cases import DTYPES, LAYOUTS, MLPCase
from tests.numeric_rule import assert_numeric_rule

CASES = [
    MLPCase((1, 5), 1, 1),
    MLPCase((3, 7), 7, 3),
    MLPCase((17, 24), 33, 24),
    MLPCase((17, 1), 30, 5),
    MLPCase((6,), 30, 7),
    MLPCase((2, 3, 9), 100, 9),
    MLPCase((2, 3, 5, 8), 64, 8),
    MLPCase((129, 32), 127, 40),
    MLPCase((2, 100, 64), 256, 64),
    # Multiples of 32 and at least as many rows: by kernels of linear layers. Threads share rows, or
    # layers; the last two have float32 sums of several blocks, and on AMX a hidden layer too large
    # for a cache.
    MLPCase((32, 32), 32, 32),
    MLPCase((33, 64), 96, 32),
    MLPCase((3, 95, 32), 1024, 96),
    MLPCase((259, 96), 64, 160),
    MLPCase((70, 608), 672, 32),
    MLPCase((70, 32), 2752, 32),
]
SMALL = [MLPCase((2, 17, 24), 33, 24), MLPCase((2, 17, 32), 64, 32)]


def name_of(value: object) -> str | None:
    """Test ids that say the shape."""
    if isinstance(value, MLPCase):
        return f"{'x'.join(map(str, value.shape))}-{value.hidden}-{value.out}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(autouse=True)
def kernels_of_any_size() -> Iterator[None]:
    """Where they are no faster too."""
    with linear_kernels_of_any_size():
        yield


def check(case: MLPCase) -> None:
    assert_numeric_rule(case.operator(), case.plain(), case.truth())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(backend: str, case: MLPCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["layout", "grad_layout"])
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_layouts(
    backend: str, case: MLPCase, argument: str, layout: str, dtype: torch.dtype
) -> None:
    check(replace(case, dtype=dtype, **{argument: layout}))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_strided_weights_and_biases(backend: str, case: MLPCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype, strided=True))


# dtypes of x and of the residual
PAIRS = [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in DTYPES[1:])]


@pytest.mark.sanitizer
@pytest.mark.parametrize(("dtype", "residual"), PAIRS, ids=name_of)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_residual(
    backend: str,
    case: MLPCase,
    layout: str,
    size: float,
    dtype: torch.dtype,
    residual: torch.dtype,
) -> None:
    """A large one too, whose own rounding is all of the error."""
    check(replace(case, dtype=dtype, residual=residual, residual_size=size, layout=layout))


@pytest.mark.parametrize(("dtype", "residual"), PAIRS, ids=name_of)
def test_residual_of_inference_in_parts(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, residual: torch.dtype
) -> None:
    """Where no hidden layer is saved, the CPU kernels take some rows after the others."""
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 0)  # twice the weights: 48 rows
    case = MLPCase((101, 24), 64, 31, dtype, residual=residual)
    with torch.no_grad():
        y = torch.stack([dk.mlp(*case.inputs(draw).values()) for draw in range(case.draws)])
    assert_numeric_rule({"y": y}, {"y": case.plain()["y"]}, {"y": case.truth()["y"]})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case", [MLPCase((101, 24), 64, 31), MLPCase((128, 32), 64, 32)], ids=name_of
)
def test_gradients_in_parts(
    backend: str, monkeypatch: pytest.MonkeyPatch, case: MLPCase, dtype: torch.dtype
) -> None:
    """Of a large hidden layer the CPU kernels take some rows after the others."""
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 0)
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize(("bytes_less", "parts"), [(0, 1), (1, 2)])
def test_a_hidden_layer_of_the_size_of_a_part_is_one(
    fastest_backend: str, monkeypatch: pytest.MonkeyPatch, bytes_less: int, parts: int
) -> None:
    case = MLPCase((64, 24), 96, 31)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 64 * 96 * 4 - bytes_less)
    calls = Mock(wraps=layers._backward_of_rows)
    monkeypatch.setattr(layers, "_backward_of_rows", calls)
    case.operator(draws=1)
    assert calls.call_count == (0 if fastest_backend == "reference" else parts)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("spread", [10.0, 1e4])
@pytest.mark.parametrize(
    "case", [MLPCase((5, 24), 201, 24), MLPCase((40, 32), 224, 32)], ids=name_of
)
def test_large_activations(backend: str, case: MLPCase, spread: float, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype, spread=spread))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_gelu_of_a_large_negative_number_is_zero(
    backend: str, case: MLPCase, dtype: torch.dtype
) -> None:
    """The most negative finite number of the dtype too: no inf times zero inside."""
    x, w1, b1, w2, b2 = replace(case, dtype=dtype).inputs().values()
    lowest = torch.full_like(b1, torch.finfo(dtype).min)
    y = dk.mlp(x * 0, w1, lowest, w2, b2)
    assert torch.equal(y, b2.expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case", [MLPCase((17, 24), 64, 24), MLPCase((35, 32), 64, 32)], ids=name_of
)
def test_nan_stays_in_its_row(backend: str, case: MLPCase, dtype: torch.dtype) -> None:
    # Inner dimensions are multiples of 8: for others, oneDNN's bfloat16 product on AMX multiplies
    # the next row's numbers by zero, which a NaN survives.
    x, *weights = replace(case, dtype=dtype).inputs().values()
    broken = x.clone()
    broken[3, 5] = torch.nan
    after, before = dk.mlp(broken, *weights), dk.mlp(x, *weights)
    assert after[3].isnan().all()
    others = torch.arange(len(x)) != 3
    assert torch.equal(after[others], before[others])


def sizes(least: int, most: int) -> st.SearchStrategy[int]:
    """Not ``integers``, which take to constants of whatever module has been imported."""
    return st.sampled_from(range(least, most + 1))


# Of very few numbers the largest error is a matter of luck.
small_cases = st.builds(
    MLPCase,
    shape=st.builds(
        lambda lead, features: (*lead, features), st.lists(sizes(1, 7), max_size=3), sizes(8, 40)
    ),
    hidden=sizes(8, 80),
    out=sizes(1, 40),
    dtype=st.sampled_from(DTYPES),
)


# The fixture chooses one backend for all examples, so it need not be made anew for each.
@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=small_cases)
def test_random_cases(backend: str, case: MLPCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_calls_are_equal(backend: str, default_algorithms: None, dtype: torch.dtype) -> None:
    case = MLPCase((2, 100, 64), 256, 64, dtype)
    first, second = (case.operator(draws=1) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "case", [MLPCase((2, 100, 64), 250, 64), MLPCase((70, 64), 256, 64)], ids=name_of
)
def test_threads(
    backend: str,
    threads: Callable[[int], None],
    case: MLPCase,
    count: int,
    dtype: torch.dtype,
) -> None:
    threads(count)
    check(replace(case, dtype=dtype))


def test_without_gradients_the_result_is_the_same(backend: str) -> None:
    inputs = MLPCase((17, 24), 33, 24, residual=torch.float32).inputs()
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    with torch.no_grad():
        inference = dk.mlp(*leaves)
    assert torch.equal(inference, dk.mlp(*leaves))


# The longest sum here has fewer than 2 ** 10 terms; four products follow one another.
FLOAT64_ROUNDING = 2**12 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_is_the_formula_and_its_derivative(case: MLPCase) -> None:
    case = replace(case, dtype=torch.float64, residual=torch.float64)
    with dk.use_backend("reference"):
        explicit = case.operator()
    for name, exact in case.plain().items():
        error = (explicit[name] - exact).abs().max()
        assert error <= FLOAT64_ROUNDING * exact.abs().max(), name


def test_gradcheck() -> None:
    inputs = MLPCase((2, 3, 4), 5, 3, torch.float64, residual=torch.float64).inputs()
    with dk.use_backend("reference"):
        assert torch.autograd.gradcheck(dk.mlp, [x.requires_grad_() for x in inputs.values()])
