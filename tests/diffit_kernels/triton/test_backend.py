"""When the Triton kernels run, and what they say when they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels import dispatch, reference, triton
from tests.cases import AttentionCase

CUDA = replace(AttentionCase((3, 5), 24).problem, device_type="cuda")


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    """Nothing is chosen, whatever the environment says."""
    with dk.use_backend("auto"):
        yield


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has a GPU and does not interpret."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_interpreted", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_kernels_for_cuda_tensors(on_a_device: None, dtype: torch.dtype) -> None:
    assert dispatch.select(replace(CUDA, dtype=dtype)) is triton


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(CUDA, dtype=torch.float64), "float64"),
        (replace(CUDA, head_dim=12), "head width 12"),
        (replace(CUDA, head_dim=136), "head width 136"),
        (replace(CUDA, window_size=(1, 65), grid_size=(1, 65)), r"window \(1, 65\)"),
    ],
)
def test_what_the_kernels_cannot_run(
    on_a_device: None, problem: dk.WindowAttentionProblem, reason: str
) -> None:
    assert dispatch.select(problem) is reference
    with dk.use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton'.*{reason}"):
        dispatch.select(problem)


def test_tensors_of_the_cpu_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there only when asked for."""
    problem = replace(CUDA, device_type="cpu")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_interpreted", True)
    assert dispatch.select(problem) is not triton
    with dk.use_backend("triton"):
        assert dispatch.select(problem) is triton
        with pytest.raises(RuntimeError, match=r"interpreter.*bfloat16"):
            dispatch.select(replace(problem, dtype=torch.bfloat16))
        monkeypatch.setattr(triton, "_interpreted", False)
        with pytest.raises(RuntimeError, match="on cpu"):
            dispatch.select(problem)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['triton'] = None", "install the package triton"),
        ("import torch; torch.cuda.is_available = lambda: False", "no CUDA or ROCm device"),
    ],
)
def test_importing_never_fails(before: str, reason: str) -> None:
    script = f"import sys; {before}; import diffit_kernels as dk; print(dk.available_backends())"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    if reason not in done.stdout:
        assert "install the package triton" in done.stdout  # it is not there anyway
