"""The contract of ``torch.ops.diffit.*`` with PyTorch: opcheck, autograd, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

import diffit_kernels as dk
from diffit.nn import TMSA, DiffiTBlock, TMSA2d
from diffit_kernels.block import Weights
from diffit_kernels.ops.block import block
from tests.cases import DTYPES, AttentionCase, MLPCase, stack
from tests.numeric_rule import assert_numeric_rule

Case = TypeVar("Case", AttentionCase, MLPCase)

CASE = AttentionCase((3, 5), 8, windows=(2, 1))
MLP = MLPCase((2, 5, 8), 16, 8, residual=torch.float32)
LAYOUTS = ["contiguous", "channels first", "tokens first", "sliced channels"]


def opcheck(operator: torch._ops.OpOverloadPacket, *arguments: object) -> None:
    utilities = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def _in_layout(case: Case, layout: str, dtype: torch.dtype) -> Case:
    strided = layout != "contiguous"
    return replace(case, layout=layout, grad_layout=layout, dtype=dtype, strided=strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_window_attention(fastest_backend: str, layout: str, dtype: torch.dtype) -> None:
    case = _in_layout(CASE, layout, dtype)
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs().values()]
    opcheck(torch.ops.diffit.window_attention, *inputs, *case.arguments)
    opcheck(torch.ops.diffit.window_attention, inputs[0], None, None, None, *case.arguments)

    inputs = [tensor.detach() for tensor in inputs]
    grad_out = case.grad_out()
    for present in (inputs, [inputs[0], None, None, None]):
        _, lse = torch.ops.diffit.window_attention(*present, *case.arguments)
        opcheck(
            torch.ops.diffit.window_attention_backward, grad_out, *present, lse, *case.arguments
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_mlp(fastest_backend: str, layout: str, dtype: torch.dtype) -> None:
    case = _in_layout(MLP, layout, dtype)
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs().values()]
    for residual in (inputs[5], inputs[5].detach().to(dtype).requires_grad_(), None):
        opcheck(torch.ops.diffit.mlp, *inputs[:5], residual, True)
        with torch.no_grad():
            opcheck(torch.ops.diffit.mlp, *inputs[:5], residual, False)

    inputs = [tensor.detach() for tensor in inputs]
    x_and_weights = inputs[:5]
    _, hidden = torch.ops.diffit.mlp(*inputs, True)
    grad_y = case.grad_y().to(dtype)
    for weights in (True, False):
        opcheck(torch.ops.diffit.mlp_backward, grad_y, *x_and_weights, hidden, weights)


def test_the_result_is_contiguous(fastest_backend: str) -> None:
    for layout in LAYOUTS:
        inputs = replace(CASE, layout=layout).inputs().values()
        out, lse = torch.ops.diffit.window_attention(*inputs, *CASE.arguments)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert dk.mlp(*replace(MLP, layout=layout).inputs().values()).is_contiguous()


def test_results_may_be_changed_in_place(fastest_backend: str) -> None:
    """As those of PyTorch's layers; but the sum of ``add_layer_norm``, which its gradient needs."""
    layer = DiffiTBlock(32, 2, window_size=4)
    attn, perceptron = layer.attn, list(layer.mlp.parameters())
    weights = Weights(
        *(attn.qkv.weight, attn.qkv.bias, None, None, attn.relative_position_bias_table),
        *(attn.proj.weight, attn.proj.bias, *perceptron),
    )
    options = {"num_heads": 2, "window_size": 4, "grid_size": None, "scale": None}
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "window_attention": lambda x: dk.window_attention(x.repeat(1, 1, 3), None, **options),
        "linear": lambda x: torch.ops.diffit.linear(x, attn.qkv.weight, attn.qkv.bias),
        "layer_norm": dk.layer_norm,
        "add_layer_norm": lambda x: dk.add_layer_norm(x, x)[1],
        "mlp": lambda x: dk.mlp(x, *perceptron),
        "mlp and residual": lambda x: dk.mlp(x, *perceptron, x),
        "mlp of rows": lambda x: dk.mlp(x[0], *perceptron),
        "block": lambda x: block(x, None, None, weights, eps=(1e-6, 1e-6), **options),
        "TMSA": attn,
        "DiffiTBlock": layer,
    }
    x = torch.randn(2, 16, 32, requires_grad=True)
    for name, call in calls.items():
        (expected,) = torch.autograd.grad(call(x).square().sum(), x)
        changed = call(x)
        changed += 0
        (got,) = torch.autograd.grad(changed.square().sum(), x)
        torch.testing.assert_close(got, expected, msg=name)


