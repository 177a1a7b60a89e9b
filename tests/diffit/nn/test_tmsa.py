"""TMSA as a drop-in layer: published weights, token shapes, dropout, maps, feature maps."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffit_kernels as dk
from diffit.nn import TMSA, TMSA2d
from tests.numeric_rule import assert_numeric_rule
from tests.published import parameters_of, published_tmsa

GOLDEN = Path(__file__).parents[2] / "data" / "attention_w4_d72.safetensors"

# The layer of these tests: 2 heads of width 8, two windows of 2 x 3 on a grid of 4 x 3.
OPTIONS = {"temb_dim": 6, "window_size": (2, 3)}
GRID = (4, 3)


@pytest.fixture
def layer() -> TMSA:
    torch.manual_seed(0)
    return TMSA(16, 2, **OPTIONS)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 12, 16, generator=generator)
    return x.to(dtype), torch.randn(batch, 6, generator=generator).to(dtype)


# --- published weights


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def golden_layer(golden: dict[str, Tensor], dtype: torch.dtype) -> TMSA:
    state = {k.removeprefix("state."): x for k, x in golden.items() if k.startswith("state.")}
    assert "relative_position_index" in state
    layer = TMSA(144, 2, temb_dim=96, window_size=4, dtype=dtype)
    layer.load_state_dict(state, strict=True)
    return layer


def golden_outputs(
    layer: TMSA, golden: dict[str, Tensor], dtype: torch.dtype, plain: bool = False
) -> dict[str, Tensor]:
    x, temb = (golden[name].to(dtype).detach().requires_grad_() for name in ("x", "temb"))
    y = layer(x, temb, return_attention=True)[0] if plain else layer(x, temb)
    y.backward(golden["grad_y"].to(dtype))
    grads = {f"grad.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    return {"y": y.detach(), "grad_x": x.grad, "grad_temb": temb.grad} | grads


def test_golden_layer_in_float64(golden: dict[str, Tensor]) -> None:
    """Equal to the stored float32 numbers, that is, to half a unit in their last place.

    The gradient of the key part is zero here and float64 noise there: an absolute bound with the
    rounding of sums of fewer than 2 ** 10 terms covers it.
    """
    float32, float64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    got = golden_outputs(golden_layer(golden, torch.float64), golden, torch.float64)
    stored = {k: x.double() for k, x in golden.items() if k == "y" or k.startswith("grad")}
    assert got.keys() == stored.keys() - {"grad_y"}
    for name, tensor in got.items():
        exact = stored[name]
        bound = float32 / 2 * exact.abs() + 2**10 * float64 * exact.abs().max()
        assert ((tensor - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden_layer(backend: str, golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The numeric rule; in 16 bits the truth is that of the rounded weights and inputs."""
    layer = golden_layer(golden, dtype)
    exact = copy.deepcopy(layer).double()
    rounded = {name: tensor.to(dtype) for name, tensor in golden.items()}
    assert_numeric_rule(
        golden_outputs(layer, rounded, dtype),
        golden_outputs(layer, rounded, dtype, plain=True),
        golden_outputs(exact, rounded, torch.float64, plain=True),
    )


