"""Builds ``diffit_kernels._native`` and ``_cuda`` with CMake, without torch.

Metadata is in pyproject.toml. A machine that cannot compile gets the Python package alone, and one
line says why. ``DIFFIT_BUILD_CPU`` and ``DIFFIT_BUILD_CUDA`` are auto (the default), 1 (fail rather
than leave the kernels out) or 0 (leave them out). ``DIFFIT_CUDA_ARCHS`` is the list of compute
capabilities to build for, such as 80,90a.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The variable that says whether to build a module, and what is in it.
MODULES = {
    "diffit_kernels._native": ("DIFFIT_BUILD_CPU", "CPU kernels"),
    "diffit_kernels._cuda": ("DIFFIT_BUILD_CUDA", "CUDA kernels"),
}


class CMakeBuild(build_ext):
    """``build_ext`` by way of CMakeLists.txt."""

    def run(self) -> None:
        """Build what can be built, and say in one line what that was."""
        self.said: list[str] = []
        super().run()
        say("; ".join(self.said))

    def build_extension(self, ext: Extension) -> None:
        """Build one of the modules, or note why there is none."""
        variable, kernels = MODULES[ext.name]
        choice = setting(variable)
        # An older build must not pass for this one.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        target = ext.name.rpartition(".")[2]
        if choice == "0":
            self.said.append(f"built without the {kernels}, as {variable}=0 asks")
        elif error := cmake_error(target, self.build_lib):
            if choice == "1":
                sys.exit(f"{log_of(target).read_text()}\n{variable}=1: {error}")
            log = log_of(target).absolute()
            self.said.append(f"built without the {kernels}: {error} (log: {log})")
        else:
            self.said.append(f"built the {kernels}" + built_for(target))


def setting(name: str) -> str:
    """The value of an environment variable: auto, 1 or 0."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        sys.exit(f"{name}: expected auto, 1 or 0, got {value!r}")
    return value


def log_of(target: str) -> Path:
    """The log of the build of a module, in the folder of that build."""
    return Path("build") / f"cmake-{sys.implementation.cache_tag}{target}" / "build.log"


def cmake_error(target: str, prefix: str) -> str | None:
    """Build one target and install it under ``prefix``; the first error in the log, or None."""
    cuda = setting("DIFFIT_BUILD_CUDA") if target == "_cuda" else "0"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DDIFFIT_CUDA={cuda}"]
    if archs := os.environ.get("DIFFIT_CUDA_ARCHS"):
        options.append("-DDIFFIT_CUDA_ARCHS=" + ";".join(re.split(r"[,;\s]+", archs.strip())))
    log_path = log_of(target)
    build = log_path.parent
    steps = (
        # --fresh: under build isolation the tools stand in another place each time.
        ["--fresh", "-G", "Ninja", "-S", ".", "-B", build, *options],
        ["--build", build, "--target", target],
        ["--install", build, "--prefix", prefix, "--component", target],
    )
    build.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        for step in steps:
            log.flush()
            if subprocess.run(["cmake", *step], stdout=log, stderr=log).returncode:
                break
        else:
            return None
    text = log_path.read_text()
    if missing := re.search(r"CUDA kernels: (no .+)", text):
        return missing[1]
    error = re.search(r"CMake Error.*\n\s*(.+)|(.*\b(?:error|fatal)\b *: .+)", text)
    return (error[1] or error[2]).strip(" .:") if error else "cmake failed"


def built_for(target: str) -> str:
    """The machines that the CUDA kernels were built for, as CMake said."""
    machines = re.search(r"CUDA kernels: (for .+)", log_of(target).read_text())
    return f" {machines[1]}" if machines and target == "_cuda" else ""


def say(line: str) -> None:
    """Print one line; on the terminal itself too, since pip hides what a build prints."""
    print(f"diffit: {line}", file=sys.stderr)
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\ndiffit: {line}", file=terminal)
    except OSError:  # no terminal
        pass


def sources(folder: str, *patterns: str) -> list[str]:
    """Files under a folder."""
    return sorted(str(path) for pattern in patterns for path in Path(folder).rglob(pattern))


setup(
    ext_modules=[
        Extension(
            "diffit_kernels._native",
            sources=["csrc/bindings.cpp", *sources("csrc/cpu", "*.cpp")],
            depends=["CMakeLists.txt", *sources("csrc/cpu", "*.h")],
            optional=True,
        ),
        Extension(
            "diffit_kernels._cuda",
            sources=sources("csrc/cuda", "*.cu"),
            depends=["CMakeLists.txt", *sources("csrc/cuda", "*.h")],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
