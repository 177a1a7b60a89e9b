"""When the CUDA C++ kernels run, what they say when they do not, and that the library is sound."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import diffit_kernels as dk
from diffit.nn import DiffiTBlock
from diffit_kernels import cuda, dispatch, reference, triton
from diffit_kernels.cuda.library import Library
from diffit_kernels.problem import MLPProblem
from diffit_kernels.triton.configs import Table
from tests.cases import AttentionCase
from tests.cuda_emulator import build
from tests.diffit_kernels.cuda.emulated import emulated
from tests.numeric_rule import assert_numeric_rule

CUDA = replace(AttentionCase((3, 5), 24, dtype=torch.bfloat16).problem, device_type="cuda")
MLP = MLPProblem(3, 8, 16, 8, torch.float32, "cuda")


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has a GPU, the library and Triton."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_interpreted", False)
    monkeypatch.setattr(cuda, "table_of", lambda device: Table())
    monkeypatch.setattr(cuda, "_shared_bytes", lambda window_size, head_dim: 1000 * head_dim)
    monkeypatch.setattr(cuda, "_shared_limit", lambda: 100_000)


def test_only_by_request(on_a_device: None) -> None:
    with dk.use_backend("auto"):
        assert dispatch.select(CUDA) is triton
    with dk.use_backend("cuda"):
        assert dispatch.select(CUDA) is cuda


def test_auto_takes_what_was_measured_to_be_faster(
    on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "table_of", lambda device: Table(cuda_is_faster=[[15, 24]]))
    with dk.use_backend("auto"):
        assert dispatch.select(CUDA) is cuda
        assert dispatch.select(replace(CUDA, head_dim=32)) is triton
        assert dispatch.select(replace(CUDA, dtype=torch.float32)) is triton
        assert dispatch.select(MLP) is triton


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(CUDA, dtype=torch.float32), "float32"),
        (replace(CUDA, head_dim=12), "head width 12"),
        (replace(CUDA, head_dim=136), "head width 136"),
        (replace(CUDA, window_size=(1, 1025), grid_size=(1, 1025)), "more than 1024 tokens"),
        (replace(CUDA, grid_size=(2**15, 2**15)), "2\\^30 tokens or more"),
        (replace(CUDA, head_dim=104), "needs 104000 bytes of shared memory.*gives 100000"),
        (replace(CUDA, device_type="cpu"), "on cpu"),
        (replace(MLP, dtype=torch.float64), "float64"),
    ],
)
def test_what_the_kernels_cannot_run(on_a_device: None, problem: object, reason: str) -> None:
    with dk.use_backend("cuda"), pytest.raises(RuntimeError, match=f"'cuda'.*{reason}"):
        dispatch.select(problem)


def test_the_other_operators_are_those_of_triton(on_a_device: None) -> None:
    pytest.importorskip("triton")
    with dk.use_backend("cuda"):
        assert dispatch.select(MLP).mlp is triton.mlp
    with pytest.raises(AttributeError, match="no_such_operator"):
        _ = cuda.no_such_operator


def test_a_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the reference takes the place of Triton, which cannot run bfloat16 then."""
    torch.manual_seed(0)
    device = "cpu" if cuda.unavailable() else "cuda"
    block = DiffiTBlock(32, 2, temb_dim=16, window_size=4).to(device, torch.bfloat16)
    x, temb = (
        torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in ((2, 64, 32), (2, 16))
    )
    grad = torch.randn_like(x)

    def outputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = deepcopy(block).to(dtype)(leaf, temb.to(dtype))
        return {"y": y.detach(), "grad_x": torch.autograd.grad(y, leaf, grad.to(dtype))[0]}

    with dk.use_backend("reference"):
        plain, truth = outputs(torch.bfloat16), outputs(torch.float64)
    if device == "cpu":
        monkeypatch.setattr(cuda, "triton", reference)
    with emulated() if device == "cpu" else dk.use_backend("cuda"):
        assert_numeric_rule(outputs(torch.bfloat16), plain, truth)


