"""The numeric rule for the Triton kernels: on the GPU, or in the interpreter without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from diffit_kernels import reference
from diffit_kernels.problem import WindowAttentionProblem
from tests.cases import LAYOUTS, AttentionCase
from tests.diffit_kernels.triton import compilation
from tests.numeric_rule import assert_numeric_rule

pytest.importorskip("triton")

from diffit_kernels.triton import attention, configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")

# Tiles so small that small windows cross their borders, and a border of queries is none of keys.
TINY = {
    "small_forward": {"WINDOWS": 2},
    "small_backward": {"WINDOWS": 2},
    "large_forward": {"BLOCK_M": 32, "BLOCK_N": 16},
    "large_backward_q": {"BLOCK_M": 16, "BLOCK_N": 32},
    "large_backward_kv": {"BLOCK_M": 16, "BLOCK_N": 32},
    "large_backward_table": {"BLOCK_M": 32, "BLOCK_N": 16},
}
TINY |= {f"{kernel}_in_parts": parameters for kernel, parameters in TINY.items()}


def case_of(window: tuple[int, int], head_dim: int, **options: object) -> AttentionCase:
    return AttentionCase(window, head_dim, **{"heads": 4, "batch": 1, "device": DEVICE} | options)


# Whole windows, as the tuned tables have it.
SMALL = [
    case_of((3, 5), 24, windows=(5, 1)),
    case_of((7, 7), 40, windows=(1, 2), heads=2),
    case_of((1, 17), 128, windows=(3, 1)),
    case_of((4, 4), 72, windows=(1, 3), batch=2, heads=1),
    case_of((8, 8), 32, windows=(2, 1), heads=2),
    case_of((1, 1), 8, windows=(4, 4), batch=5, table=False),
]
# Tiles of the tuned tables.
LARGE = [
    case_of((20, 3), 8, heads=2, batch=4),
    case_of((4, 17), 64, heads=2),
    case_of((16, 16), 72, heads=2),
]
# For tiny tiles.
TILED = [
    case_of((3, 5), 24, windows=(2, 1), heads=2),
    case_of((5, 20), 80, heads=1),
    case_of((7, 7), 40, heads=2),
    case_of((2, 40), 32, heads=2),
]


def name_of(value: object) -> str | None:
    """Test ids that say the shape."""
    if isinstance(value, AttentionCase):
        return f"{value.window[0]}x{value.window[1]}-d{value.head_dim}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little work is shared by few programs, so that each has more than one window to sum over."""
    monkeypatch.setattr(attention, "_PROGRAMS", 4)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(kernel: str, *_: object, **shape: int) -> configs.Entry:
        return {**shape, "parameters": TINY[kernel]}

    monkeypatch.setattr(attention, "nearest", nearest)


@pytest.fixture
def all_in_tiles(monkeypatch: pytest.MonkeyPatch, tiny_tiles: None) -> None:
    monkeypatch.setattr(attention, "_SMALL", 0)


def check(case: AttentionCase) -> None:
    assert_numeric_rule(case.operator(), case.plain(), case.truth())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=name_of)
