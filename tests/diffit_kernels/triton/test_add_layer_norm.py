"""The layer norm, of a residual sum or alone, on Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels import triton as backend
from diffit_kernels.problem import AddLayerNormProblem
from diffit_kernels.triton.configs import Entry, tables
from tests.cases import LAYOUTS, AddLayerNormCase, LayerNormCase
from tests.diffit_kernels.triton import compilation
from tests.diffit_kernels.triton.device import DEVICE, DTYPES, check, name_of, on_device, outputs

pytest.importorskip("triton")

# dtypes of x and y
PAIRS = [
    *((dtype, dtype) for dtype in DTYPES),
    *((torch.float32, dtype) for dtype in DTYPES[1:]),
]
Pair = tuple[torch.dtype, torch.dtype]
Kind = type[AddLayerNormCase]
KINDS = pytest.mark.parametrize("kind", [AddLayerNormCase, LayerNormCase])

# Rows around the 16, 4 and 1 of a program, features around powers of two.
SHAPES = [(67, 1), (47, 3), (3, 5, 7), (17, 17), (15, 31), (16, 32), (33, 127), (1, 128), (5, 129)]
SHAPES += [(3, 511), (4, 512), (5, 513), (3, 1152), (2, 8191), (1, 8192)]


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shapes(kind: Kind, shape: tuple[int, ...], dtypes: Pair) -> None:
    check(kind(shape, *dtypes))


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["layout", "grad_layout"])
def test_layouts(kind: Kind, argument: str, layout: str) -> None:
    case = kind((2, 17, 24), torch.float32, torch.float16)
    check(replace(case, **{argument: layout}))


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
@pytest.mark.parametrize("offset", [1e3, -1e4])
@pytest.mark.parametrize("features", [17, 1152])
def test_rows_far_from_zero(kind: Kind, features: int, offset: float, dtypes: Pair) -> None:
    check(kind((7, features), *dtypes, offset=offset))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_tails_of_programs(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    config = {"ROWS": rows, "num_warps": 1}
    configs = dict.fromkeys(("add_layer_norm", "add_layer_norm_backward"), config)
    for name in (*configs, "layer_norm", "layer_norm_backward"):
        monkeypatch.setattr(backend, name, partial(getattr(backend, name), configs=configs))
    for kind, count in product((AddLayerNormCase, LayerNormCase), (7, 8, 9)):
        check(kind((count, 24)))


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_nan_stays_in_its_row(kind: Kind, dtypes: Pair) -> None:
    case = kind((17, 24), *dtypes)
    x, *y = map(on_device, case.inputs().values())
    broken = x.clone()
    broken[3, 5] = torch.nan
    others = torch.arange(17) != 3
    for after, before in zip(case.fused(broken, *y), case.fused(x, *y), strict=True):
        assert after[3].isnan().any()
        assert torch.equal(after[others], before[others])


@KINDS
@pytest.mark.parametrize("dtypes", PAIRS, ids=name_of)
def test_two_calls_are_equal(default_algorithms: None, kind: Kind, dtypes: Pair) -> None:
    case = kind((67, 72), *dtypes)
    first, second = (outputs(case, draws=1) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_rows_that_are_too_long() -> None:
    x = torch.zeros(1, 8193, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"'triton'.*8193 is longer than 8192"):
        dk.add_layer_norm(x, x)
    with pytest.raises(RuntimeError, match=r"'triton'.*8193 is longer than 8192"):
        dk.layer_norm(x)


# --- compiled for GPUs that need not be there


def launches(entries: list[Entry]) -> dict[str, Callable[[], None]]:
    """A call for every entry of a table; for one the dtypes of autocast, and the norm alone."""
    shapes = {
        (entry["rows"], entry["features"])
        for entry in entries
        if entry["kernel"].startswith("add_layer_norm")
    }
    calls = {}
    for shape in sorted(shapes):
        for dtype in (torch.bfloat16, torch.float32):
            calls[f"{name_of(shape)}-{name_of(dtype)}"] = partial(_launch, shape, dtype, dtype)
    calls["bias"] = partial(_launch, (16384, 1152), torch.bfloat16, torch.bfloat16, bias=True)
    calls["autocast"] = partial(_launch, (16384, 1152), torch.float32, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        calls[f"alone-{name_of(dtype)}"] = partial(_launch_alone, (16384, 1152), dtype, dtype)
    calls["alone-autocast"] = partial(_launch_alone, (16384, 1152), torch.float32, torch.bfloat16)
    return calls


def _launch(
    shape: tuple[int, int], dtype: torch.dtype, y_dtype: torch.dtype, bias: bool = False
) -> None:
    x, y = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=y_dtype)
    problem = AddLayerNormProblem.from_tensors(x, y, 1e-6)
    backend.add_layer_norm(problem, x, y, 1e-6, y[0] if bias else None)
    backend.add_layer_norm_backward(problem, x, y, x, 1e-6)


def _launch_alone(shape: tuple[int, int], dtype: torch.dtype, n_dtype: torch.dtype) -> None:
    x, grad_n = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=n_dtype)
    problem = AddLayerNormProblem.of_norm(x, n_dtype, 1e-6)
    backend.layer_norm(problem, x, 1e-6)
    backend.layer_norm_backward(problem, grad_n, x, 1e-6)


def test_every_target() -> None:
    """All there, within the limits, and made of the instructions that they should be."""
    compiled = compilation.compiled("tests.diffit_kernels.triton.test_add_layer_norm")
    compilation.print_report(compiled)
    calls = sum(
        len(launches(table.entries)) * len(compilation.targets(name))
        for name, table in tables().items()
    )
    assert len(compiled) == 2 * calls
    compilation.assert_fits(compiled)

    for result in compiled:
        if result["access_bits"] is not None and "autocast" not in result["call"]:
            assert result["access_bits"] == [128], result
