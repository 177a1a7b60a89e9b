"""The operations that are measured: their inputs, their truth and the contestants.

``attention``: the core alone, (B, L, 3C) -> (B, L, C), with bias table, time token and biases.
``block``: the transformer block, (B, L, C) -> (B, L, C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from diffit.nn import DiffiTBlock
from diffit_kernels import WindowAttentionProblem, use_backend, window_attention
from harness import errors
from inputs import image_tokens, time_tokens
from peers import PEERS, Peer, PeerBlock, eager, peer_attention
from results import FLOOR, OURS
from shapes import Shape

OPERATIONS = ("attention", "block")
DIRECTIONS = ("forward", "backward")

SEED = 0
TABLE = "relative_position_bias_table"
TABLE_STD = 0.5  # of a trained bias; a new one hardly differs from none

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute an operation, and the tensors by which it is differentiated."""

    name: str
    outputs: Callable[[], tuple[Tensor, ...]]
    leaves: Tensors
    grad_outputs: tuple[Tensor, ...]
    gflop: dict[str, float]  # by direction
    compiled: bool = False
    timed: Callable[[], Tensors] | None = None  # instead of the call that is verified

    def call(self, direction: str) -> Callable[[], Tensors]:
        """What is timed, with its named results.

        Forward is the pass of inference. Backward runs on one graph, which is kept, and gives the
        gradients of all inputs and parameters.
        """
        if direction == "forward":
            return self._forward
        outputs = self.outputs()
        leaves = list(self.leaves.values())

        def backward() -> Tensors:
            grads = torch.autograd.grad(outputs, leaves, self.grad_outputs, retain_graph=True)
            return dict(zip(self.leaves, grads, strict=True))

        return backward

    def _forward(self) -> Tensors:
        with torch.no_grad():
            return {f"output {i}": output for i, output in enumerate(self.outputs())}


@dataclass(frozen=True)
class Case:
    """An operation at one shape and dtype; the dicts are by direction."""

    contestants: list[Contestant]
    truth: dict[str, Tensors]
    plain_errors: dict[str, dict[str, float]]


