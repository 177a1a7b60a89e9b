"""Build, tests, tuning and sanitizer: what is called, and what is made of what it says."""

from __future__ import annotations

import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu import commands, sanitizer
from gpu.job import Job
from tests.benchmarks.gpu.stand_in import stand_in

CPU = torch.device("cpu")


def job(tmp_path: Path, seconds: float = 60) -> Job:
    return Job(CPU, time.time() + seconds, tmp_path / "out.json")


def test_a_command_is_interrupted_when_its_time_is_over() -> None:
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('ended in order')"
    code, output = commands.execute([sys.executable, "-S", "-c", script], 2)
    assert (code, output.strip()) == (None, "ended in order")
    assert commands.execute(["sh", "-c", "echo 1; exit 3"], 9) == (3, "1\n")


# --- the build


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one source file, and a device of capability 9.0."""
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for folder in ("csrc/cuda", "diffit_kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernels.cu").write_text("")
    return tmp_path


def test_a_module_that_is_older_than_its_sources_is_built_again(sources: Path) -> None:
    assert commands.module() is None
    module = sources / "diffit_kernels" / f"_cuda{commands.EXTENSION_SUFFIXES[0]}"
    module.write_text("")
    assert commands.module() == module
    os.utime(module, (0, 0))
    assert commands.module() is None


def test_the_build_is_cmake_for_this_device_alone(sources: Path) -> None:
    assert commands.architecture(CPU) == "90a"
    configure, build, install = commands.build_commands("90a", sources / "build")
    assert {"-DDIFFIT_CUDA=1", "-DDIFFIT_CUDA_ARCHS=90a", "Ninja"} <= set(configure)
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert build[-2:] == ["--target", "_cuda"]
    assert install[-4:] == ["--prefix", str(sources), "--component", "_cuda"]


def test_a_build_that_fails_says_where(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [["true"], ["sh", "-c", "echo x.cu: error: no such; exit 2"], ["touch", "installed"]]
    monkeypatch.setattr(commands, "build_commands", lambda *_: steps)
    result = commands.build(job(tmp_path))
    assert result["failures"][0].endswith("ended with 2: x.cu: error: no such")
    assert not (sources / "installed").exists()


def test_what_was_built_is_loaded(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = sources / "diffit_kernels"
    (package / "__init__.py").write_text("")
    (package / "cuda.py").write_text("def unavailable(): return None")
    monkeypatch.setattr(commands, "build_commands", lambda *_: [["true"]])
    result = commands.build(job(tmp_path))
    assert result["backend"] == "available"
    assert result["failures"] == []
    (package / "cuda.py").write_text("def unavailable(): return 'too old'")
    assert commands.build(job(tmp_path))["failures"] == ["the backend cuda cannot run: too old"]


# --- the tests

TESTS = """
import time, pytest
def test_right(): pass
def test_every_target(): assert False
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_odd(n): assert n % 2
@pytest.fixture
def broken(): raise OSError("no such")
def test_broken(broken): pass
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers of pytest, which start slowly."""
    monkeypatch.setattr(commands, "find_spec", lambda name: None)


def test_tests_are_counted_and_named(tmp_path: Path, alone: None) -> None:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    result = commands.run_tests(job(tmp_path), [str(path)])
    assert (result["passed"], result["skipped"], result["complete"]) == (2, 1, True)
    told = [line.rpartition("::")[2] for line in result["failed"]]
    assert told[0].startswith("test_odd[2]: assert")
    assert told[1] == 'test_broken: failed on setup with "OSError: no such"'
    assert result["failures"] == result["failed"]


def test_tests_that_are_interrupted_are_counted_so_far(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, as ``execute`` does it when the time is over; it then gives no exit code."""
    path = tmp_path / "test_some.py"
    path.write_text("def test_one(): pass\ndef test_two(): raise KeyboardInterrupt")
    execute = commands.execute
    monkeypatch.setattr(commands, "execute", lambda *given: (None, execute(*given)[1]))
    result = commands.run_tests(job(tmp_path), [str(path)])
    assert result["complete"] is False
    assert (result["passed"], result["failed"]) == (1, [])
    assert result["failures"] == ["the tests did not end in their time"]


def test_no_tests_are_a_failure(tmp_path: Path, alone: None) -> None:
    path = tmp_path / "test_none.py"
    path.write_text("")
    result = commands.run_tests(job(tmp_path), [str(path)])
    assert len(result["failures"]) == 1
    assert result["failures"][0].startswith("pytest ended with 5: no tests ran")


def test_the_tests_of_both_backends_are_there() -> None:
    for path in commands.TESTS:
        assert list((commands.ROOT / path).glob("test_window_attention.py"))


# --- tuning


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would tune")
def test_tuning_is_a_command_whose_failure_is_told(tmp_path: Path) -> None:
    told = commands.tune(replace(job(tmp_path), table=tmp_path / "table.json"))
    assert "PyTorch sees no CUDA or ROCm device" in told["failures"][0]


# --- the sanitizer


def test_without_the_tool_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    assert sanitizer.run(job(tmp_path)) == {"tool": "not found", "failures": []}
    assert capsys.readouterr().out == "compute-sanitizer: not found\n"


def test_what_the_tool_finds_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "========= about $2"\n'
        'if [ "$2" = racecheck ]; then echo "========= 1 hazard"; exit 99; fi\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert sanitizer.find_tool() == str(tool)
    result = sanitizer.run(job(tmp_path))
    assert result["memcheck"] == {"exit_code": 0, "lines": ["========= about memcheck"]}
    assert result["failures"] == ["racecheck ended with 99: ========= 1 hazard"]


def test_the_calls_under_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    sanitizer.drive(CPU)
