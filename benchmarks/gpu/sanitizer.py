"""compute-sanitizer over a few small calls of the CUDA C++ kernels.

``python -m gpu.sanitizer`` makes the calls; the part runs it under the tool.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from diffit_kernels import use_backend, window_attention
from gpu.commands import execute
from gpu.job import Job, Result
from gpu.schedule import last_lines

TOOLS = ("memcheck", "racecheck")
FOUND = 99  # the exit code when the tool has found something
# window, windows across, head width: both regimes, and tiles that a window does not fill.
CALLS = [((4, 4), 3, 32), ((3, 5), 2, 72), ((8, 8), 1, 32), ((5, 20), 1, 72)]


def find_tool() -> str | None:
    """On the path, or where CUDA is."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def run(job: Job) -> Result:
    """Each tool in turn; what it finds is a failure."""
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: not found")
        return {"tool": "not found", "failures": []}
    result: Result = {"tool": tool, "failures": []}
    for i, name in enumerate(TOOLS):
        options = ["--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        command = [tool, *options, sys.executable, "-m", "gpu.sanitizer", str(job.device)]
        code, output = execute(command, job.seconds / (len(TOOLS) - i))
        lines = [line for line in output.splitlines() if line.startswith("=====")]
        result[name] = {"exit_code": code, "lines": lines[-20:]}
        if code != 0:
            end = "took too long" if code is None else f"ended with {code}"
            said = (lines or last_lines(output) or ["nothing was said"])[-1]
            result["failures"].append(f"{name} {end}: {said}")
        job.save(result)
    return result


def drive(device: torch.device, backend: str = "cuda") -> None:
    """Every kernel once, forward and backward."""
    with use_backend(backend):
        for window, windows, head_dim in CALLS:
            tokens, dim = window[0] * window[1] * windows, 2 * head_dim
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            shapes = [(2, tokens, 3 * dim), (rows, 2), (2, dim), (2, dim)]
            dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
            leaves = [
                torch.randn(shape).to(device, dtype).requires_grad_()
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            out = window_attention(
                *leaves[:2],
                num_heads=2,
                window_size=window,
                grid_size=(window[0], window[1] * windows),
                q_row=leaves[2],
                v_row=leaves[3],
            )
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
            finite = all(bool(tensor.cpu().isfinite().all()) for tensor in (out, *grads))
            assert finite, (window, head_dim)


if __name__ == "__main__":
    drive(torch.device(sys.argv[1]))