def test_a_failed_launch_says_what_was_launched() -> None:
    """2^31 blocks are too many: the memory behind the addresses is never touched."""
    with emulated():
        library = cuda._loaded()
        arguments = cuda.Problem(1, 1, 2**31, 1, 1, 2**31, 8, 1, 1, 1.0)
        with pytest.raises(RuntimeError, match=r"small_forward with \d{10,} blocks of 128 threads"):
            library.window_attention(arguments, 0)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("torch.cuda.is_available = lambda: False", "no CUDA device|without CUDA|not built"),
        ("torch.version.cuda = None", "without CUDA|not built"),
    ],
)
def test_importing_never_fails(before: str, reason: str) -> None:
    script = f"import torch; {before}; import diffit_kernels as dk; print(dk.available_backends())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert re.search(f"'cuda': .*({reason})", done.stdout)


# --- the library for GPUs that need not be there


def library() -> Path:
    """The library of this installation; without nvcc there is none."""
    spec = find_spec("diffit_kernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the CUDA C++ kernels were not built")
    return Path(spec.origin)


def test_loads_without_a_driver() -> None:
    """And needs nothing of CUDA, Python or torch that another machine may not have."""
    needed = subprocess.run(["ldd", library()], capture_output=True, text=True, check=True).stdout
    assert not re.search("cuda|torch|python", needed.replace(str(library()), ""))
    assert not isinstance(cuda._library, str)


@pytest.mark.parametrize(
    ("capability", "error", "reason"),
    [
        ((7, 5), None, r"capability \(7, 5\)"),
        ((9, 0), "driver version is insufficient", "driver version is insufficient"),
        ((9, 0), None, None),
    ],
)
def test_what_a_device_has_to_be(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    error: str | None,
    reason: str | None,
) -> None:
    """Neither backend stands in the way of the reference where its kernels cannot run."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    library = Library(build.library())
    assert library.unavailable() is None
    monkeypatch.setattr(library, "_unavailable", lambda: error and error.encode())
    monkeypatch.setattr(cuda, "_library", library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton, "_import_error", None)
    monkeypatch.setattr(triton, "_interpreted", False)
    found = cuda.unavailable.__wrapped__()
    assert found is None if reason is None else re.search(reason, found)
    assert (triton.unavailable.__wrapped__() is None) == (capability >= (8, 0))


# (machine, kernel, head width or units of 8) and bytes: numbers that are read once for a window.
SPILLED = {("sm_120", "large_forward", 80): 8, ("sm_90a", "large_forward_warpgroup", 9): 8}


def test_no_kernel_spills_a_register() -> None:
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    text = subprocess.run(
        [tool, "--dump-resource-usage", library()], capture_output=True, text=True, check=True
    ).stdout
    usage = []
    for section in text.split("elf code:")[1:]:
        machine = re.findall(r"arch = (sm_\w+)", section)[0]
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", section)
        usage += [(machine, name, *map(int, numbers)) for name, *numbers in found]
    machines = {machine for machine, *_ in usage}
    assert machines
    # For each width and dtype; sums; those of warpgroups.
    assert len(usage) == (7 * 16 + 2) * len(machines) + 8 * ("sm_90a" in machines)
    print(f"\n{len(usage)} kernels for {sorted(machines)}")  # with pytest -s
    for family in sorted({_family(name) for _, name, *_ in usage}):
        registers = [count for _, name, count, *_ in usage if _family(name) == family]
        print(f"{family:30} {min(registers)} to {max(registers)} registers")
    for machine, name, _, stack, local in usage:
        width = re.findall(r"Li(\d+)E", name) or [0]
        assert stack <= SPILLED.get((machine, _family(name), int(width[0])), 0), (machine, name)
        assert local == 0


def _family(name: str) -> str:
    return re.sub(r"^_ZN6diffit4cuda\d+([a-z_]+).*", r"\1", name)


def _cuobjdump() -> Path | str | None:
    """Of CUDA, or of Triton's package."""
    found = shutil.which("cuobjdump")
    if found or (spec := find_spec("triton")) is None or spec.origin is None:
        return found
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if os.access(tool, os.X_OK) else None
