"""Builds ``diffit_kernels._native`` with CMake, without torch; metadata is in pyproject.toml.

A machine that cannot compile gets the Python package alone, and one line says why.
``DIFFIT_BUILD_CPU`` and ``DIFFIT_BUILD_CUDA`` are auto (the default), 1 (fail rather than leave the
kernels out) or 0 (leave them out).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = Path("build") / f"cmake-{sys.implementation.cache_tag}"
LOG = BUILD / "build.log"


class CMakeBuild(build_ext):
    """``build_ext`` by way of CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        """Build the module, or say why there is none."""
        cpu, cuda = setting("DIFFIT_BUILD_CPU"), setting("DIFFIT_BUILD_CUDA")
        if cuda == "1":
            sys.exit("DIFFIT_BUILD_CUDA=1: this version has no CUDA kernels; set it to auto or 0")
        # An older build must not pass for this one.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        if cpu == "0":
            say("built without the CPU kernels, as DIFFIT_BUILD_CPU=0 asks")
        elif error := cmake_error(self.build_lib):
            if cpu == "1":
                sys.exit(f"{LOG.read_text()}\nDIFFIT_BUILD_CPU=1: {error}")
            say(
                f"built without the CPU kernels, the reference runs instead: {error} "
                f"(log: {LOG.absolute()})"
            )
        else:
            say("built the CPU kernels" + "; this version has no CUDA kernels" * (cuda == "auto"))


def setting(name: str) -> str:
    """The value of an environment variable: auto, 1 or 0."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        sys.exit(f"{name}: expected auto, 1 or 0, got {value!r}")
    return value


def cmake_error(prefix: str) -> str | None:
    """Configure, build and install under ``prefix``; the first error in the log, or None."""
    steps = (
        # --fresh: under build isolation the tools stand in another place each time.
        ["--fresh", "-G", "Ninja", "-S", ".", "-B", BUILD, f"-DPython_EXECUTABLE={sys.executable}"],
        ["--build", BUILD],
        ["--install", BUILD, "--prefix", prefix],
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    with LOG.open("w") as log:
        for step in steps:
            if subprocess.run(["cmake", *step], stdout=log, stderr=log).returncode:
                break
        else:
            return None
    error = re.search(r"CMake Error.*\n\s*(.+)|(.*\berror: .+)", LOG.read_text())
    return (error[1] or error[2]).strip(" .:") if error else "cmake failed"


def say(line: str) -> None:
    """Print one line; on the terminal itself too, since pip hides what a build prints."""
    print(f"diffit: {line}", file=sys.stderr)
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\ndiffit: {line}", file=terminal)
    except OSError:  # no terminal
        pass


setup(
    ext_modules=[
        Extension(
            "diffit_kernels._native",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=["CMakeLists.txt", *sorted(str(path) for path in Path("csrc").rglob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