def test_only_the_gradients_asked_for(fastest_backend: str) -> None:
    """Every input alone: its gradient is that of the call that asks for all."""
    expected = CASE.operator()
    for name in CASE.inputs():
        inputs = CASE.inputs()
        inputs[name].requires_grad_()
        out, _ = torch.ops.diffit.window_attention(*inputs.values(), *CASE.arguments)
        (grad,) = torch.autograd.grad(out, inputs[name], CASE.grad_out())
        assert torch.equal(grad, expected[f"grad_{name}"][0]), name

    expected = MLP.operator()
    for name in MLP.inputs():
        inputs = MLP.inputs()
        inputs[name].requires_grad_()
        (grad,) = torch.autograd.grad(dk.mlp(**inputs), inputs[name], MLP.grad_y())
        assert torch.equal(grad, expected[f"grad_{name}"][0]), name


def test_a_residual_alone_saves_nothing(fastest_backend: str) -> None:
    """Its gradient is that of the result; there is no backward pass for it."""
    inputs = MLP.inputs()
    inputs["residual"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = dk.mlp(**inputs)
        assert not y.grad_fn.saved_tensors[-1].numel()
        y.backward(MLP.grad_y())
    assert torch.equal(inputs["residual"].grad, MLP.grad_y())
    assert torch.ops.diffit.mlp_backward not in counter.get_flop_counts()["Global"]


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


def test_no_gradient_in_none_out(fastest_backend: str) -> None:
    mlp, attention = MLP.inputs(), CASE.inputs()
    for leaves in (mlp, attention):
        for leaf in leaves.values():
            leaf.requires_grad_()
    out, _ = torch.ops.diffit.window_attention(*attention.values(), *CASE.arguments)
    for result, leaves in ((dk.mlp(**mlp), mlp), (out, attention)):
        dropped = _NoGradient.apply(result).sum()
        grads = torch.autograd.grad(dropped, tuple(leaves.values()), allow_unused=True)
        assert all(grad is None for grad in grads)


def test_no_zeros_for_what_has_no_gradient(fastest_backend: str) -> None:
    """They would be as large as the hidden layer."""
    y = dk.mlp(**{name: tensor.requires_grad_() for name, tensor in MLP.inputs().items()})
    with torch.profiler.profile() as profile:
        y.backward(MLP.grad_y())
    assert "aten::zeros" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("operator", ["window_attention", "mlp"])
def test_a_second_derivative_is_refused(fastest_backend: str, operator: str) -> None:
    """There is none; a wrong one would be silent."""
    if operator == "mlp":
        leaf, *others = MLP.inputs().values()
        out = dk.mlp(leaf.requires_grad_(), *others)
    else:
        leaf, *others = CASE.inputs().values()
        out, _ = torch.ops.diffit.window_attention(leaf.requires_grad_(), *others, *CASE.arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}_backward"):
        grad.sum().backward()


# --- torch.compile


def _layer(name: str) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    """A layer and its inputs for a batch."""
    torch.manual_seed(0)
    options = {"temb_dim": 6, "window_size": (2, 3)}
    generator = torch.Generator().manual_seed(1)
    shape = (16, 4, 3) if name == "TMSA2d" else (12, 16)

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, *shape, generator=generator)
        return x.requires_grad_(), torch.randn(batch, 6, generator=generator).requires_grad_()

    if name == "TMSA2d":
        return TMSA2d(16, 2, **options), inputs
    kind = TMSA if name == "TMSA" else DiffiTBlock
    return _OnGrid(kind(16, 2, **options), (4, 3)), inputs


