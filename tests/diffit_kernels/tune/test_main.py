"""The command line, and what stands between the search and a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffit_kernels import triton
from diffit_kernels.triton.configs import Table, read, write

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from diffit_kernels.tune import __main__ as command
from diffit_kernels.tune import gpu, search


def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffit_kernels.tune", "--minutes", "1"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "CUDA" in done.stderr


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_interpreted", False)
    monkeypatch.setattr(gpu, "GPU", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["--minutes", "soon"], "--minutes"),
        (["--kernels", "softmax"], "--kernels: invalid choice: 'softmax'"),
        (["--out", "no_such_folder/table.json"], "--out.*no_such_folder"),
        (["--out", "text"], "text is no table of parameters"),
        (["--out", "."], "--out"),
    ],
)
def test_wrong_input(
    on_a_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("none")
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert pytest.importorskip("re").search(message, line)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_interpreter_is_not_measured(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "_interpreted", True)
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("complete", [True, False, None])
def test_the_table_of_the_device(
    on_a_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    complete: bool | None,
) -> None:
    """None: interrupted. What was there stays."""

    def run(self: search.Search) -> bool:
        assert self.kernels == ["mlp_gelu"]
        assert self.budget.end - self.budget.begun == 90
        if complete is None:
            raise KeyboardInterrupt
        return complete

    monkeypatch.setattr(search.Search, "run", run)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    arguments = ["--minutes", "1.5", "--kernels", "mlp_gelu"]
    path = tmp_path / "nvidia-h200.json"
    assert command.main(arguments) == (130 if complete is None else 0)
    assert read(path) == Table(["NVIDIA H200"])
    assert ("no time for the rest" in capsys.readouterr().out) == (complete is False)

    write(path, Table(["H100", "H200"], [[16, 32]]))
    command.main(arguments)
    assert read(path) == Table(["H100", "H200"], [[16, 32]])


def test_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *, grid, warmup: asked.append(warmup) or 5)
    run = JITFunction.run
    for warmup in (True, False):
        with gpu._launches(warmup) as kernels:
            JITFunction.run(None, grid=(1,), warmup=False)
        assert kernels == [5]
    assert asked == [True, False]
    assert JITFunction.run is run


COMPILE = """
from functools import partial
from importlib import import_module
from unittest.mock import Mock
import torch, triton
from triton.backends.compiler import GPUTarget
from diffit_kernels import triton as backend
from diffit_kernels.problem import AddLayerNormProblem
from diffit_kernels.tune.gpu import GPU

target = Mock(**{"get_current_target.return_value": GPUTarget("cuda", 90, 32)})
target.get_current_device.return_value = 0
triton.runtime.driver.set_active(target)
x = torch.zeros(64, 128)
problem = AddLayerNormProblem.from_tensors(x, x, 1e-6)
candidates = [{"ROWS": rows, "num_warps": 4} for rows in (3, 1, 4)]  # 3 is no power of 2
GPU.compile(None, [
    partial(backend.add_layer_norm, problem, x, x, 1e-6, configs={"add_layer_norm": candidate})
    for candidate in candidates
])
kernel = import_module("diffit_kernels.triton.add_layer_norm").forward
print(import_module("diffit_kernels.triton.launch")._compiled)
for compiled in kernel.device_caches[0][0].values():
    if isinstance(compiled, triton.compiler.CompiledKernel):
        print(compiled.name, "sm_90" in compiled.asm["ptx"])
"""


def test_candidates_are_compiled_and_not_launched(tmp_path: Path) -> None:
    """For a GPU that is not there, so a launch would fail; so does one of the three."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{}\n" + "forward True\n" * 2  # nothing is remembered that waits
