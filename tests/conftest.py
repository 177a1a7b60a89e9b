"""Fixtures: the backends of this machine, and NaN in memory that nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from diffit_kernels import dispatch
from tests.backends import (
    BACKENDS,
    FASTEST,
    GRADIENT_KERNELS,
    LINEAR_KERNELS,
    linear_kernels_on,
    running_on,
)

# On a GPU, deterministic algorithms need this of cuBLAS before its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: with several workers none waits for it in the end."""
    items.sort(key=lambda item: item.name != "test_every_target")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend and instruction set of this machine; operators run on it."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=FASTEST)
def fastest_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend once, the compiled kernels on their fastest instruction set."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=dict(LINEAR_KERNELS))
def linear_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set with kernels of linear layers, which run them."""
    with linear_kernels_on(request.param):
        yield request.param


@pytest.fixture(params=LINEAR_KERNELS, ids=str)
def linear_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The same with every dtype that they take."""
    with linear_kernels_on(request.param[0]):
        yield request.param[1]


@pytest.fixture(params=GRADIENT_KERNELS, ids=str)
def gradient_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Every dtype of the kernels of weights' gradients, which run."""
    with linear_kernels_on(request.param[0]):
        yield request.param[1]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads wait for one another longer than they work on problems this small.

    The tests of threads show that more of them give the same.
    """
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the end of the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def environment_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets DIFFIT_BACKEND as a new process would find it; at first it names "auto"."""

    def name(backend: str) -> None:
        monkeypatch.setenv("DIFFIT_BACKEND", backend)
        dispatch._from_environment.cache_clear()

    name("auto")
    yield name
    dispatch._from_environment.cache_clear()


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """Uninitialized memory reads as NaN, so an element that a kernel leaves out is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def default_algorithms(nan_in_new_memory: None) -> None:
    """PyTorch as users run it: no deterministic algorithms asked for, no NaN."""
    torch.use_deterministic_algorithms(False)