class _OnGrid(nn.Module):
    def __init__(self, layer: nn.Module, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.layer = layer
        self.grid_size = grid_size

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.layer(x, temb, grid_size=self.grid_size)


def _outputs(module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """y and the gradients of sum(y ** 2) with respect to inputs and parameters."""
    y = call(*inputs)
    names = ["x", "temb", *(name for name, _ in module.named_parameters())]
    grads = torch.autograd.grad(y.square().sum(), [*inputs, *module.parameters()])
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _judge_compiled(name: str, backend: str, left_out: str | None = None) -> None:
    """The rule, against plain PyTorch, over several inputs: one maximum is luck."""
    module, inputs = _layer(name)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    exact = deepcopy(module).double()
    got, plain, truth = [], [], []
    for _ in range(8):
        tensors = inputs(2)
        got.append(_outputs(module, compiled, *tensors))
        with dk.use_backend("reference"):
            plain.append(_outputs(module, module, *tensors))
            doubles = (x.detach().double().requires_grad_() for x in tensors)
            truth.append(_outputs(exact, exact, *doubles))
    stacked = [stack(outputs) for outputs in (got, plain, truth)]
    if left_out is not None:
        for outputs in stacked:
            del outputs[left_out]
    assert_numeric_rule(*stacked)


@pytest.mark.parametrize("name", ["TMSA", "TMSA2d", "DiffiTBlock"])
def test_compiled_whole(fastest_backend: str, fresh_compiler: None, name: str) -> None:
    """One graph, forward and backward."""
    _judge_compiled(name, "aot_eager")


def test_inductor(fastest_backend: str, fresh_compiler: None) -> None:
    """In PyTorch 2.11 but for a gradient that is Inductor's own sum, and breaks the rule."""
    own_sum = "layer.attn.proj.bias" if torch.__version__ < (2, 12) else None
    _judge_compiled("DiffiTBlock", "inductor", left_out=own_sum)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("kind", [TMSA, DiffiTBlock])
def test_other_squares_compile(
    fastest_backend: str, fresh_compiler: None, kind: type[nn.Module], dynamic: bool | None
) -> None:
    """Grids that are not named."""
    layer = kind(16, 2, window_size=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for side in (4, 6, 2, 8, 10):
        x = torch.randn(2, side * side, 16)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["TMSA", "TMSA2d", "DiffiTBlock"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_another_batch_does_not_recompile(
    fastest_backend: str, fresh_compiler: None, dynamic: bool | None, name: str
) -> None:
    """``dynamic=True``: one graph for every batch. Default: the second batch makes it dynamic."""
    module, inputs = _layer(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2,) if dynamic else (2, 3):
        compiled(*inputs(batch)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 4, 7):
            tensors = inputs(batch)
            y = compiled(*tensors)
            y.sum().backward()
            torch.testing.assert_close(y, module(*tensors))


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_operators(fastest_backend: str, dtype: torch.dtype) -> None:
    """Results in autocast's dtype; the table stays float32, and so do the gradients."""
    tensors = {name: x.requires_grad_() for name, x in CASE.inputs().items()}
    with torch.autocast("cpu", dtype):
        out, lse = torch.ops.diffit.window_attention(*tensors.values(), *CASE.arguments)
        *perceptron, residual = MLP.inputs().values()
        y = dk.mlp(*perceptron)
        sums = [dk.mlp(*perceptron, residual.to(kind)) for kind in (torch.float32, *DTYPES[1:])]
    assert out.dtype == y.dtype == dtype
    assert lse.dtype == torch.float32
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors.values())

    rounded = {k: x if k == "rel_pos_table" else x.to(dtype) for k, x in CASE.inputs().items()}
    expected, _ = torch.ops.diffit.window_attention(*rounded.values(), *CASE.arguments)
    assert torch.equal(out, expected)
    rounded = [x.to(dtype) for x in perceptron]
    assert torch.equal(y, dk.mlp(*rounded))
    for kind, got in zip((torch.float32, *DTYPES[1:]), sums, strict=True):
        # As residual + y has it: the two 16-bit dtypes meet in float32.
        promoted = residual.to(kind).to(torch.promote_types(kind, dtype))
        assert torch.equal(got, dk.mlp(*rounded, promoted))
        assert got.dtype == promoted.dtype


def test_backward_inside_autocast(fastest_backend: str) -> None:
    """Autocast at the time of the backward pass changes nothing in it."""
    attention = {name: x.requires_grad_() for name, x in CASE.inputs().items()}
    perceptron = {name: x.requires_grad_() for name, x in MLP.inputs().items()}
    out, _ = torch.ops.diffit.window_attention(*attention.values(), *CASE.arguments)
    for result, leaves in ((out, attention), (dk.mlp(*perceptron.values()), perceptron)):
        grads = [
            torch.autograd.grad(result, list(leaves.values()), result.detach(), retain_graph=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(torch.autograd.grad(result, list(leaves.values()), result.detach()))
        for outside, inside in zip(*grads, strict=True):
            assert inside.dtype == torch.float32
            assert torch.equal(inside, outside)


def test_autocast_leaves_float64_alone() -> None:
    inputs = replace(CASE, dtype=torch.float64).inputs().values()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = torch.ops.diffit.window_attention(*inputs, *CASE.arguments)
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("name", ["TMSA", "TMSA2d", "DiffiTBlock"])
def test_autocast_layers(fastest_backend: str, name: str) -> None:
    """bfloat16 inside, float32 parameters with float32 gradients."""
    module, inputs = _layer(name)
    x, temb = inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, temb)
    # The residual stream of a block stays float32.
    assert y.dtype == (torch.float32 if name == "DiffiTBlock" else torch.bfloat16)
    y.sum().backward()
    for leaf in (x, temb, *module.parameters()):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_autocast_compiled(fastest_backend: str, fresh_compiler: None) -> None:
    module, inputs = _layer("DiffiTBlock")
    x, temb = inputs(2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, temb), module(x, temb))


def test_nothing_is_computed_on_meta() -> None:
    with torch.device("meta"):
        qkv, table = torch.empty(2, 30, 48), torch.empty(45, 2)
    out = dk.window_attention(qkv, table, num_heads=2, window_size=(3, 5), grid_size=(6, 5))
    assert out.device.type == "meta"
    assert out.shape == (2, 30, 16)
    x, weight, bias = (torch.empty(*shape, device="meta") for shape in ((3, 8), (8, 8), (8,)))
    assert dk.mlp(x, weight, bias, weight, bias).shape == linear(x, weight).shape


# --- counting operations


def test_flop_counter() -> None:
    """The products of the definition, forward and backward, whatever backend runs."""
    problem = CASE.problem
    product = 2 * problem.batch * problem.tokens * problem.window_tokens * problem.dim
    tensors = {name: x.requires_grad_() for name, x in CASE.inputs().items()}
    with FlopCounterMode(display=False) as counter:
        out, _ = torch.ops.diffit.window_attention(*tensors.values(), *CASE.arguments)
        out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.diffit.window_attention] == 2 * product == problem.flops
    assert counts[torch.ops.diffit.window_attention_backward] == 5 * product

    x, w1, b1, w2, b2, residual = (tensor.requires_grad_() for tensor in MLP.inputs().values())
    with FlopCounterMode(display=False) as counter:
        dk.mlp(x, w1, b1, w2, b2, residual).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    forward = 2 * (x.numel() // x.shape[-1]) * (w1.numel() + w2.numel())
    assert counts[torch.ops.diffit.mlp] == forward
    assert counts[torch.ops.diffit.mlp_backward] == 2 * forward

    with FlopCounterMode(display=False) as counter:
        dk.mlp(x, *(tensor.detach() for tensor in (w1, b1, w2, b2))).sum().backward()
    assert counter.get_flop_counts()["Global"][torch.ops.diffit.mlp_backward] == forward
