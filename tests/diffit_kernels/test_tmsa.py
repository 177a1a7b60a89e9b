"""The numeric rule for TMSA against the published layer, which adds the token to q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import diffit_kernels as dk
from tests.cases import DTYPES, gradients, stack, with_gaps
from tests.numeric_rule import assert_numeric_rule
from tests.published import published_tmsa

OPTIONS = {"num_heads": 2, "window_size": (3, 5), "grid_size": (6, 10)}

# What is left out, or changed, in each variant.
VARIANTS: dict[str, dict[str, None]] = {
    "all": {},
    "no table": {"rel_pos_table": None},
    "no biases": {"qkv_bias": None, "temb_bias": None, "proj_bias": None},
    "no temb": {"temb": None, "temb_weight": None, "temb_bias": None},
    "no qkv bias": {"qkv_bias": None},
    "nothing": dict.fromkeys(
        ("temb", "temb_weight", "temb_bias", "rel_pos_table", "qkv_bias", "proj_bias")
    ),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(
    dtype: torch.dtype,
    batch: int = 4,
    grid: tuple[int, int] = (6, 10),
    window: tuple[int, int] = (3, 5),
    heads: int = 2,
    dim: int = 48,
    width: int = 20,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * scale).to(dtype)

    table = normal((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    return {
        "x": normal(batch, grid[0] * grid[1], dim),
        "temb": normal(batch, width),
        "qkv_weight": normal(3 * dim, dim, scale=dim**-0.5),
        "qkv_bias": normal(3 * dim),
        "temb_weight": normal(3 * dim, width, scale=width**-0.5),
        "temb_bias": normal(3 * dim),
        "rel_pos_table": table.to(torch.float64 if dtype == torch.float64 else torch.float32),
        "proj_weight": normal(dim, dim, scale=dim**-0.5),
        "proj_bias": normal(dim),
    }


def check(inputs: dict[str, Tensor | None], options: dict[str, Any]) -> dict[str, Tensor]:
    """The numeric rule for y and the gradients of everything that is there."""
    x = inputs["x"]
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    got = outputs(dk.tmsa, inputs, grad_y, options)
    plain = outputs(published_tmsa, inputs, grad_y, options)
    truth = outputs(published_tmsa, exact, grad_y.double(), options)
    assert_numeric_rule(got, plain, truth)
    return got


def outputs(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor | None],
    grad_y: Tensor,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    y = function(**leaves, **options)
    return {"y": y.detach()} | gradients(y, leaves, grad_y)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_published_layer(backend: str, variant: str, dtype: torch.dtype) -> None:
    check(tensors(dtype) | VARIANTS[variant], OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_token_of_k_has_no_gradient(backend: str, dtype: torch.dtype) -> None:
    """Softmax does not see a row that is added to every key: exactly zero, not nearly."""
    got = check(tensors(dtype), OPTIONS)
    for name in ("grad_temb_weight", "grad_temb_bias", "grad_qkv_bias"):
        q, k, v = got[name].chunk(3)
        assert not k.any(), name
        assert q.any(), name
        assert v.any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("samples", [1, 2])
def test_partitioned_windows(backend: str, samples: int, dtype: torch.dtype) -> None:
    """x (windows * B, M, C): the windows of a sample are adjacent and share its token."""
    inputs = tensors(dtype, grid=(3, 5))
    inputs["temb"] = inputs["temb"][:samples]
    check(inputs, OPTIONS | {"grid_size": (3, 5)})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_in_place_of_the_token(
    backend: str, bias: bool, samples: int, dtype: torch.dtype
) -> None:
    """The published layer whose time token is the row and whose projection is the identity."""
    inputs = tensors(dtype, grid=(3, 5))
    row = linear(inputs["temb"][:samples], inputs["temb_weight"])
    shared = {k: x for k, x in inputs.items() if "temb" not in k}
    if not bias:
        shared["qkv_bias"] = None

    def by_row(row: Tensor, **shared: Tensor | None) -> Tensor:
        none = dict.fromkeys(("temb", "temb_weight", "temb_bias"))
        return dk.tmsa(**none, **shared, row=row, num_heads=2, window_size=(3, 5))

    def published(row: Tensor, **shared: Tensor | None) -> Tensor:
        token = {"temb": row, "temb_weight": torch.eye(144, dtype=row.dtype), "temb_bias": None}
        return published_tmsa(**token, **shared, num_heads=2, window_size=(3, 5), grid_size=(3, 5))

    leaves = {"row": row} | shared
    grad_y = torch.randn(leaves["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = {name: None if x is None else x.double() for name, x in leaves.items()}
    assert_numeric_rule(
        outputs(by_row, leaves, grad_y, {}),
        outputs(published, leaves, grad_y, {}),
        outputs(published, exact, grad_y.double(), {}),
    )


def plain_time_rows(temb: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = torch.einsum("bt,lct->lbc", temb, weight)
    return rows if bias is None else rows + bias[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("layers", "batch", "dim", "width"), [(1, 1, 1, 1), (3, 5, 7, 13)])
def test_time_rows(
    layers: int, batch: int, dim: int, width: int, strided: bool, bias: bool, dtype: torch.dtype
) -> None:
    shapes = {"temb": (batch, width), "weight": (layers, 3 * dim, width)}
    if bias:
        shapes["bias"] = (layers, 3 * dim)

    def draw(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
        inputs = {k: x.to(dtype) for k, x in inputs.items()}
        if strided:
            inputs = {k: with_gaps(x) for k, x in inputs.items()}
        grad = torch.randn(layers, batch, 3 * dim, generator=generator).to(dtype)
        exact = {k: x.double() for k, x in inputs.items()}
        return [
            outputs(dk.time_rows, inputs, grad, {}),
            outputs(plain_time_rows, inputs, grad, {}),
            outputs(plain_time_rows, exact, grad.double(), {}),
        ]

    assert_numeric_rule(*map(stack, zip(*map(draw, range(128)), strict=True)))


def test_views_of_larger_tensors(backend: str) -> None:
    """A map in NCHW and parameters transposed in memory."""
    inputs = tensors(torch.float32)
    inputs["x"] = inputs["x"].mT.contiguous().mT
    for name in ("qkv_weight", "temb_weight", "proj_weight", "rel_pos_table"):
        inputs[name] = inputs[name].t().contiguous().t()
    inputs["temb"] = torch.stack((inputs["temb"],) * 2, dim=-1)[..., 0]
    check(inputs, OPTIONS)


def test_defaults() -> None:
    """A window that has L tokens is the grid; the scale is head_dim ** -0.5."""
    inputs = tensors(torch.float32, grid=(3, 5))
    options = {"num_heads": 2, "window_size": (3, 5)}
    explicit = dk.tmsa(**inputs, **options, grid_size=(3, 5), scale=24**-0.5)
    assert torch.equal(dk.tmsa(**inputs, **options), explicit)


def test_gradcheck() -> None:
    inputs = tensors(torch.float64, batch=2, grid=(2, 2), window=(1, 2), dim=4, width=2)

    def function(*tensors: Tensor) -> Tensor:
        return dk.tmsa(*tensors, num_heads=2, window_size=(1, 2), grid_size=(2, 2))

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])
