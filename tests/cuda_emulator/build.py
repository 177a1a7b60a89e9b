"""Compiles csrc/cuda for the emulator, with a C++ compiler alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).parent

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128)

_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC")
OPTIMIZED = ("-O2",)
WARPGROUPS = "-DDIFFIT_WARPGROUPS"  # their kernels are there
SANITIZED = ("-O0", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """The emulated kernels as a library like ``_cuda``, built once for a state of the sources."""
    sources = [*KERNELS.iterdir(), *EMULATOR.glob("*.h"), EMULATOR / "emulator.cpp"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
    target = ROOT / "build" / f"cuda_emulator-{digest[:16]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            folder = Path(name)
            flags = (*OPTIMIZED, WARPGROUPS)
            parts = [*objects(folder, flags), *warpgroup(folder, flags), *launcher(folder, flags)]
            link(folder / target.name, parts, ("-shared",)).rename(target)
    return target


def objects(
    folder: Path,
    flags: Sequence[str],
    *,
    kernels: Path = KERNELS,
    widths: Iterable[int] = WIDTHS,
    types: Iterable[str] = ("BFloat16", "Float16"),
) -> list[Path]:
    """Compile the kernels of some head widths and dtypes into a folder, two at a time."""
    jobs = [
        (
            folder / f"{kind}_{width}.o",
            kernels / "kernels.cu",
            [
                f"-DDIFFIT_WIDTH={width}",
                f"-DDIFFIT_TYPE={kind}",
                f"-DDIFFIT_KERNELS={kind.lower()}_{width}",
            ],
        )
        for width in widths
        for kind in types
    ]
    return _compile_all(flags, kernels, jobs)


def warpgroup(
    folder: Path,
    flags: Sequence[str],
    *,
    kernels: Path = KERNELS,
    types: Iterable[str] = ("BFloat16", "Float16"),
) -> list[Path]:
    """The same of the kernels of warpgroups."""
    jobs = [
        (
            folder / f"{kind}_warpgroup.o",
            kernels / "warpgroup_kernels.cu",
            [f"-DDIFFIT_TYPE={kind}", f"-DDIFFIT_KERNELS={kind.lower()}_warpgroup"],
        )
        for kind in types
    ]
    return _compile_all(flags, kernels, jobs)


def launcher(folder: Path, flags: Sequence[str], kernels: Path = KERNELS) -> list[Path]:
    """Compile what launches the kernels, and the emulator that runs them."""
    compile_one = partial(_compile, flags, [f"-I{kernels}", f"-I{EMULATOR}"])
    return [
        compile_one(folder / "window_attention.o", kernels / "window_attention.cu", []),
        compile_one(folder / "emulator.o", EMULATOR / "emulator.cpp", []),
    ]


def link(target: Path, parts: Sequence[Path], flags: Sequence[str]) -> Path:
    """A shared library, or a program, of objects and sources."""
    _run([*_FLAGS, *flags, f"-I{EMULATOR}", f"-I{KERNELS}", *map(str, parts), "-o", str(target)])
    return target


def _compile_all(
    flags: Sequence[str], kernels: Path, jobs: Iterable[tuple[Path, Path, list[str]]]
) -> list[Path]:
    include = [f"-I{kernels}", f"-I{EMULATOR}"]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: _compile(flags, include, *job), jobs))


def _compile(
    flags: Sequence[str], include: list[str], to: Path, source: Path, defines: list[str]
) -> Path:
    _run([*_FLAGS, *flags, *include, *defines, "-x", "c++", "-c", str(source), "-o", str(to)])
    return to


def _run(arguments: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(compiler()), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
