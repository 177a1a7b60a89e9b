"""Which backend runs an operator: one table, no surprises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from diffit_kernels import cuda, native, products, reference, triton
from diffit_kernels.problem import Problem

# A backend is a module with the functions of `reference`, or the reason why there is none.
_BACKENDS: dict[str, ModuleType | str] = {
    "reference": reference,
    "cpu": native,
    "triton": triton,
    "cuda": cuda,
}
# What "auto" tries, in this order, for a tensor on each type of device; "cuda" only where it has
# been measured to be faster.
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_AUTO_ELSEWHERE = ("reference",)


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        known = ", ".join(["auto", *_BACKENDS])
        raise ValueError(f"{source}: expected one of {known}, got {name!r}")
    return name


_chosen: str | None = None


def choice() -> str:
    """The backend that was asked for, or "auto"."""
    return _from_environment() if _chosen is None else _chosen


@cache  # looking there takes longer than choosing
def _from_environment() -> str:
    return _checked(os.environ.get("DIFFIT_BACKEND", "auto"), "DIFFIT_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend.

    Args:
        name: "auto" (the default elsewhere), "reference", "cpu", "triton" or "cuda". The choice
            holds for the whole process, so that it also reaches autograd's threads, and comes
            before the environment variable ``DIFFIT_BACKEND``, which is read once.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: raised by the operator when the backend cannot run it, with the reason.
    """
    global _chosen
    previous, _chosen = _chosen, _checked(name, "use_backend")
    try:
        yield
    finally:
        _chosen = previous


def available_backends() -> dict[str, str | None]:
    """For each backend None, or the reason why it cannot run in this process."""
    return {
        name: backend if isinstance(backend, str) else backend.unavailable()
        for name, backend in _BACKENDS.items()
    }


def _reason(name: str, problem: Problem) -> str | None:
    backend = _BACKENDS[name]
    if isinstance(backend, str):
        return backend
    return backend.unavailable() or backend.supports(problem)


def runs_native(device_type: str) -> bool:
    """Whether tensors on this device go to the compiled CPU kernels, if they take the problem."""
    return device_type == "cpu" and choice() in ("auto", "cpu") and native.unavailable() is None


def select_products(device_type: str) -> ModuleType:
    """The module whose ``linear``, ``mm`` and ``weight_gradient`` multiply tensors there."""
    return native if runs_native(device_type) else products


def select(problem: Problem) -> ModuleType:
    """The module that runs this problem."""
    chosen = choice()
    if chosen != "auto":
        if reason := _reason(chosen, problem):
            raise RuntimeError(f"backend {chosen!r} cannot run this call: {reason}")
    else:
        names = _AUTO.get(problem.device_type, _AUTO_ELSEWHERE)
        chosen = next(
            name
            for name in names
            if (name != "cuda" or cuda.is_faster(problem)) and _reason(name, problem) is None
        )
    backend = _BACKENDS[chosen]
    assert isinstance(backend, ModuleType)
    return backend
