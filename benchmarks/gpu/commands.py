"""Parts that are commands of other tools: the build, the tests, the tuning sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

from gpu import ROOT
from gpu.job import Job, Result
from gpu.schedule import last_lines

TESTS = ("tests/diffit_kernels/cuda", "tests/diffit_kernels/triton")
# What the compiler makes for other machines is checked where there is no GPU.
LEFT_OUT = "not every_target"
MAX_TEST_WORKERS = 8
END_SECONDS = 10.0  # for pytest to write what it has


def execute(command: Sequence[str | Path], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it took longer, and was interrupted) and output, also printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    code: int | None = None
    try:
        output, _ = process.communicate(timeout=max(seconds, 0))
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=END_SECONDS)
        process.kill()
        output, _ = process.communicate()
    print(output, flush=True)
    return code, output


# --- the build


def module() -> Path | None:
    """The compiled CUDA kernels, if they are not older than their sources."""
    written = max(path.stat().st_mtime for path in (ROOT / "csrc" / "cuda").iterdir())
    for suffix in EXTENSION_SUFFIXES:
        path = ROOT / "diffit_kernels" / f"_cuda{suffix}"
        if path.exists():
            return path if path.stat().st_mtime >= written else None
    return None


def architecture(device: torch.device) -> str:
    """As DIFFIT_CUDA_ARCHS names the device."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}" + "a" * (major == 9)


def build_commands(architecture: str, folder: Path) -> list[list[str]]:
    """CMake's steps: configure, build the CUDA kernels, put them beside the package."""
    build = str(folder)
    options = ["-DDIFFIT_CUDA=1", f"-DDIFFIT_CUDA_ARCHS={architecture}"]
    return [
        [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", build),
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        ],
        ["cmake", "--build", build, "--target", "_cuda"],
        ["cmake", "--install", build, "--prefix", str(ROOT), "--component", "_cuda"],
    ]


def build(job: Job) -> Result:
    """The CUDA kernels for this device alone, in place, unless they are there."""
    result: Result = {"built": False, "failures": []}
    if module() is None:
        result |= {"built": True, "architecture": architecture(job.device)}
        folder = ROOT / "build" / "gpu-suite"
        for command in build_commands(result["architecture"], folder):
            code, output = execute(command, job.seconds)
            if code != 0:
                end = "took too long" if code is None else f"ended with {code}"
                lines = [line for line in output.splitlines() if "error" in line.lower()]
                said = (lines or last_lines(output) or ["nothing was said"])[0].strip()
                result["failures"].append(f"{' '.join(command[:3])} {end}: {said}")
                return result
    script = "from diffit_kernels import cuda; print(cuda.unavailable() or 'available')"
    _, output = execute([sys.executable, "-c", script], job.seconds)
    result["backend"] = (last_lines(output) or ["nothing was said"])[-1]
    if result["backend"] != "available":
        result["failures"].append(f"the backend cuda cannot run: {result['backend']}")
    return result


# --- the tests


def run_tests(job: Job, paths: Sequence[str] = TESTS) -> Result:
    """The repository's tests of the GPU kernels, counted; the names of those that failed."""
    junit = job.out.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-k", LEFT_OUT, f"--junit-xml={junit}"]
    if find_spec("xdist") is not None and (cores := os.cpu_count() or 1) > 2:
        command += ["-n", str(min(cores // 2, MAX_TEST_WORKERS))]
    code, output = execute([*command, *paths], job.seconds - END_SECONDS)
    result = counts(junit.read_text()) if junit.exists() else {"failed": []}
    result["complete"] = code is not None
    result["failures"] = result["failed"][:]
    if code is None:
        result["failures"].append("the tests did not end in their time")
    elif code != 0 and not result["failed"]:
        said = (last_lines(output) or [""])[-1]
        result["failures"].append(f"pytest ended with {code}: {said}")
    return result


def counts(junit: str) -> Result:
    """How many tests passed and were skipped, which failed and why, from pytest's report."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    cases = [case for case in cases if case.get("name")]  # an interrupted test has no name
    failed = []
    for case in cases:
        faults = [*case.iter("failure"), *case.iter("error")]
        if faults:
            said = (faults[0].get("message") or "nothing was said").splitlines()[0]
            failed.append(f"{case.get('classname')}::{case.get('name')}: {said}")
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
    }


# --- the tuning sweep


def tune(job: Job) -> Result:
    """``python -m diffit_kernels.tune`` for the time there is; its table goes to ``job.table``."""
    minutes = max(job.seconds - END_SECONDS, 0) / 60
    command = [sys.executable, "-m", "diffit_kernels.tune", "--out", str(job.table)]
    code, output = execute([*command, "--minutes", f"{minutes:.2f}"], job.seconds)
    result: Result = {"failures": [], "output": last_lines(output)}
    if code != 0:
        end = "took too long" if code is None else f"ended with {code}"
        said = (result["output"] or ["nothing was said"])[-1]
        result["failures"].append(f"python -m diffit_kernels.tune {end}: {said}")
    return result
