"""The front end: codes, one line for what is wrong, and the commands that only show something."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffit.cli import COMMANDS, main


def test_help(capsys: Any) -> None:
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 0
        assert "usage: diffit" in capsys.readouterr().out


def test_help_does_not_import_torch() -> None:
    """As a process of its own, by its module name."""
    code = "import sys, diffit.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "diffit", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(("command", "seeds"), [("sample", "0"), ("evaluate", "0-999")])
def test_help_says_which_seeds(capsys: Any, command: str, seeds: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"0,5,7-9; default: {seeds} " in " ".join(capsys.readouterr().out.split())


def test_models(capsys: Any, fails: Callable[..., str]) -> None:
    assert main(["models", "diffit_xl*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:6] == [
        "diffit_xl_2_256",
        "LatentDiffiT",
        "561.0",
        "M",
        "118.5",
        "1.73",
    ]
    assert "the nearest is 'diffit_xl_2_256'" in fails("models", "diffit_xl_256")


def test_info(capsys: Any) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("versions", "torch", "devices", "cpu", "backends", "reference", "triton"):
        assert word in out
    assert "does not run: " in out


def test_info_says_which_backend_was_asked_for(
    capsys: Any, environment_names: Callable[[str], None]
) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.split()[-3:] == ["asked", "for", "auto"]
    environment_names("foo")
    assert main(["info"]) == 2
    assert "DIFFIT_BACKEND: expected one of auto" in capsys.readouterr().err


def test_data(capsys: Any, fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "set/a.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "set/b.png")
    for out in ("no/folder.zip", "set", "a.tar", "a", ""):
        message = f"--out: expected a .zip in a folder that exists, got {str(Path(out))!r}"
        assert message in fails("data", "nowhere", "--out", out)
    message = "--out: '/proc' cannot be written to: "
    assert message in fails("data", "nowhere", "--out", "/proc/a.zip")
    assert "--size: expected a number" in fails("data", "set", "--out", "a.zip", "--size", "0")
    assert "give a size" in fails("data", "set", "--out", "a.zip")
    assert "nowhere: no such file or folder" in fails("data", "nowhere", "--out", "a.zip")
    assert main(["data", "set", "--out", "a.zip", "--size", "4"]) == 0
    assert capsys.readouterr().out == "kept 1\nleft out 1: smaller than 4 x 4 (b.png)\n"
    packed = Path("a.zip").read_bytes()
    assert "expected another file than what is read" in fails("data", "a.zip", "--out", "a.zip")
    assert Path("a.zip").read_bytes() == packed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("draw",), "invalid choice: 'draw'"),
        (("sample", "--out"), "argument --out: expected one argument"),
    ],
)
def test_wrong_arguments(fails: Callable[..., str], arguments: Any, message: str) -> None:
    assert message in fails(*arguments)
