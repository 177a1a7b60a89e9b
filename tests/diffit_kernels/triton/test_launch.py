"""Launches find their compiled kernel again, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffit_kernels as dk
from diffit_kernels.triton import launch as launches
from diffit_kernels.triton.launch import launch
from tests.diffit_kernels.triton.device import DEVICE


class Kernel:
    """What ``launch`` uses of a Triton kernel; writes down the calls of it and of the compiled."""

    arg_names = ("x", "y", "count", "scale", "BLOCK", "WHOLE")

    def __init__(self) -> None:
        self.fn = object()
        self.searched: list[Any] = []
        self.found: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def search(*args: Any, **constants: Any) -> Compiled:
            self.searched.append((grid, args, constants))
            return Compiled(self.found)

        return search


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launches, "_compiled", {})
    return Kernel()


CONSTANTS = {"WHOLE": True, "BLOCK": 32, "num_warps": 4}


def aligned(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(64, dtype=dtype)


def test_the_second_launch_has_all_that_the_first_had(kernel: Kernel) -> None:
    x, y = aligned(), aligned()
    launch(kernel, (5, 2), (x, None), (7, 0.5), CONSTANTS)
    assert kernel.searched == [((5, 2), (x, None, 7, 0.5), CONSTANTS)]
    assert not kernel.found
    launch(kernel, (5, 2), (y, None), (7, 0.5), dict(CONSTANTS))
    assert len(kernel.searched) == 1
    [(grid, args)] = kernel.found
    assert grid[:3] == (5, 2, 1)
    assert args[0] is y
    assert args[1:] == (None, 7, 0.5, 32, True)


@pytest.mark.parametrize(
    ("tensors", "numbers", "constants"),
    [
        ((aligned(), aligned()), (7, 0.5), CONSTANTS),
        ((None, aligned()), (7, 0.5), CONSTANTS),
        ((aligned(torch.float16), None), (7, 0.5), CONSTANTS),
        ((aligned(), None), (16, 0.5), CONSTANTS),
        ((aligned(), None), (1, 0.5), CONSTANTS),
        ((aligned(), None), (7, 0.5), CONSTANTS | {"BLOCK": 64}),
        ((aligned(), None), (7, 0.5), CONSTANTS | {"num_warps": 8}),
        ((aligned()[1:], None), (7, 0.5), CONSTANTS),
    ],
)
def test_a_launch_that_differs_is_searched_for(
    kernel: Kernel, tensors: Any, numbers: Any, constants: Any
) -> None:
    launch(kernel, (1,), (aligned(), None), (7, 0.5), CONSTANTS)
    launch(kernel, (1,), tensors, numbers, constants)
    launch(kernel, (2,), (aligned(), None), (7, 0.5), CONSTANTS)
    assert len(kernel.searched) == 3
    assert not kernel.found
    assert kernel.searched[1][2] == constants


def test_an_address_that_is_no_multiple_of_16_is_never_remembered(kernel: Kernel) -> None:
    for _ in range(2):
        launch(kernel, (1,), (aligned()[1:], None), (7, 0.5), CONSTANTS)
    assert len(kernel.searched) == 2


def test_none_is_remembered_while_somebody_watches(kernel: Kernel) -> None:
    launch(kernel, (1,), (aligned(), None), (7, 0.5), CONSTANTS)
    with launches.forgetful():
        for count in (7, 8, 8):
            launch(kernel, (1,), (aligned(), None), (count, 0.5), CONSTANTS)
    assert len(kernel.searched) == 4
    assert len(launches._compiled) == 1
    launch(kernel, (1,), (aligned(), None), (7, 0.5), CONSTANTS)
    assert len(kernel.searched) == 4
    assert len(kernel.found) == 1


def test_another_kernel_is_searched_for(kernel: Kernel) -> None:
    launch(kernel, (1,), (aligned(), None), (7, 0.5), CONSTANTS)
    other = Kernel()
    launch(other, (1,), (aligned(), None), (7, 0.5), CONSTANTS)
    assert len(other.searched) == 1


def test_not_too_many_are_remembered(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST_COMPILED", 2)
    for count in (3, 4, 5, 3):
        launch(kernel, (1,), (aligned(), None), (count, 0.5), CONSTANTS)
    assert len(kernel.searched) == 4
    assert len(launches._compiled) == 2


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_results_do_not_depend_on_what_was_launched_before(shift: int) -> None:
    """On a GPU compiled kernels differ by what sizes and addresses are multiples of."""
    for rows, features in [(16, 64), (17, 64), (1, 64), (1, 1), (16, 63), (16, 16)] * 2:
        x = torch.randn(rows * features + shift, device=DEVICE)[shift:].view(rows, features)
        with dk.use_backend("reference"):
            expected = dk.layer_norm(x)
        torch.testing.assert_close(dk.layer_norm(x), expected, atol=1e-5, rtol=1e-5)