def test_state_dict_has_the_published_keys(layer: TMSA) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "qkv.weight": (48, 16),
        "qkv.bias": (48,),
        "qkv_temb.weight": (48, 6),
        "qkv_temb.bias": (48,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
        "relative_position_bias_table": (15, 2),
    }
    bare = TMSA(16, 2, window_size=4, qkv_bias=False, rel_pos_bias=False)
    assert list(bare.state_dict()) == ["qkv.weight", "proj.weight", "proj.bias"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 16.0}, TypeError, "dim: expected an integer, got 16.0"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got 2.0"),
        ({"num_heads": 0}, ValueError, "dim: expected a multiple of num_heads = 0, got 16"),
        ({"dim": 15}, ValueError, "dim: expected a multiple of num_heads = 2, got 15"),
        ({"temb_dim": 0}, ValueError, "temb_dim: expected a positive integer or None, got 0"),
        ({"window_size": (2, 0)}, ValueError, r"window_size: expected positive .*, got \(2, 0\)"),
        ({"window_size": 2.0}, TypeError, "window_size: expected one or two integers, got 2.0"),
    ],
)
def test_wrong_sizes(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TMSA(**{"dim": 16, "num_heads": 2, "window_size": 2} | arguments)


def test_strict_load_inside_a_model(layer: TMSA) -> None:
    """The stored index is accepted under any prefix; an unknown key is not."""
    model = nn.ModuleList([layer])
    state = model.state_dict()
    index = dk.relative_position_index((2, 3))
    model.load_state_dict(state | {"0.relative_position_index": index}, strict=True)
    with pytest.raises(RuntimeError, match="unknown"):
        model.load_state_dict(state | {"0.unknown": index}, strict=True)
    with pytest.raises(RuntimeError, match=r"0\.proj\.bias"):
        model.load_state_dict({k: x for k, x in state.items() if k != "0.proj.bias"}, strict=True)


def test_loading_leaves_the_callers_state_as_it_was(layer: TMSA) -> None:
    state = layer.state_dict() | {"relative_position_index": dk.relative_position_index((2, 3))}
    keys = list(state)
    layer.load_state_dict(state)
    assert list(state) == keys


# --- the formula


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("rel_pos_bias", [True, False])
@pytest.mark.parametrize("temb_dim", [6, None])
def test_fused_equals_plain(
    backend: str, temb_dim: int | None, rel_pos_bias: bool, qkv_bias: bool
) -> None:
    """The fused operator and the layer's own formula, by the numeric rule."""
    torch.manual_seed(0)
    layer = TMSA(
        16, 2, temb_dim=temb_dim, window_size=(2, 3), qkv_bias=qkv_bias, rel_pos_bias=rel_pos_bias
    )
    x, temb = inputs()
    temb = None if temb_dim is None else temb
    exact = copy.deepcopy(layer).double()
    got = layer(x, temb, grid_size=GRID)
    plain, _ = layer(x, temb, grid_size=GRID, return_attention=True)
    truth = published_tmsa(
        x.double(),
        None if temb is None else temb.double(),
        **parameters_of(exact),
        num_heads=2,
        window_size=(2, 3),
        grid_size=GRID,
    )
    assert_numeric_rule({"y": got}, {"y": plain}, {"y": truth})


def test_one_token_in_every_shape(layer: TMSA) -> None:
    """(B, T), (B, 1, T), and (B, L, T) with L equal tokens, which takes the plain formula."""
    layer, (x, temb) = layer.double(), inputs(torch.float64)
    y = layer(x, temb, grid_size=GRID)
    assert torch.equal(layer(x, temb[:, None], grid_size=GRID), y)
    per_position = layer(x, temb[:, None].expand(-1, 12, -1), grid_size=GRID)
    torch.testing.assert_close(per_position, y)


@pytest.mark.parametrize("return_attention", [False, True])
def test_a_row_in_place_of_the_token(layer: TMSA, return_attention: bool) -> None:
    """Computed outside, for all layers by one product; the layer adds its own bias."""
    layer, (x, temb) = layer.double(), inputs(torch.float64)
    (row,) = dk.time_rows(temb, layer.qkv_temb.weight[None], layer.qkv_temb.bias[None])
    options = {"grid_size": GRID, "return_attention": return_attention}
    torch.testing.assert_close(layer(x, row=row, **options), layer(x, temb, **options))
    cut = x.reshape(4, 6, 16)  # two windows of each sample
    options["grid_size"] = None
    torch.testing.assert_close(layer(cut, row=row, **options), layer(cut, temb, **options))


def test_a_token_per_position(layer: TMSA) -> None:
    layer, (x, _) = layer.double(), inputs(torch.float64)
    temb = torch.randn(2, 12, 6, dtype=torch.float64)
    expected = published_tmsa(
        x, temb, **parameters_of(layer), num_heads=2, window_size=(2, 3), grid_size=GRID
    )
    torch.testing.assert_close(layer(x, temb, grid_size=GRID), expected)


def test_partitioned_windows(layer: TMSA) -> None:
    """(windows * B, M, C) with temb (B, T) is the grid cut by the caller, windows adjacent."""
    layer, (x, temb) = layer.double(), inputs(torch.float64)
    y = layer(x, temb, grid_size=GRID)
    cut = layer(x.reshape(4, 6, 16), temb)  # windows of full width are runs of tokens
    torch.testing.assert_close(cut.reshape(2, 12, 16), y)
    torch.testing.assert_close(layer(x.reshape(4, 6, 16), temb[:, None]).reshape(2, 12, 16), y)
    plain, _ = layer(x.reshape(4, 6, 16), temb, return_attention=True)
    torch.testing.assert_close(plain.reshape(2, 12, 16), y)


def test_without_the_token_it_is_plain_attention(layer: TMSA) -> None:
    """``temb=None`` on a layer that could take one: as if the token's projection were zero."""
    layer, (x, temb) = layer.double(), inputs(torch.float64)
    y = layer(x, grid_size=GRID)
    with torch.no_grad():
        layer.qkv_temb.weight.zero_()
        layer.qkv_temb.bias.zero_()
    torch.testing.assert_close(layer(x, temb, grid_size=GRID), y)


def test_the_token_of_k_has_no_gradient(layer: TMSA, backend: str) -> None:
    x, temb = inputs()
    layer(x, temb, grid_size=GRID).sum().backward()
    for parameter in (layer.qkv_temb.weight, layer.qkv_temb.bias, layer.qkv.bias):
        q, k, v = parameter.grad.chunk(3)
        assert q.any()
        assert not k.any()
        assert v.any()


def test_default_grids() -> None:
    """The window if it has L tokens, else a square."""
    layer = TMSA(16, 2, window_size=(2, 8))
    x = torch.randn(1, 16, 16)
    assert torch.equal(layer(x), layer(x, grid_size=(2, 8)))
    layer = TMSA(16, 2, window_size=2)
    assert torch.equal(layer(x), layer(x, grid_size=(4, 4)))


# --- attention maps and dropout


def test_return_attention(layer: TMSA) -> None:
    """(B * windows, heads, M, M), rows of probabilities, seen by a hook on ``softmax`` too."""
    x, temb = inputs()
    seen = []
    layer.softmax.register_forward_hook(lambda module, arguments, out: seen.append(out))
    y, attention = layer(x, temb, grid_size=GRID, return_attention=True)
    assert y.shape == x.shape
    assert attention.shape == (4, 2, 6, 6)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 6))
    assert torch.equal(seen[0].flatten(0, 1), attention)

    # Probabilities times values gives the output: the values of head h are its columns.
    qkv = layer.qkv(x) + layer.qkv_temb(temb)[:, None]
    v = qkv.view(4, 6, 3, 2, 8)[:, :, 2]
    out = torch.einsum("whij,wjhd->wihd", attention, v).reshape(2, 12, 16)
    torch.testing.assert_close(layer.proj(out), y)


