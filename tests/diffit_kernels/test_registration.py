"""Calls of operators that pass by the dispatcher, and those that must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import diffit_kernels as dk
from tests.cases import AttentionCase, MLPCase

# The package's name of it is the function's.
window_attention = import_module("diffit_kernels.ops.window_attention")

CASE = AttentionCase((3, 5), 8, windows=(2, 1))
MLP = MLPCase((2, 5, 8), 16, 8, residual=torch.float32)
WINDOWS = {"num_heads": 2, "window_size": (3, 5), "grid_size": (6, 5)}


def attention(qkv: Tensor, *others: Tensor) -> Tensor:
    table, q_row, v_row = others or [None] * 3
    return dk.window_attention(qkv, table, q_row=q_row, v_row=v_row, **WINDOWS)


def perceptron(*tensors: Tensor) -> Tensor:
    return dk.mlp(*tensors)


def norms(x: Tensor, y: Tensor) -> Tensor:
    s, n = dk.add_layer_norm(x, y)
    return s + n + dk.layer_norm(x)


CALLS = {
    attention: lambda: CASE.inputs().values(),
    perceptron: lambda: MLP.inputs().values(),
    norms: lambda: (torch.randn(2, 3, 8), torch.randn(2, 3, 8)),
}


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of attention's forward calls that reach the dispatcher."""
    calls = []
    overload = window_attention._forward.overload

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return overload(*arguments)

    monkeypatch.setattr(window_attention._forward, "overload", spy)
    return calls


@contextmanager
def profiler() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_both_ways_give_the_same(
    fastest_backend: str, call: Callable[..., Tensor], grad: bool
) -> None:
    """Results and gradients, bit by bit."""
    tensors = [tensor.detach().requires_grad_(grad) for tensor in CALLS[call]()]
    outcomes = []
    for way in (nullcontext(), FlopCounterMode(display=False)):
        with way:
            out = call(*tensors)
            weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
            grads = torch.autograd.grad(out, tensors, weight) if grad else ()
        outcomes.append((out, *grads))
    for direct, through_dispatcher in zip(*outcomes, strict=True):
        assert torch.equal(direct, through_dispatcher)


@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode],
    ids=["plain", "no_grad", "inference_mode"],
)
def test_plain_calls_pass_by_the_dispatcher(dispatched: list[Any], context: Any) -> None:
    with context():
        attention(*CASE.inputs().values())
        attention(torch.nn.Parameter(CASE.inputs()["qkv"]))
    assert not dispatched


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),
        profiler,
    ],
    ids=["autocast", "dispatch mode", "function mode", "profiler"],
)
def test_what_the_dispatcher_has_to_see(dispatched: list[Any], context: Any) -> None:
    with context():
        attention(*CASE.inputs().values())
    assert dispatched


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [lambda x: x.as_subclass(Subclass), lambda x: torch._neg_view(-x), lambda x: x.to("meta")],
    ids=["subclass", "negative", "meta"],
)
def test_tensors_that_the_dispatcher_has_to_see(dispatched: list[Any], change: Any) -> None:
    qkv = CASE.inputs()["qkv"]
    out = attention(change(qkv))
    assert len(dispatched) == 1
    assert type(out) is type(change(qkv))
    if out.device.type != "meta":
        torch.testing.assert_close(out.as_subclass(Tensor), attention(qkv), rtol=0, atol=0)


def test_transforms_reach_the_dispatcher(dispatched: list[Any]) -> None:
    qkv = CASE.inputs()["qkv"]
    graph = make_fx(attention)(qkv).graph
    assert torch.ops.diffit.window_attention.default in [node.target for node in graph.nodes]
    assert len(dispatched) == 1
    assert torch.equal(torch.vmap(attention)(qkv[None])[0], attention(qkv))
    assert len(dispatched) == 2


def test_the_profiler_names_the_operator() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*CASE.inputs().values())
    assert "diffit::window_attention" in [event.key for event in profile.key_averages()]


