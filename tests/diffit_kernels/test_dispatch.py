"""Which backend runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels import dispatch, native, reference
from diffit_kernels.native import library
from diffit_kernels.problem import MLPProblem
from tests.backends import BACKENDS
from tests.cases import AttentionCase

CASE = AttentionCase((3, 5), 24)
MLP = MLPProblem(3, 8, 16, 8, torch.float32, "cpu")

needs_native = pytest.mark.skipif(
    BACKENDS == ["reference"], reason="the compiled module is not there"
)


@pytest.fixture(autouse=True)
def no_choice_from_outside(environment_names: Callable[[str], None]) -> None:
    pass


def selected(case: AttentionCase = CASE) -> ModuleType:
    return dispatch.select(case.problem)


def test_available_backends_gives_a_reason_or_none() -> None:
    backends = dk.available_backends()
    assert list(backends) == ["reference", "cpu", "triton", "cuda"]
    assert backends["reference"] is None
    assert all(reason is None or reason for reason in backends.values())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_compiled_kernels(dtype: torch.dtype) -> None:
    assert selected(replace(CASE, dtype=dtype)) is native
    assert dispatch.select(replace(MLP, dtype=dtype)) is native


@needs_native
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(CASE, dtype=torch.float64), "float64"),
        (replace(CASE, head_dim=12), "head width 12"),
        (replace(CASE, head_dim=136), "head width 136"),
        (AttentionCase((1, 33), 24), r"window \(1, 33\)"),
    ],
)
def test_what_the_compiled_kernels_cannot_run(case: AttentionCase, reason: str) -> None:
    """Auto goes on to the reference; the explicit choice raises and says why."""
    assert selected(case) is reference
    with dk.use_backend("cpu"), pytest.raises(RuntimeError, match=f"'cpu'.*{reason}"):
        case.operator()


@needs_native
def test_mlp_in_float64() -> None:
    problem = replace(MLP, dtype=torch.float64)
    assert dispatch.select(problem) is reference
    with dk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu'.*float64"):
        dispatch.select(problem)


def test_other_devices_run_on_the_reference() -> None:
    assert dispatch.select(replace(CASE.problem, device_type="xpu")) is reference


@needs_native
def test_the_compiled_kernels_stay_on_the_cpu() -> None:
    problem = replace(CASE.problem, device_type="xpu")
    with dk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu'.*on xpu"):
        dispatch.select(problem)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_import_error", "no compiler here")
    assert dk.available_backends()["cpu"] == "no compiler here"
    assert selected() is reference
    with dk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu'.*no compiler here"):
        CASE.operator()


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_is_a_reason(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(dispatch._BACKENDS, name, "no such kernels")
    assert dk.available_backends()[name] == "no such kernels"
    with dk.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}'.*no such kernels"):
        CASE.operator()


def test_use_backend_nests_and_restores() -> None:
    before = selected()
    with dk.use_backend("reference"):
        assert selected() is reference
        with dk.use_backend("auto"):
            assert selected() is before
        assert selected() is reference
        with pytest.raises(KeyError), dk.use_backend("auto"):
            raise KeyError
        assert selected() is reference
    assert selected() is before


def test_use_backend_reaches_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd may run it on a thread of its own."""
    calls = []
    original = reference.window_attention_backward
    monkeypatch.setattr(
        reference,
        "window_attention_backward",
        lambda *arguments: calls.append(1) or original(*arguments),
    )
    with dk.use_backend("reference"):
        CASE.operator()
    assert calls


def test_environment_variable(
    environment_names: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_names("reference")
    assert selected() is reference
    monkeypatch.setenv("DIFFIT_BACKEND", "triton")
    assert selected() is reference  # it is read once
    monkeypatch.setitem(dispatch._BACKENDS, "triton", "no such kernels")
    environment_names("triton")
    with pytest.raises(RuntimeError, match="no such kernels"):
        selected()
    with dk.use_backend("reference"):
        assert selected() is reference


def test_unknown_names(environment_names: Callable[[str], None]) -> None:
    known = "auto, reference, cpu, triton, cuda"
    with pytest.raises(ValueError, match=f"use_backend: .*{known}.*'gpu'"), dk.use_backend("gpu"):
        pass
    environment_names("gpu")
    with pytest.raises(ValueError, match=f"DIFFIT_BACKEND: .*{known}.*'gpu'"):
        CASE.operator()


@needs_native
def test_use_instruction_set() -> None:
    names, best = native.instruction_sets(), native.instruction_set()
    assert names[0] == "generic"
    assert best in names
    for name in names:
        with native.use_instruction_set(name):
            assert native.instruction_set() == name
        assert native.instruction_set() == best
    with pytest.raises(ValueError, match="sse9"), native.use_instruction_set("sse9"):
        pass
    assert native.instruction_set() == best
