"""The contestants of a contest: our backends, the peers, and the bounds beside them.

``forward`` is the pass of inference; ``training`` is a forward and a backward pass, with the
gradients of everything, the bias table too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from diffit_kernels import WindowAttentionProblem, use_backend
from gpu.rows import BOUND, OUR, OURS, PEER, Row
from gpu.workers import Task
from harness import errors
from operations import Contestant, Tensors, contestants_of
from peers import PEERS, kernels
from results import FLOOR, OK, layer_columns
from shapes import Shape

# What of a contestant's operations a direction takes.
DIRECTIONS = {"forward": ("forward",), "training": ("forward", "backward")}
PLAIN, PLAIN_WITHOUT_BIAS = "eager", kernels.WITHOUT_BIAS[0].name
WITHOUT_BIAS = tuple(peer.name for peer in kernels.WITHOUT_BIAS)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A contestant with what its result is held to; a floor is held to nothing."""

    row: Row
    call: Callable[[], Tensors]
    gflop: float
    truth: Tensors | None
    plain_errors: dict[str, float]


def entries(task: Task, dtype: torch.dtype, device: torch.device, say: Say) -> Iterator[Entry]:
    """All contestants, ours first, with their truths."""
    shape, direction = Shape(**task["shape"]), task["direction"]
    peers = (*PEERS, *kernels.PEERS, *kernels.WITHOUT_BIAS)
    exact, ours, *others = contestants_of(task["operation"], shape, dtype, device, peers)
    by_name = {contestant.name: contestant for contestant in others}
    say("truth")
    with use_backend("reference"):
        truth = call_of(exact, direction)()
        plain = errors(call_of(by_name[PLAIN], direction)(), truth)
        for name, leaf in exact.leaves.items():
            if name.endswith("table"):
                leaf.detach().zero_()
        truth_without_bias = call_of(_without_table(exact), direction)()
        plain_peer = _without_table(by_name[PLAIN_WITHOUT_BIAS])
        plain_without_bias = errors(call_of(plain_peer, direction)(), truth_without_bias)

    row = partial(_row, shape, shape.problem(dtype, device), task)
    gflop = sum(ours.gflop[part] for part in DIRECTIONS[direction])
    for backend in OURS:
        call = call_of(ours, direction, backend)
        yield Entry(row(backend, OUR), call, gflop, truth, plain)
    for name, contestant in by_name.items():
        gflop = sum(contestant.gflop[part] for part in DIRECTIONS[direction])
        if name in WITHOUT_BIAS:
            call = call_of(_without_table(contestant), direction)
            yield Entry(row(name, BOUND), call, gflop, truth_without_bias, plain_without_bias)
        else:
            call = call_of(contestant, direction)
            held = None if name == FLOOR else truth
            yield Entry(row(name, BOUND if name == FLOOR else PEER), call, gflop, held, plain)


def call_of(
    contestant: Contestant, direction: str, backend: str | None = None
) -> Callable[[], Tensors]:
    """What is timed, with its named results; operators run on a backend if one is named."""
    forward = contestant.call("forward")
    leaves = list(contestant.leaves.values())

    def training() -> Tensors:
        outputs = contestant.outputs()
        grads = torch.autograd.grad(outputs, leaves, contestant.grad_outputs)
        named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return named | dict(zip(contestant.leaves, grads, strict=True))

    call = forward if direction == "forward" else training

    def on_backend() -> Tensors:
        with use_backend(backend) if backend else nullcontext():
            return call()

    return on_backend


def _without_table(contestant: Contestant) -> Contestant:
    leaves = {k: leaf for k, leaf in contestant.leaves.items() if not k.endswith("table")}
    return replace(contestant, leaves=leaves)


def _row(
    shape: Shape, problem: WindowAttentionProblem, task: Task, contestant: str, role: str
) -> Row:
    return Row(
        **layer_columns(shape.name, problem),
        precision=task["precision"],
        operation=task["operation"],
        direction=task["direction"],
        contestant=contestant,
        role=role,
        status=OK,
    )