def test_shapes(case: AttentionCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@contextmanager
def allowing(precision: str) -> Iterator[None]:
    """ "high" allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(DEVICE != "cuda", reason="TF32 is a GPU's")
@pytest.mark.parametrize("case", SMALL + LARGE, ids=name_of)
def test_the_numeric_rule_with_tf32(case: AttentionCase) -> None:
    with allowing("high"):
        got, *references = case.operator(), case.plain(DEVICE), case.truth(DEVICE)
    plain, truth = ({k: x.cpu() for k, x in tensors.items()} for tensors in references)
    assert_numeric_rule(got, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", TILED, ids=name_of)
def test_borders_of_tiles(all_in_tiles: None, case: AttentionCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("parts", [1, 8, 19])
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_sums_of_rows(parts: int, absent: int | None) -> None:
    """Over parts that fill what a program reads at once, and do not; of either row alone."""
    problem = WindowAttentionProblem(2, (4, 4), (4, 4), 5, 32, torch.float16, DEVICE)
    partials: list[Tensor | None] = [
        torch.randn(2, parts, problem.dim, device=DEVICE) for _ in range(2)
    ]
    if absent is not None:
        partials[absent] = None
    qkv = torch.empty(0, dtype=torch.float16, device=DEVICE)
    sums = attention._row_sums(problem, *partials, qkv)
    for terms, total in zip(partials, sums, strict=True):
        assert (terms is None) == (total is None)
        if terms is not None:
            exact = terms.double().sum(dim=1)
            assert total.dtype == torch.float16
            assert torch.allclose(total.double(), exact, rtol=2**-11, atol=1e-6)


REGIMES = ["tiny_tiles", "all_in_tiles"]
CASE = case_of((3, 5), 24, windows=(3, 1), heads=2)


@pytest.fixture(params=REGIMES)
def regime(request: pytest.FixtureRequest) -> None:
    """Windows whole, and in tiles."""
    request.getfixturevalue(request.param)


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


@pytest.mark.parametrize("absent", [("table",), ("q_row",), ("v_row",), ("q_row", "v_row")])
def test_optional_inputs(regime: None, absent: tuple[str, ...]) -> None:
    check(replace(CASE, windows=(2, 1), **dict.fromkeys(absent, False)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_logits(regime: None, dtype: torch.dtype) -> None:
    """They reach 200, and many probabilities underflow."""
    check(replace(CASE, windows=(1, 1), scale=50.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_equal_tokens(regime: None, dtype: torch.dtype) -> None:
    """Attention is a mean over keys that are alike; dS vanishes, however out is rounded."""
    check(replace(CASE, windows=(1, 1), constant=True, table=False, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(tiny_tiles: None, layout: str) -> None:
    case = replace(CASE, layout=layout, grad_layout=layout, strided=True)
    assert_same_bits(outputs(case), outputs(case, contiguous=True))


@pytest.mark.parametrize("layout", ["tokens first", "expanded batch"])
def test_layouts_change_no_bit_in_tiles(all_in_tiles: None, layout: str) -> None:
    case = replace(CASE, batch=2, windows=(1, 1), layout=layout, grad_layout=layout, strided=True)
    assert_same_bits(outputs(case), outputs(case, contiguous=True))


def test_two_calls_are_equal(regime: None, default_algorithms: None) -> None:
    assert_same_bits(outputs(CASE), outputs(CASE))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_a_nan_stays_in_its_window(regime: None, part: int) -> None:
    """It is where the equations have it, and every other window is what it was."""

    def run(nan: bool, exact: bool = False) -> list[torch.Tensor]:
        inputs, grad = CASE.inputs(), CASE.grad_out()
        if nan:
            inputs["qkv"].view(1, 45, 3, -1)[0, 7, part] = torch.nan
        tensors = [x.double() if exact else x for x in inputs.values()]
        leaf = tensors[0].requires_grad_()
        if exact:
            out, _ = reference.window_attention(CASE.problem, *tensors, CASE.arguments[-1])
        else:
            out, _ = torch.ops.diffit.window_attention(*tensors, *CASE.arguments)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]

    for clean, broken, truth in zip(run(False), run(True), run(True, exact=True), strict=True):
        assert torch.equal(clean[:, 15:], broken[:, 15:])
        assert torch.equal(broken.isfinite(), truth.isfinite())
        assert not broken.isfinite().all()


def test_bias_that_masks(regime: None) -> None:
    """-inf takes distant keys away, here all of the first tile for some rows, and nothing else."""
    inputs = CASE.inputs()
    dy, dx = (torch.arange(1 - side, side).abs() > 1 for side in CASE.window)
    inputs["rel_pos_table"][(dy[:, None] | dx).flatten()] = -torch.inf
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = torch.ops.diffit.window_attention(*leaves, *CASE.arguments)
    grads = torch.autograd.grad(out, leaves, CASE.grad_out())
    assert all(tensor.isfinite().all() for tensor in (out, lse, *grads))


def test_one_token_has_no_table_gradient(tiny_tiles: None) -> None:
    case = case_of((1, 1), 8, windows=(1, 3), heads=1)
    assert not outputs(case)["grad_rel_pos_table"].any()


def test_explicit_parameters(tiny_tiles: None) -> None:
    """As a sweep passes them."""
    problem, scale = CASE.problem, CASE.arguments[-1]
    inputs = CASE.inputs().values()
    out, lse = attention.window_attention(problem, *inputs, scale, configs=TINY)
    expected = outputs(CASE)
    assert torch.equal(out, expected["out"][0])
    grads = attention.window_attention_backward(
        problem, CASE.grad_out(), *inputs, lse, scale, configs=TINY
    )
    names = ("grad_qkv", "grad_rel_pos_table", "grad_q_row", "grad_v_row")
    assert_same_bits(dict(zip(names, grads, strict=True)), {n: expected[n][0] for n in names})


@pytest.mark.parametrize(
    ("kernel", "slots", "width", "windows"),
    [
        ("small_forward", 16, 32, 8),  # the entry's
        ("small_forward", 9, 8, 8),
        ("small_forward", 16, 72, 2),
        ("small_forward", 17, 32, 4),
        ("small_forward", 64, 128, 1),
        ("large_forward", 16, 72, None),
    ],
)
def test_a_program_holds_no_more_than_where_it_was_tuned(
    kernel: str, slots: int, width: int, windows: int | None
) -> None:
    parameters = {"num_warps": 4} | ({"WINDOWS": 8} if kernel == "small_forward" else {})
    entry = {"window_tokens": 16, "head_dim": 32, "parameters": parameters}
    fitting = attention._fitting(entry, slots, width)
    assert fitting == parameters | ({"WINDOWS": windows} if windows else {})


@pytest.mark.parametrize(
    ("table", "kernel", "window", "width", "with_tf32", "without"),
    [
        ("default", "large_forward", (16, 16), 40, "bf16x3", "bf16x6"),
        ("default", "large_backward_q", (16, 16), 40, "bf16x3", "ieee"),
        ("default", "large_forward", (16, 16), 24, "bf16x6", "bf16x6"),
        ("default", "large_forward", (16, 16), 80, "ieee", "ieee"),
        ("default", "small_forward", (7, 8), 32, "bf16x6", "bf16x6"),
        ("default", "small_backward", (8, 8), 32, "ieee", "ieee"),
        ("h100", "small_backward", (8, 8), 32, "bf16x3", "ieee"),
        ("h100", "small_backward", (7, 8), 32, "ieee", "ieee"),
    ],
)
def test_how_numbers_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    kernel: str,
    window: tuple[int, int],
    width: int,
    with_tf32: str,
    without: str,
) -> None:
    """In parts where TF32 is allowed and plain PyTorch uses it; parts have tiles of their own."""
    monkeypatch.setattr(attention, "knobs", Mock(**{"runtime.interpret": False}))
    monkeypatch.setattr(configs, "table_of", lambda device: configs.tables()[table])
    monkeypatch.setattr(attention, "is_listed", configs.is_listed.__wrapped__)
    problem = case_of(window, width).problem
    for allowed, expected in (("high", with_tf32), ("highest", without)):
        name = kernel + "_in_parts" * (expected != "ieee")
        args = (kernel, problem.window_tokens, problem, torch.empty(0))
        with allowing(allowed):
            config = attention._config(*args, {name: {"WINDOWS": 3}})
        assert (config["PRECISION"], config["WINDOWS"]) == (expected, 3)


# --- compiled for GPUs that need not be there


def launches(entries: list[configs.Entry]) -> dict[str, Callable[[], None]]:
    """A call, forward and backward, for every shape of a table, and for some that are in none."""
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    shapes = {
        (_window(entry["window_tokens"]), entry["head_dim"], dtypes[entry["itemsize"]])
        for entry in entries
        if "window_tokens" in entry
    } | {((32, 32), 72, torch.bfloat16)}
    calls = {}
    for window, width, dtype in sorted(shapes, key=str):
        name = f"window {window[0]}x{window[1]}, head width {width}, {name_of(dtype)}"
        calls[name] = partial(_launch, window, width, dtype)
        if dtype == torch.float32:
            calls[f"{name}, TF32 allowed"] = partial(_launch, window, width, dtype, allowed="high")
    calls["window 4x4, no table, no rows"] = partial(
        _launch, (4, 4), 32, torch.bfloat16, optional=False
    )
    return calls


def _window(tokens: int) -> tuple[int, int]:
    """For a power of two: a square, or two."""
    height = 1 << (tokens.bit_length() - 1) // 2
    return height, tokens // height


def _launch(
    window: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    optional: bool = True,
    allowed: str = "highest",
) -> None:
    problem = WindowAttentionProblem(1, window, window, 16, width, dtype, "cuda")
    qkv = torch.empty(1, problem.tokens, 3 * problem.dim, dtype=dtype)
    row = qkv[:, 0, : problem.dim] if optional else None
    table = torch.empty(problem.table_rows, 16) if optional else None
    with allowing(allowed):
        out, lse = attention.window_attention(problem, qkv, table, row, row, 1.0)
        attention.window_attention_backward(problem, out, qkv, table, row, row, lse, 1.0)


def test_every_target() -> None:
    """All there, within the limits, and made of the instructions that they should be."""
    compiled = compilation.compiled("tests.diffit_kernels.triton.test_window_attention")
    compilation.print_report(compiled)
    for name, table in configs.tables().items():
        calls = {f"{name}: {call}" for call in launches(table.entries)}
        for target in compilation.targets(name):
            assert calls <= {result["call"] for result in compiled if result["target"] == target}
    compilation.assert_fits(compiled)

    large = [
        result
        for result in compiled
        if result["target"] == "sm_90"
        and ("window 16x" in result["call"] or "window 32x" in result["call"])
        and "bfloat16" in result["call"]
        and result["kernel"] not in ("add_partials", "add_rows")
    ]
    assert len(large) == 4 * len({result["call"] for result in large}) > 0
    assert all(result["hgmma"] for result in large)