def build(operation: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """The case of an operation, with its truth and the errors of plain PyTorch.

    The truth is the reference backend in float64, on inputs that were rounded to ``dtype``. Plain
    PyTorch is the eager peer.
    """
    exact, *contestants = contestants_of(operation, shape, dtype, device, PEERS)
    plain = next(contestant for contestant in contestants if contestant.name == eager.PEER.name)
    return Case(contestants, *judge(exact, plain))


def contestants_of(
    operation: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[Peer],
) -> list[Contestant]:
    """The truth, ours and these peers; of a block also its products alone."""
    problem = shape.problem(dtype, device)
    make = {"attention": _attention, "block": _block}[operation]
    return make(problem, peers, *layer_data(shape, problem))


def judge(
    exact: Contestant, plain: Contestant
) -> tuple[dict[str, Tensors], dict[str, dict[str, float]]]:
    """Truth and plain errors of a case, by direction; operators run on the reference backend."""
    truth, plain_errors = {}, {}
    with use_backend("reference"):
        for direction in DIRECTIONS:
            truth[direction] = exact.call(direction)()
            plain_errors[direction] = errors(plain.call(direction)(), truth[direction])
    return truth, plain_errors


def layer_data(
    shape: Shape, problem: WindowAttentionProblem
) -> tuple[DiffiTBlock, Tensor, Tensor, Tensor]:
    """A block, x, temb and the gradient of the output, in the dtype of the problem.

    The bias table stays in float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    x, grad = (
        image_tokens(problem.batch, shape.grid, shape.dim, generator, first) for first in (0, 100)
    )
    temb = time_tokens(problem.batch, shape.temb_dim, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        block = DiffiTBlock(
            shape.dim, shape.num_heads, temb_dim=shape.temb_dim, window_size=shape.window
        )
        nn.init.normal_(block.attn.qkv.weight, std=shape.dim**-0.5)
        nn.init.normal_(block.attn.get_parameter(TABLE), std=TABLE_STD)
    device = problem.device_type
    block.to(device)
    for name, parameter in block.named_parameters():
        if not name.endswith(TABLE):
            parameter.data = parameter.data.to(problem.dtype)
    x, temb, grad = (tensor.to(device, problem.dtype) for tensor in (x, temb, grad))
    return block, x, temb, grad


def _attention(
    problem: WindowAttentionProblem,
    peers: Sequence[Peer],
    block: DiffiTBlock,
    x: Tensor,
    temb: Tensor,
    grad: Tensor,
) -> list[Contestant]:
    """The truth, ours and the peers; leaves are qkv, the table and the row of each sample."""
    attn = block.attn
    assert attn.qkv_temb is not None
    with torch.no_grad():
        qkv = linear(x, attn.qkv.weight)
        row = attn.qkv_temb(temb) + attn.qkv.bias
    leaves = _leaves({"qkv": qkv, "table": attn.get_parameter(TABLE), "row": row})
    gflop = _gflop(problem, products=0)

    def ours(qkv: Tensor, table: Tensor, row: Tensor) -> Tensor:
        q_row, _, v_row = row.chunk(3, dim=1)
        return window_attention(
            qkv,
            table,
            num_heads=problem.num_heads,
            window_size=problem.window_size,
            grid_size=problem.grid_size,
            q_row=q_row,
            v_row=v_row,
        )

    def contestant(
        name: str, function: Callable[..., Tensor], leaves: Tensors, compiled: bool = False
    ) -> Contestant:
        grads = (grad.to(leaves["qkv"].dtype),)
        return Contestant(
            name, lambda: (function(*leaves.values()),), leaves, grads, gflop, compiled
        )

    return [
        contestant("truth", ours, _leaves(leaves, torch.float64)),
        contestant(OURS, ours, leaves),
        *(
            contestant(peer.name, peer_attention(peer, problem), leaves, peer.compiled)
            for peer in peers
        ),
    ]


def _block(
    problem: WindowAttentionProblem,
    peers: Sequence[Peer],
    block: DiffiTBlock,
    x: Tensor,
    temb: Tensor,
    grad: Tensor,
) -> list[Contestant]:
    """The truth, ours, the peers and the floor; leaves are x, temb and the parameters."""
    temb_dim = temb.shape[1]
    gflop = _gflop(problem, products=12)

    def contestant(
        name: str, block: nn.Module, dtype: torch.dtype = problem.dtype, compiled: bool = False
    ) -> Contestant:
        inputs = _leaves({"x": x, "temb": temb}, dtype)
        leaves = inputs | dict(block.named_parameters())
        grads = (grad.to(dtype),)
        return Contestant(name, lambda: (block(*inputs.values()),), leaves, grads, gflop, compiled)

    return [
        contestant("truth", deepcopy(block).double(), torch.float64),
        contestant(OURS, block),
        *(
            contestant(
                peer.name,
                PeerBlock(peer, problem, temb_dim, block.state_dict()),
                compiled=peer.compiled,
            )
            for peer in peers
        ),
        _floor(problem, block, x),
    ]


def _floor(problem: WindowAttentionProblem, block: DiffiTBlock, x: Tensor) -> Contestant:
    """qkv, proj, fc1 and fc2 as products alone, each on an input that is already there."""
    hidden = linear(x, block.mlp.fc1.weight).detach()
    layers = {
        "qkv": (x, block.attn.qkv),
        "proj": (x, block.attn.proj),
        "fc1": (x, block.mlp.fc1),
        "fc2": (hidden, block.mlp.fc2),
    }
    pairs = {
        name: (tokens.detach().requires_grad_(), layer.weight)
        for name, (tokens, layer) in layers.items()
    }

    def outputs() -> tuple[Tensor, ...]:
        return tuple(linear(tokens, weight) for tokens, weight in pairs.values())

    leaves = {
        f"{name} {kind}": tensor
        for name, pair in pairs.items()
        for kind, tensor in zip(("input", "weight"), pair, strict=True)
    }
    grads = tuple(output.detach() for output in outputs())
    return Contestant(FLOOR, outputs, leaves, grads, _gflop(problem, products=12, attention=False))


def _leaves(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}


def _gflop(
    problem: WindowAttentionProblem, *, products: int, attention: bool = True
) -> dict[str, float]:
    """10^9 operations of ``products`` (C, C) weights and, if so, of the attention products.

    The gradient of a product takes two products. That of attention takes five where the forward
    pass has two, since the logits are computed again.
    """
    weights = 2 * products * problem.dim**2 * problem.batch * problem.tokens
    attended = problem.flops if attention else 0
    return {
        "forward": (weights + attended) / 1e9,
        "backward": (2 * weights + 2.5 * attended) / 1e9,
    }
