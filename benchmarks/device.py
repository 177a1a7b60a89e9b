"""What a result depends on: the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

import diffit_kernels
from diffit_kernels import native


def describe(device: torch.device) -> dict[str, str | int]:
    """The device and version columns of a result."""
    cpu = _cpu_name()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "instruction_set": native.instruction_set() or torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffit": diffit_kernels.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def slug(device: torch.device) -> str:
    """The device as the name of a folder."""
    description = describe(device)
    if device.type == "cuda":
        name = str(description["device"])
    else:
        name = "cpu-{instruction_set}-{threads}-threads".format(**description)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
