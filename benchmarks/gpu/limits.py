"""What the device can do at most, in every precision: the scale for the other parts."""

from __future__ import annotations

import json
import shutil
import subprocess

import torch

import ceilings
from gpu.job import Job, Result
from gpu.precision import PRECISIONS, using

NVIDIA_SMI = (
    *("name", "driver_version", "memory.total", "power.limit", "temperature.gpu"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def measure(device: torch.device, precisions: tuple[str, ...] = tuple(PRECISIONS)) -> Result:
    """10^9 operations per second of a large matmul by precision, 10^9 bytes of a large copy."""
    matmul: dict[str, float] = {}
    copies = []
    for precision in precisions:
        with using(precision) as dtype:
            found = ceilings.measure(device, [dtype])
        (matmul[precision],) = found.matmul_gflops.values()
        copies.append(found.copy_gbps)
    return {"matmul_gflops": matmul, "copy_gbps": max(copies)}


def run(job: Job) -> Result:
    """All precisions, and the state of the device after them."""
    return {**measure(job.device), "nvidia_smi": nvidia_smi(), "failures": []}


def known(job: Job) -> Result:
    """The ceilings that were measured in this run of the suite, or new ones."""
    return measure(job.device) if job.ceilings is None else json.loads(job.ceilings.read_text())


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power of the first device, as they are."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return {}
    values = done.stdout.splitlines()[0].split(", ") if done.stdout.strip() else []
    return dict(zip(NVIDIA_SMI, values, strict=False))
