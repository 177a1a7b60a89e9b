"""The perceptron on Triton's kernels: the numeric rule, tiles and their tails.

In float32 the products are PyTorch's, and the kernels are the elementwise ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels import triton as backend
from diffit_kernels.problem import MLPProblem
from diffit_kernels.triton.configs import CUBLASLT, Config, Entry, tables
from tests.cases import LAYOUTS, MLPCase
from tests.diffit_kernels.triton import compilation
from tests.diffit_kernels.triton.device import DEVICE, DTYPES, check, name_of, on_device, outputs
from tests.numeric_rule import assert_numeric_rule

pytest.importorskip("triton")

KERNELS = ("mlp_gelu", "mlp_gelu_hidden", "mlp_bias", "mlp_gelu_backward")
# The smallest tile there is: small problems have several in every direction.
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2, "num_warps": 1, "num_stages": 1}

CASES = [
    MLPCase((5, 17), 7, 31),
    MLPCase((17, 24), 33, 24),
    MLPCase((37, 1), 30, 5),
    MLPCase((2, 3, 9), 100, 9),
    MLPCase((129, 32), 127, 40),
    MLPCase((2, 100, 64), 256, 64),
]
# Rows, features, hidden layer and results one short of a tile, just a tile, and one over.
TAILS = [
    MLPCase((15, 17), 33, 16),
    MLPCase((16, 16), 16, 16),
    MLPCase((17, 15), 31, 47),
    MLPCase((33, 32), 48, 17),
    MLPCase((47, 33), 17, 15),
    MLPCase((65, 31), 47, 33),
]


def use_configs(monkeypatch: pytest.MonkeyPatch, **configs: dict) -> None:
    """Launch every kernel with the smallest tile, or the parameters given for it."""
    configs = dict.fromkeys(KERNELS, TILE) | configs
    for name in ("mlp", "mlp_backward"):
        monkeypatch.setattr(backend, name, partial(getattr(backend, name), configs=configs))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(case: MLPCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("case", TAILS, ids=name_of)
def test_tails_of_tiles(monkeypatch: pytest.MonkeyPatch, case: MLPCase) -> None:
    use_configs(monkeypatch)
    check(replace(case, dtype=torch.float16))


@pytest.mark.parametrize("case", TAILS, ids=name_of)
def test_tails_of_elementwise_tiles(monkeypatch: pytest.MonkeyPatch, case: MLPCase) -> None:
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1}
    monkeypatch.setattr(import_module("diffit_kernels.triton.mlp"), "_TILE", tile)
    check(case)


@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_tiles(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Every tile is computed once, whatever the order."""
    use_configs(monkeypatch, **dict.fromkeys(KERNELS, TILE | {"GROUP": group}))
    check(MLPCase((65, 16), 47, 33, torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["layout", "grad_layout"])
def test_layouts(argument: str, layout: str) -> None:
    check(replace(MLPCase((2, 17, 24), 33, 24), **{argument: layout}))


# dtypes of x and of the residual
PAIRS = [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in DTYPES[1:])]


