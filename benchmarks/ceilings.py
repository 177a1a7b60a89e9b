"""What the device can do at most, measured: the scale for every other number."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from diffit_kernels.products import are_slow
from harness import timed

SECONDS = 0.7  # of calls for each ceiling


@dataclass(frozen=True)
class Ceilings:
    """Best of many calls each, since a ceiling is what can be reached."""

    matmul_gflops: dict[str, float]  # a large square matmul, by dtype
    copy_gbps: float  # read and written by a copy of a large tensor


def measure(device: torch.device, dtypes: list[torch.dtype]) -> Ceilings:
    """The ceilings of the device with the threads in use.

    Where it has no products in half precision, float32's are what can be reached.
    """
    size, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    matmul = {}
    for dtype in dtypes:
        reached = torch.float32 if are_slow(dtype, device.type) else dtype
        a, b = (torch.randn(size, size, device=device).to(reached) for _ in range(2))
        product = torch.empty_like(a)
        seconds = _best(partial(torch.mm, a, b, out=product), device)
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds / 1e9
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(partial(target.copy_, source), device)
    return Ceilings(matmul, 2 * copied / seconds / 1e9)


def linear_layer(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, float]:
    """10^9 operations per second of a linear layer, the first of the MLP of the largest networks.

    Where a dtype has no fast matmul, the speed of one depends on the layout of its arguments.
    """
    found = {}
    for dtype in dtypes:
        x, weight = (torch.randn(n, 1152, device=device).to(dtype) for n in (256, 4608))
        seconds = _best(partial(torch.nn.functional.linear, x, weight), device)
        found[str(dtype).removeprefix("torch.")] = 2 * 256 * 1152 * 4608 / seconds / 1e9
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    best, begin = timed(call, device), time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        best = min(best, timed(call, device))
    return best
