"""The command: its input, its order, its exit codes, and what is on disk after each part."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import gpu_suite
from gpu import __main__ as parts
from gpu.precision import PRECISIONS
from gpu.schedule import Part

CPU = torch.device("cpu")
WRONG = {
    "no folder": [],
    "unknown option": ["--out", "x", "--fast"],
    "unknown part": ["--out", "x", "--parts", "rule", "speed"],
    "unknown precision": ["--out", "x", "--precisions", "float8"],
    "no part": ["--out", "x", "--parts"],
    "no time": ["--out", "x", "--minutes", "0"],
    "time in words": ["--out", "x", "--minutes", "few"],
    "endless time": ["--out", "x", "--minutes", "inf"],
    "no number": ["--out", "x", "--minutes", "nan"],
    "folder is a file": ["--out", __file__],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_input_costs_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpu_suite.py: ")
    assert err.count("\n") == 1


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main(["--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no CUDA device" in err
    assert not (tmp_path / "out").exists()


def test_help_tells_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for name in [*gpu_suite.WEIGHTS, "--minutes", "Exit code", "gpu_suite.json", "table.json"]:
        assert name in out


def test_parts_run_in_the_order_of_their_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    out = str(tmp_path / "out")
    assert gpu_suite.parse(["--out", out]).parts == list(gpu_suite.WEIGHTS)
    chosen = gpu_suite.parse(["--out", out, "--parts", "tune", "rule", "tune"]).parts
    assert chosen == ["rule", "tune"]
    assert gpu_suite.parse(["--out", out]).precisions == list(PRECISIONS)
    chosen = gpu_suite.parse(["--out", out, "--precisions", "tf32", "bfloat16"]).precisions
    assert chosen == ["bfloat16", "tf32"]


def test_parts_are_commands_that_know_the_ceilings_once_there_are_some(tmp_path: Path) -> None:
    ceilings = tmp_path / "ceilings.json"
    (part,) = gpu_suite.plan(["rule"], ["tf32"], CPU, tmp_path, ceilings)
    assert part.weight == gpu_suite.WEIGHTS["rule"]
    command = part.command(1.5, tmp_path / "result.json")
    assert command[:4] == [sys.executable, "-m", "gpu", "rule"]
    assert "--ceilings" not in command
    ceilings.write_text("{}")
    assert part.command(1.5, tmp_path)[-6:-4] == ["--ceilings", str(ceilings)]
    assert command[-2:] == ["--precisions", "tf32"]


def test_every_part_has_a_function() -> None:
    assert list(parts.PARTS) == list(gpu_suite.WEIGHTS)
    for module, function in parts.PARTS.values():
        assert callable(getattr(import_module(f"gpu.{module}"), function))


def script(name: str, text: str) -> Part:
    """A part that finds ``out``, its file, and ``suite``, the document of the run so far."""
    head = "import json, os, sys, time\nout, suite = sys.argv[1:]\n"
    return Part(
        name,
        1.0,
        lambda until, result: [
            *(sys.executable, "-S", "-c", head + text),
            *(str(result), os.environ["SUITE"]),
        ],
    )


SO_FAR = """
parts = json.load(open(suite))["parts"]
so_far = [[part["name"], part["status"]] for part in parts]
json.dump({"failures": [], "so_far": so_far}, open(out, "w"))
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *parts: Part, minutes: float = 0.5) -> int:
    monkeypatch.setenv("SUITE", str(tmp_path / "gpu_suite.json"))
    return gpu_suite.run(parts, tmp_path, minutes, CPU, tmp_path / "ceilings.json")


def test_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, monkeypatch, script("build", SO_FAR), script("tests", SO_FAR)) == 0
    document = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert document["command"].startswith("python benchmarks/gpu_suite.py")
    assert document["minutes"] == 0.5
    assert document["device"]["torch"] == torch.__version__
    assert document["parts"][0]["result"]["so_far"] == []
    assert document["parts"][1]["result"]["so_far"] == [["build", "ok"]]
    assert document["parts"][1]["seconds"] > 0
    assert str(tmp_path) in capsys.readouterr().out


def test_every_kind_of_failure_is_survived_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        tmp_path,
        monkeypatch,
        script("build", "raise OSError('no compiler')"),
        script("rule", "os.abort()"),
        script("operators", "time.sleep(60)"),
        script("tests", SO_FAR),
        minutes=0.1,
    )
    assert code == 1
    parts = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    assert [part["status"] for part in parts] == ["failed", "killed", "timed out", "ok"]
    assert parts[3]["result"]["so_far"] == [
        ["build", "failed"],
        ["rule", "killed"],
        ["operators", "timed out"],
    ]
    out = capsys.readouterr().out
    assert "OSError: no compiler" in out
    assert "ended by SIGABRT" in out


def test_the_ceilings_are_kept_for_later_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "json.dump({'matmul_gflops': {'tf32': 2.0}, 'copy_gbps': 3.0}, open(out, 'w'))"
    assert run(tmp_path, monkeypatch, script("ceilings", text)) == 0
    kept = json.loads((tmp_path / "ceilings.json").read_text())
    assert kept == {"matmul_gflops": {"tf32": 2.0}, "copy_gbps": 3.0}


def test_a_real_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA the sanitizer is not found, or what it runs fails: both are recorded."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    parts = gpu_suite.plan(["sanitizer"], ["tf32"], CPU, tmp_path, tmp_path / "ceilings.json")
    code = gpu_suite.run(parts, tmp_path, 1.0, CPU, tmp_path / "ceilings.json")
    (part,) = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    found = part["result"]["tool"] != "not found"
    assert (code, part["status"]) == ((1, "failed") if found else (0, "ok"))


def test_interrupt_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "run", interrupt)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