def test_below_autograd_nothing_is_recorded() -> None:
    """As the dispatcher has it: the keys of autograd are switched off."""
    qkv = CASE.inputs()["qkv"].requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        assert attention(qkv).grad_fn is None
    assert attention(qkv).grad_fn is not None


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_is_refused(backend: str, requires_grad: bool) -> None:
    """A tangent that an operator dropped would come out as zero."""
    qkv = CASE.inputs()["qkv"].requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))
        assert attention(qkv).isfinite().all()
        for call in (attention, torch.ops.diffit.window_attention):
            arguments = (dual,) if call is attention else (dual, None, None, None, *CASE.arguments)
            with pytest.raises(NotImplementedError, match=r"window_attention.*forward-mode"):
                call(*arguments)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(attention, (qkv,), (torch.ones_like(qkv),))


# --- transforms of functions: torch.func


def squares(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return call(*tensors).square().sum()


def grads_of(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(squares(call, *leaves), leaves)


@pytest.mark.parametrize("call", CALLS)
def test_grad_of_a_function(fastest_backend: str, call: Callable[..., Tensor]) -> None:
    """Bit by bit that of autograd."""
    tensors = tuple(CALLS[call]())
    everything = tuple(range(len(tensors)))
    got = torch.func.grad(lambda *xs: squares(call, *xs), argnums=everything)(*tensors)
    for one, other in zip(got, grads_of(call, *tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("call", CALLS)
def test_grads_of_every_sample(fastest_backend: str, call: Callable[..., Tensor]) -> None:
    """Three calls in one, every tensor with a dimension of its own."""
    several = [tuple(CALLS[call]()) for _ in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*several, strict=True)]
    everything = tuple(range(len(stacked)))
    one = torch.func.grad(lambda *xs: squares(call, *xs), argnums=everything)
    for batch in (torch.vmap(one)(*stacked), _grad_of_vmap(call, stacked)):
        for got, *expected in zip(batch, *(grads_of(call, *xs) for xs in several), strict=True):
            torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0)


def _grad_of_vmap(call: Callable[..., Tensor], stacked: list[Tensor]) -> tuple[Tensor, ...]:
    def total(*tensors: Tensor) -> Tensor:
        return torch.vmap(lambda *slices: squares(call, *slices))(*tensors).sum()

    return torch.func.grad(total, argnums=tuple(range(len(stacked))))(*stacked)


@pytest.mark.parametrize("call", CALLS)
def test_outer_transforms_are_not_lost(fastest_backend: str, call: Callable[..., Tensor]) -> None:
    """What an inner gradient multiplies has that of the outer; second derivatives are refused."""
    first, *others = CALLS[call]()

    def product(x: Tensor) -> Tensor:
        def inner(w: Tensor) -> Tensor:
            return (call(x, *others) * w).sum()

        return torch.func.grad(inner)(torch.ones_like(call(first, *others))).square().sum()

    torch.testing.assert_close(
        torch.func.grad(product)(first), grads_of(call, first, *others)[0], rtol=0, atol=0
    )
    with pytest.raises(RuntimeError, match="first order"):
        torch.func.grad(
            lambda x: torch.func.grad(lambda y: squares(call, y, *others))(x).square().sum()
        )(first)
    outside = first.detach().requires_grad_()
    grad = torch.func.grad(lambda x: squares(call, x, *others))(outside)
    with pytest.raises(RuntimeError, match="first order"):
        grad.sum().backward()


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_outside_of_a_gradient_is_refused(call: Callable[..., Tensor]) -> None:
    first, *others = CALLS[call]()
    tangent = torch.ones_like(first)
    grad = torch.func.grad_and_value(lambda x: squares(call, x, *others))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(grad, (first,), (tangent,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.hessian(lambda x: squares(call, x, *others))(first)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        grad(forward_ad.make_dual(first, tangent))
