"""A whole block in inference: one operator, or those of its layers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffit_kernels as dk
from diffit.nn import TMSA, DiffiTBlock
from diffit_kernels import native, reference
from diffit_kernels.block import Weights
from tests.block_case import CASES, Case, arguments, run
from tests.numeric_rule import assert_numeric_rule

DTYPES = [torch.float32, torch.bfloat16]
BLOCK, TRAINING = torch.ops.diffit.block, torch.ops.diffit.block_training


def runs_at_once(block: nn.Module, inputs: dict[str, Any], call: Callable[..., Any] = run) -> bool:
    with patch.object(native, "block", wraps=native.block) as kernel:
        call(block, inputs)
    return kernel.called


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_the_numeric_rule(
    threads: Callable[[int], None], count: int, case: Case, linear_dtype: torch.dtype
) -> None:
    threads(count)
    block, inputs = case.block(linear_dtype), case.inputs(linear_dtype)
    assert runs_at_once(block, inputs)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with dk.use_backend("reference"):
        plain = run(block, inputs)
    got = run(block, inputs)
    assert_numeric_rule({"y": got}, {"y": plain}, {"y": run(block.double(), exact)})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_do_not_change_a_bit(
    threads: Callable[[int], None], case: Case, linear_dtype: torch.dtype
) -> None:
    """With more threads than parts it is computed layer by layer."""
    block, inputs = case.block(linear_dtype), case.inputs(linear_dtype)
    expected = run(block, inputs)
    for count in (2, 3, 32):
        threads(count)
        assert torch.equal(run(block, inputs), expected)


@pytest.mark.usefixtures("linear_kernels")
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_row_in_place_of_the_token(case: Case) -> None:
    block, inputs = case.block(torch.float32), case.inputs(torch.float32)
    with torch.no_grad():
        row = block.attn.qkv_temb(inputs["temb"])
    by_row = inputs | {"temb": None, "row": row}
    assert runs_at_once(block, by_row)
    torch.testing.assert_close(run(block, by_row), run(block, inputs))


@pytest.mark.usefixtures("linear_kernels")
def test_norms_have_their_own_eps() -> None:
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    block.norm1.eps, block.norm2.eps = 0.5, 8.0
    assert runs_at_once(block, inputs)
    with dk.use_backend("reference"):
        expected = run(block, inputs)
    torch.testing.assert_close(run(block, inputs), expected)


def test_strided_inputs(linear_dtype: torch.dtype) -> None:
    block, inputs = CASES[0].block(linear_dtype), CASES[0].inputs(linear_dtype)
    expected = run(block, inputs)
    for name in ("x", "temb"):
        inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    for parameter in block.parameters():
        parameter.data = torch.stack([parameter.data] * 2, dim=-1)[..., 1]
    assert runs_at_once(block, inputs)
    assert torch.equal(run(block, inputs), expected)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_window(value: float, linear_dtype: torch.dtype) -> None:
    block, inputs = CASES[0].block(linear_dtype), CASES[0].inputs(linear_dtype)
    expected = run(block, inputs)
    inputs["x"][1, 0, 3] = value
    y, expected = (
        out.unflatten(1, (4, 4, 4, 8)).transpose(2, 3) for out in (run(block, inputs), expected)
    )
    assert not y[1, 0, 0].isfinite().any()
    y[1, 0, 0] = expected[1, 0, 0]
    assert torch.equal(y, expected)


# --- when it is one operator


def _attend_elsewhere(block: DiffiTBlock, inputs: dict[str, Any]) -> None:
    class Other(TMSA):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    block.attn.__class__ = Other


def _norm_twice(block: DiffiTBlock, inputs: dict[str, Any]) -> None:
    class Other(DiffiTBlock):
        def normed(self, x: Tensor) -> Tensor:
            return super().normed(super().normed(x))

    block.__class__ = Other


CHANGES: dict[str, Callable[[DiffiTBlock, dict[str, Any]], object]] = {
    "a hook on attention": lambda block, _: block.attn.register_forward_hook(lambda *_: None),
    "a hook on the mlp": lambda block, _: block.mlp.register_forward_pre_hook(lambda *_: None),
    "a hook on a projection": lambda block, _: block.attn.proj.register_forward_hook(
        lambda *_: None
    ),
    "a forward of its own": lambda block, _: setattr(block.mlp, "forward", block.mlp.forward),
    "attention of another class": _attend_elsewhere,
    "a block of another class": _norm_twice,
    "a norm with parameters": lambda block, _: setattr(block, "norm2", nn.LayerNorm(64)),
    "an active dropout": lambda block, _: setattr(block.mlp.drop, "p", 1e-9),
    "no bias": lambda block, _: setattr(block.mlp.fc2, "bias", None),
    "a token for two samples": lambda _, inputs: inputs.update(
        x=inputs["x"][:2], temb=inputs["temb"][:1]
    ),
    "a token of three dimensions": lambda _, inputs: inputs.update(temb=inputs["temb"][:, None]),
    "another dtype": lambda block, inputs: (
        block.double(),
        inputs.update(x=inputs["x"].double(), temb=inputs["temb"].double()),
    ),
}


@pytest.mark.usefixtures("linear_kernels")
@pytest.mark.parametrize("change", CHANGES)
def test_what_takes_the_operators_of_the_layers(change: str) -> None:
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    assert runs_at_once(block, inputs)
    CHANGES[change](block, inputs)
    assert not runs_at_once(block, inputs)


@pytest.mark.usefixtures("linear_kernels")
def test_hooks_on_all_modules_run() -> None:
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(block, inputs)
    finally:
        hook.remove()
    assert {block.attn, block.mlp, block} <= set(seen)


@pytest.mark.usefixtures("linear_kernels")
def test_gradients_and_autocast_take_the_operators_of_the_layers() -> None:
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    assert runs_at_once(block, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_at_once(block, inputs)
    x = inputs["x"].requires_grad_()
    assert not runs_at_once(block, inputs, lambda *_: block(**inputs).sum().backward())
    assert x.grad is not None


# --- the operator itself


def test_operations_are_counted_as_those_of_the_layers() -> None:
    with FlopCounterMode(display=False) as counter:
        BLOCK(**arguments(CASES[0], torch.float32))
    assert BLOCK in counter.get_flop_counts()["Global"]
    with FlopCounterMode(display=False) as of_layers:  # whose hooks keep layers apart
        run(CASES[0].block(torch.float32), CASES[0].inputs(torch.float32))
    assert counter.get_total_flops() == of_layers.get_total_flops()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    call = arguments(CASES[0], dtype)
    torch.library.opcheck(BLOCK, (), call)
    tensors = {k: v.requires_grad_() for k, v in call.items() if isinstance(v, Tensor)}
    torch.library.opcheck(TRAINING, (), call | tensors)


def test_opcheck_of_the_gradient() -> None:
    """With everything, and with nothing that may be absent."""
    tensors = ("x", "temb", "row", *Weights._fields)
    for case in (CASES[2], CASES[3]):
        call = arguments(case, torch.float32)
        if case is CASES[3]:
            call |= dict.fromkeys(("temb", "temb_weight", "temb_bias", "proj_bias"))
        results = TRAINING(**call)
        inputs = list(call.values())[: len(tensors)]
        for of_weights in (True, False):
            all_arguments = (*results, *call.values(), of_weights)
            torch.library.opcheck(torch.ops.diffit.block_backward.default, all_arguments)
            grads = torch.ops.diffit.block_backward(*all_arguments)
            for index, (grad, tensor) in enumerate(zip(grads, inputs, strict=True)):
                there = tensor is not None and (of_weights or index < 3)
                assert grad.numel() == (tensor.numel() if there else 0)


@pytest.mark.usefixtures("linear_kernels")
def test_a_stream_of_float32_is_not_read_as_bfloat16() -> None:
    call, stream = (arguments(CASES[0], dtype) for dtype in (torch.bfloat16, torch.float32))
    y = BLOCK(**call | {"x": stream["x"]})
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, BLOCK(**stream), atol=0.1, rtol=0.1)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "temb of other samples": (
        lambda a: a.update(temb=a["temb"][:1]),
        ValueError,
        r"temb: expected shape \(3, 24\)",
    ),
    "fc1": (
        lambda a: a.update(fc1_weight=a["fc1_weight"][:, :32]),
        ValueError,
        "fc1_weight: expected",
    ),
    "fc2": (
        lambda a: a.update(fc2_weight=a["fc2_weight"][:32], fc2_bias=a["fc2_bias"][:32]),
        ValueError,
        "fc2_weight: expected",
    ),
    "proj": (
        lambda a: a.update(proj_weight=a["proj_weight"].double()),
        TypeError,
        "proj_weight: expected",
    ),
    "table": (
        lambda a: a.update(rel_pos_table=a["rel_pos_table"][1:]),
        ValueError,
        "rel_pos_table: exp",
    ),
    "window": (lambda a: a.update(window_size=(3, 8)), ValueError, "window_size: expected"),
    "eps": (lambda a: a.update(eps2=0.0), ValueError, "eps: expected a positive"),
    "heads": (lambda a: a.update(num_heads=64), ValueError, "rel_pos_table: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(wrong: str) -> None:
    change, error, message = WRONG[wrong]
    call = arguments(CASES[0], torch.float32)
    BLOCK(**call)
    change(call)
    for _ in range(2):  # answers are remembered
        with pytest.raises(error, match=message):
            BLOCK(**call)


def _other_heads(call: dict[str, Any]) -> None:
    call.update(num_heads=16, rel_pos_table=None)


def _few_rows(call: dict[str, Any]) -> None:
    call.update(x=call["x"][:, :8], grid_size=(1, 8), window_size=(1, 8), rel_pos_table=None)


@pytest.mark.parametrize("change", [_other_heads, _few_rows, lambda call: None])
def test_without_kernels_the_operators_of_the_layers_run(
    change: Callable[[dict[str, Any]], None],
) -> None:
    call = arguments(CASES[0], torch.float32)
    change(call)
    with patch.object(native, "block", wraps=native.block) as kernel, dk.use_backend("reference"):
        expected = BLOCK(**call)
    assert not kernel.called
    torch.testing.assert_close(BLOCK(**call), expected)


@pytest.mark.usefixtures("linear_kernels")
def test_hidden_features_are_those_of_the_weights() -> None:
    """As after pruning."""
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    for count in (100, 96):  # without a kernel, and with one
        fc1.weight, fc1.bias = (nn.Parameter(p[:count]) for p in (fc1.weight, fc1.bias))
        fc2.weight = nn.Parameter(fc2.weight[:, :count])
        assert runs_at_once(block, inputs) == (count == 96)


@pytest.mark.usefixtures("linear_kernels")
def test_classes_may_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    assert runs_at_once(block, inputs)
    monkeypatch.setattr(TMSA, "forward", lambda self, x, *args, **options: x)
    assert not runs_at_once(block, inputs)


def test_a_gradient_is_refused() -> None:
    call = arguments(CASES[0], torch.float32)
    call["x"].requires_grad_()
    y = BLOCK(**call)
    with pytest.raises(RuntimeError, match="diffit::block has no derivative: it is"):
        y.sum().backward()


def test_inference_keeps_nothing_that_it_has_used() -> None:
    """While the MLP runs there are the sum and its norm, beside what was given."""
    call = arguments(CASES[0], torch.float32)
    there: list[int] = []

    def sizes() -> dict[int, int]:
        tensors = [tensor for tensor in gc.get_objects() if type(tensor) is Tensor]
        return {tensor.data_ptr(): tensor.numel() for tensor in tensors}

    def count(problem: object, *tensors: Any) -> Any:
        there.append(sum(size for address, size in sizes().items() if address not in before))
        return real(problem, *tensors)

    real, before = reference.mlp, sizes()
    with patch.object(reference, "mlp", count), dk.use_backend("reference"):
        BLOCK(**call)
    assert there == [2 * call["x"].numel()]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    call = arguments(CASES[2], torch.float32)
    x = torch.stack([call["x"], 2 * call["x"]])
    got = torch.vmap(lambda x: BLOCK(**call | {"x": x}))(x)
    torch.testing.assert_close(got, torch.stack([BLOCK(**call | {"x": part}) for part in x]))


def test_a_block_that_is_called_wrongly() -> None:
    """Raises what its layers raise."""
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    wrong = {
        "x": inputs["x"][..., :32],
        "temb": inputs["temb"][:, :5],
        "row": inputs["temb"],
        "grid_size": (5, 5),
    }
    for name, value in wrong.items():
        call = inputs | {name: value}
        messages = []
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled), pytest.raises(ValueError, match=name) as error:
                block(**call)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_compiled() -> None:
    torch._dynamo.reset()
    block, inputs = CASES[0].block(torch.float32), CASES[0].inputs(torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(block, inputs))