def test_attention_dropout_keeps_the_expectation(layer: TMSA) -> None:
    """The mean of many samples of one input is the result without dropout, to 5 errors of it."""
    torch.manual_seed(0)
    layer.attn_drop.p = 0.4
    x, temb = (tensor.double().expand(4000, *tensor.shape[1:]) for tensor in inputs(batch=1))
    layer = layer.double()
    y = layer.train()(x, temb, grid_size=GRID)
    exact = layer.eval()(x[:1], temb[:1], grid_size=GRID)
    standard_error = y.std(dim=0) / len(x) ** 0.5
    assert (standard_error > 0).all()
    assert ((y.mean(dim=0) - exact[0]).abs() <= 5 * standard_error).all()


def test_projection_dropout_drops_and_scales(layer: TMSA, backend: str) -> None:
    x, temb = inputs()
    layer.proj_drop.p = 0.5
    exact = layer.eval()(x, temb, grid_size=GRID)
    y = layer.train()(x, temb, grid_size=GRID)
    kept = y != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(y[kept], 2 * exact[kept])


def test_dropout_is_off_in_evaluation(layer: TMSA, backend: str) -> None:
    x, temb = inputs()
    expected = layer(x, temb, grid_size=GRID)
    layer.attn_drop.p = layer.proj_drop.p = 0.9
    assert torch.equal(layer.eval()(x, temb, grid_size=GRID), expected)
    assert not torch.equal(layer.train()(x, temb, grid_size=GRID), expected)


# --- feature maps


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_maps(layer: TMSA, backend: str, channels_last: bool) -> None:
    """TMSA2d is TMSA on the flattened map, gradients too, and keeps channels last."""
    layer2d = TMSA2d(16, 2, **OPTIONS)
    layer2d.load_state_dict(layer.state_dict())
    tokens, temb = inputs()
    image = tokens.mT.reshape(2, 16, *GRID)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    tokens.requires_grad_()
    image = image.detach().requires_grad_()
    y, y2d = layer(tokens, temb, grid_size=GRID), layer2d(image, temb)
    assert y2d.shape == image.shape
    assert y2d.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y2d.flatten(2).mT, y)

    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)
    y2d.backward(grad.mT.reshape(y2d.shape))
    for (name, one), other in zip(layer.named_parameters(), layer2d.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    torch.testing.assert_close(image.grad.flatten(2).mT, tokens.grad)


def test_attention_of_feature_maps(layer: TMSA) -> None:
    layer2d = TMSA2d(16, 2, **OPTIONS)
    layer2d.load_state_dict(layer.state_dict())
    x, temb = inputs()
    y, attention = layer(x, temb, grid_size=GRID, return_attention=True)
    y2d, attention2d = layer2d(x.mT.reshape(2, 16, *GRID), temb, return_attention=True)
    torch.testing.assert_close(y2d.flatten(2).mT, y)
    torch.testing.assert_close(attention2d, attention)


# --- a module like others


def test_made_on_meta_and_loaded(layer: TMSA) -> None:
    x, temb = inputs()
    empty = TMSA(16, 2, **OPTIONS, device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty(x.to("meta"), temb.to("meta"), grid_size=GRID).shape == x.shape
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x, temb, grid_size=GRID), layer(x, temb, grid_size=GRID))


def test_made_on_meta_and_initialized() -> None:
    layer = TMSA(16, 2, **OPTIONS, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.relative_position_bias_table.std() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(layer: TMSA, dtype: torch.dtype) -> None:
    """``layer.half()`` and its like: everything in that dtype, gradients too."""
    layer, (x, temb) = layer.to(dtype), inputs(dtype)
    y = layer(x, temb, grid_size=GRID)
    assert y.dtype == dtype
    y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()
    made = TMSA(16, 2, **OPTIONS, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in made.parameters())


def test_copies(layer: TMSA) -> None:
    x, temb = inputs()
    y = layer(x, temb, grid_size=GRID)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, temb, grid_size=GRID), y)
        other.proj.weight.data.zero_()
    assert torch.equal(layer(x, temb, grid_size=GRID), y)
