"""The gradient of a block that is one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffit.nn import DiffiTBlock
from tests.block_case import CASES, Case, arguments, judge, one_operator, trained
from tests.cases import DTYPES, Tensors

SMALL = Case(3, (4, 6), (2, 3), 32, 2)
# Windows of every kind, with and without each part that may be absent.
TRAINED = [
    SMALL,
    CASES[2],
    CASES[3],
    CASES[5],
    Case(2, (5, 9), (5, 9), 48, 2, rel_pos_bias=False),
    Case(2, (8, 8), (8, 8), 24, 1, temb_dim=None, qkv_bias=False),
]
BLOCK, BACKWARD = torch.ops.diffit.block_training, torch.ops.diffit.block_backward


@pytest.mark.usefixtures("fastest_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_the_numeric_rule(case: Case, dtype: torch.dtype) -> None:
    judge(case, dtype)


def by_row(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
    """With the projection of the token in its place."""
    token = block.attn.qkv_temb
    row = torch.nn.functional.linear(inputs["temb"], token.weight, token.bias).detach()
    outputs = trained(_WithoutToken(block), inputs | {"temb": None, "row": row})
    return outputs


class _WithoutToken(nn.Module):
    """A block whose layer for the token has no part in what is computed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.call = block.forward
        self.others = nn.ParameterList(
            p for name, p in block.named_parameters() if "qkv_temb" not in name
        )

    def forward(self, **inputs: Any) -> Tensor:
        return self.call(**inputs)


@pytest.mark.usefixtures("fastest_backend")
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_row_in_place_of_the_token(qkv_bias: bool) -> None:
    judge(replace(SMALL, qkv_bias=qkv_bias), torch.float32, by_row)


@pytest.mark.usefixtures("fastest_backend")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, None], ids=str)
def test_autocast(dtype: torch.dtype, stream: torch.dtype | None) -> None:
    """The stream, x and the result, stays float32 where it is."""

    def cast(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
        x = inputs["x"]
        exact = x.dtype == torch.float64
        inputs = inputs | {"x": x if exact or stream is not None else x.to(dtype)}
        with torch.autocast("cpu", dtype, enabled=not exact):
            outputs = trained(block, inputs)
        if not exact:
            assert outputs["y"].dtype == inputs["x"].dtype
            assert outputs["grad_attn.qkv.weight"].dtype == torch.float32
        return outputs

    judge(SMALL, torch.float32, cast)


@pytest.mark.usefixtures("fastest_backend")
def test_norms_have_their_own_eps() -> None:
    def call(block: nn.Module, inputs: dict[str, Any]) -> Tensors:
        block.norm1.eps, block.norm2.eps = 0.5, 8.0
        return trained(block, inputs)

    judge(SMALL, torch.float32, call)


def test_no_more_is_saved_than_has_to_be() -> None:
    """Norms are taken again."""
    block, inputs = SMALL.block(torch.float32), SMALL.inputs(torch.float32)
    given = {t.data_ptr() for t in [*block.parameters(), *inputs.values()] if isinstance(t, Tensor)}
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if tensor.data_ptr() in given else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), one_operator(True):
        block.requires_grad_()
        block(**inputs)
    batch, tokens, dim = inputs["x"].shape
    of_token = 3 + SMALL.mlp_ratio + 2  # qkv, hidden, attention and the sum
    row, lse, table = 3 * batch * dim, batch * SMALL.heads * tokens, 0
    assert saved == batch * tokens * dim * of_token + row + lse + table


def backward_flops(call: dict[str, Any], needed: set[str]) -> int:
    """Of the operator, where gradients of these arguments are asked for."""
    leaves = {name: call[name].detach().requires_grad_() for name in needed}
    with FlopCounterMode(display=False) as counter:
        y, *_ = BLOCK(**call | leaves)
        y.backward(torch.ones_like(y))
    return counter.get_flop_counts()["Global"][BACKWARD]


def test_operations_are_counted_as_those_of_the_layers() -> None:
    call = arguments(SMALL, torch.float32)
    tensors = {name for name, value in call.items() if isinstance(value, Tensor)}
    block, inputs = SMALL.block(torch.float32).requires_grad_(), SMALL.inputs(torch.float32)
    for name in ("x", "temb"):
        inputs[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:  # whose hooks keep layers apart
        y = block(**inputs)
        forward = counter.get_total_flops()
        y.backward(torch.ones_like(y))
    assert backward_flops(call, tensors) == counter.get_total_flops() - forward
    # Of two products for the gradients of each layer one is left, and what attention needs.
    attention = 5 * forward_of_attention(call)
    without = backward_flops(call, {"x", "temb"})
    assert 2 * without - attention == backward_flops(call, tensors)


def forward_of_attention(call: dict[str, Any]) -> int:
    """Half of its operations."""
    batch, tokens, dim = call["x"].shape
    return 2 * batch * tokens * prod(call["window_size"]) * dim


def test_only_the_gradients_asked_for() -> None:
    """Every input alone: its gradient is that of the call that asks for all."""
    call = arguments(SMALL, torch.float32)
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}

    def grads(names: list[str]) -> list[Tensor]:
        leaves = {name: tensors[name].detach().requires_grad_() for name in names}
        y, *_ = BLOCK(**call | leaves)
        return torch.autograd.grad(y, list(leaves.values()), y.detach())

    expected = dict(zip(tensors, grads(list(tensors)), strict=True))
    for name in tensors:
        assert torch.equal(grads([name])[0], expected[name]), name


def test_checkpointed() -> None:
    block, inputs = SMALL.block(torch.float32), SMALL.inputs(torch.float32)
    with one_operator(True):
        expected = trained(block, inputs)

        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = block

            def forward(self, **inputs: Any) -> Tensor:
                return checkpoint(self.block, use_reentrant=False, **inputs)

        got = trained(Checkpointed(), inputs)
    for name, value in got.items():
        assert torch.equal(value, expected[name.replace("block.", "")]), name


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()])
def test_a_second_derivative_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    """Also where only what is saved, and not the gradient that comes in, depends on x."""
    block, inputs = SMALL.block(torch.float32), SMALL.inputs(torch.float32)
    inputs["x"].requires_grad_()
    with one_operator(True):
        y = block(**inputs)
    (grad,) = torch.autograd.grad(loss(y), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="block_backward"):
        (y.sum() + grad.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_in_a_batch() -> None:
    block, inputs = SMALL.block(torch.float32), SMALL.inputs(torch.float32)
    x = inputs["x"].requires_grad_()
    with one_operator(True):
        y = block(**inputs)
    grads_y = torch.randn(2, *y.shape)
    (batched,) = torch.autograd.grad(y, x, grads_y, is_grads_batched=True, retain_graph=True)
    for grad_y, got in zip(grads_y, batched, strict=True):
        (expected,) = torch.autograd.grad(y, x, grad_y, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_a_block_whose_class_is_derived() -> None:
    """As FSDP2 does it; one that computes something else is called layer by layer."""

    class Sharded(DiffiTBlock):
        pass

    class Other(DiffiTBlock):
        def normed(self, x: Tensor) -> Tensor:
            return 2 * super().normed(x)

    block, inputs = SMALL.block(torch.float32).requires_grad_(), SMALL.inputs(torch.float32)
    names = []
    for kind in (DiffiTBlock, Sharded, Other):
        block.__class__ = kind
        with one_operator(True):
            names.append(type(block(**inputs).grad_fn).__name__)
    assert ["block" in name for name in names] == [True, True, False]
