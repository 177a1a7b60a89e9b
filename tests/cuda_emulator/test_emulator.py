"""The emulator: layouts of the PTX manual, and mistakes that it must catch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator import build

if build.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

CHECKS = [
    line.split('"')[1]
    for line in (build.EMULATOR / "self_test.cpp").read_text().splitlines()
    if line.startswith('    {"')
]


@pytest.fixture(scope="module")
def self_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("emulator") / "self_test"
    sources = [build.EMULATOR / "self_test.cpp", build.EMULATOR / "emulator.cpp"]
    return build.link(target, sources, build.SANITIZED)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_every_check_is_here(self_test: Path) -> None:
    assert set(CHECKS) == set(run(self_test).stdout.split())


@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith("global")])
def test_check(self_test: Path, check: str) -> None:
    done = run(self_test, check)
    assert done.returncode == 0, done.stderr


def test_global_memory_out_of_bounds(self_test: Path) -> None:
    done = run(self_test, "global_memory_out_of_bounds")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