@pytest.mark.parametrize(("dtype", "residual"), PAIRS, ids=name_of)
@pytest.mark.parametrize(
    ("case", "size"),
    [(MLPCase((17, 24), 33, 24), 1.0), (MLPCase((5, 17), 7, 31), 1e3)],
    ids=name_of,
)
def test_residual(
    monkeypatch: pytest.MonkeyPatch,
    case: MLPCase,
    size: float,
    dtype: torch.dtype,
    residual: torch.dtype,
) -> None:
    use_configs(monkeypatch)
    check(replace(case, dtype=dtype, residual=residual, residual_size=size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_residual(layout: str) -> None:
    check(MLPCase((2, 17, 24), 33, 24, residual=torch.float32, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strided_weights_and_biases(dtype: torch.dtype) -> None:
    check(MLPCase((17, 24), 33, 24, dtype, strided=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("spread", [10.0, 1e4])
def test_large_activations(spread: float, dtype: torch.dtype) -> None:
    check(MLPCase((5, 24), 201, 24, dtype, spread=spread))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_ends_of_gelu(dtype: torch.dtype) -> None:
    """The largest finite numbers of the dtype: 0 and themselves, derivatives 0 and 1, no NaN."""
    limits = torch.finfo(dtype)
    x, w2 = torch.zeros(2, 4, dtype=dtype), torch.eye(2, dtype=dtype)
    bias = torch.tensor([limits.min, limits.max], dtype=dtype)
    x, w1, b1, w2, b2 = map(on_device, (x, torch.ones(2, 4).to(dtype), bias, w2, 0 * bias))
    y = dk.mlp(x, w1, b1.requires_grad_(), w2, b2)
    y.sum().backward()
    assert torch.equal(y.cpu(), torch.tensor([[0, limits.max]] * 2, dtype=dtype))
    assert torch.equal(b1.grad.cpu(), torch.tensor([0, 2], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """And reaches the gradients of that row, through the bounds of the derivative."""
    x, *weights = map(on_device, MLPCase((17, 24), 33, 24, dtype).inputs().values())
    broken = x.clone()
    broken[3, 5] = torch.nan
    broken, x = broken.requires_grad_(), x.requires_grad_()
    after, before = dk.mlp(broken, *weights), dk.mlp(x, *weights)
    others = torch.arange(17) != 3
    for leaf, y in ((broken, after), (x, before)):
        y.backward(torch.ones_like(y))
        assert leaf.grad[3].isnan().all() == y[3].isnan().all() == (leaf is broken)
    assert torch.equal(after[others], before[others])
    assert torch.equal(broken.grad[others], x.grad[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_calls_are_equal(default_algorithms: None, dtype: torch.dtype) -> None:
    case = MLPCase((2, 100, 64), 256, 64, dtype)
    first, second = (outputs(case, draws=1) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_without_gradients_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tiles for both; a tuned table may have others."""
    use_configs(monkeypatch)
    case = MLPCase((17, 24), 33, 24, torch.float16, residual=torch.float32)
    leaves = [on_device(x).requires_grad_() for x in case.inputs().values()]
    with torch.no_grad():
        inference = dk.mlp(*leaves)
    assert torch.equal(inference, dk.mlp(*leaves))


@pytest.mark.parametrize(
    ("dtype", "residual"), [*PAIRS, *((dtype, None) for dtype in DTYPES)][1:], ids=name_of
)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cublaslt(
    monkeypatch: pytest.MonkeyPatch,
    case: MLPCase,
    dtype: torch.dtype,
    residual: torch.dtype | None,
) -> None:
    """Its product with GELU, which on the CPU is another one, runs where there are no gradients."""
    use_configs(monkeypatch, **dict.fromkeys(KERNELS, CUBLASLT))
    case = replace(case, dtype=dtype, residual=residual)
    check(case)
    if DEVICE == "cpu" and dtype != torch.float32:
        return
    with torch.no_grad():
        y = [dk.mlp(*map(on_device, case.inputs(draw).values())) for draw in range(case.draws)]
    assert_numeric_rule(
        {"y": torch.stack(y).cpu()}, {"y": case.plain()["y"]}, {"y": case.truth()["y"]}
    )


# --- compiled for GPUs that need not be there


def launches(entries: list[Entry]) -> dict[str, Callable[[], None]]:
    """A call for every entry of a table that names tiles; sums are over no whole ones."""
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    calls = {}
    for entry in entries:
        if (kernel := entry["kernel"]) in KERNELS and entry["parameters"] != CUBLASLT:
            rows, features, dtype = entry["rows"], entry["features"], dtypes[entry["itemsize"]]
            hidden, out = (4624, features) if kernel == "mlp_bias" else (features, 1168)
            case = MLPCase((rows, 1168), hidden, out, dtype)
            calls[f"{kernel}-{rows}-{features}-{name_of(dtype)}"] = partial(_launch, kernel, case)
    for dtype in dtypes.values():
        for kernel in ("mlp_gelu_hidden", "mlp_gelu_backward"):
            calls[f"{kernel}-elementwise-{name_of(dtype)}"] = partial(
                _launch, kernel, MLPCase((256, 1168), 4624, 1168, dtype), CUBLASLT
            )
    return calls


def _launch(kernel: str, case: MLPCase, config: Config | None = None) -> None:
    configs = config and dict.fromkeys(KERNELS, config)
    (rows, features), hidden, out = case.shape, case.hidden, case.out
    shapes = ((rows, features), (hidden, features), (hidden,), (out, hidden), (out,))
    inputs = [torch.empty(shape, dtype=case.dtype) for shape in shapes]
    residual = torch.empty(rows, out)
    problem = MLPProblem.from_tensors(*inputs, residual)
    if kernel == "mlp_gelu_backward":
        saved = torch.empty(rows, hidden, dtype=case.dtype)
        grad = residual.to(case.dtype)
        backend.mlp_backward(problem, grad, *inputs[:4], saved, True, configs=configs)
    else:
        save_hidden = kernel == "mlp_gelu_hidden"
        backend.mlp(problem, *inputs, residual, save_hidden, configs=configs)


def test_every_target() -> None:
    """All there, within the limits, and made of the instructions that they should be."""
    compiled = compilation.compiled("tests.diffit_kernels.triton.test_mlp")
    compilation.print_report(compiled)
    for name, table in tables().items():
        for target in compilation.targets(name):
            calls = {result["call"] for result in compiled if result["target"] == target}
            assert {f"{name}: {call}" for call in launches(table.entries)} <= calls
    compilation.assert_fits(compiled)

    products = [result for result in compiled if result["target"] == "sm_90"]
    for result in products:
        assert result["hgmma"] != result["kernel"].startswith("activate"), result
