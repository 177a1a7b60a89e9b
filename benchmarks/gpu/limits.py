"""What the device can do at most, in every precision: the scale for the other parts."""

from __future__ import annotations

import torch

import ceilings
from gpu.job import Job, Result
from gpu.precision import PRECISIONS, using


def measure(device: torch.device, precisions: tuple[str, ...] = tuple(PRECISIONS)) -> Result:
    """10^9 operations per second of a large matmul by precision, 10^9 bytes of a large copy."""
    matmul: dict[str, float] = {}
    copies = []
    for precision in precisions:
        with using(precision) as dtype:
            found = ceilings.measure(device, [dtype])
        (matmul[precision],) = found.matmul_gflops.values()
        copies.append(found.copy_gbps)
    return {"matmul_gflops": matmul, "copy_gbps": max(copies), "failures": []}


def run(job: Job) -> Result:
    """All precisions."""
    return measure(job.device)
