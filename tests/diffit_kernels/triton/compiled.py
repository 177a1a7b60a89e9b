"""Compiles every kernel that a problem launches, for a device that need not be there.

    python -m tests.diffit_kernels.triton.compiled 90

prints one line of JSON per kernel. The launchers run as they are, on tensors of the CPU: only the
launch itself is replaced by a compilation. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from diffit_kernels.problem import WindowAttentionProblem
from diffit_kernels.triton import configs
from diffit_kernels.triton.attention import window_attention, window_attention_backward

# (window, head width, dtype): the shapes of the default table, and the largest window.
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SHAPES = {
    (math.isqrt(entry["window_tokens"]), entry["head_dim"], DTYPES[entry["itemsize"]])
    for entry in configs.load("default")
} | {(32, 72, torch.bfloat16)}


@dataclass
class Kernel:
    """One compiled kernel; registers, spills and warpgroup products only on NVIDIA's devices."""

    name: str
    shape: str
    shared: int
    registers: int = 0
    spills: int = 0
    hgmma: int = 0


def inspect(name: str, kernel: Any) -> dict[str, int]:
    """Registers and bytes spilled of a thread, and warpgroup products, from the machine code."""
    if "cubin" not in kernel.asm:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = dump("-res-usage", file.name)
        code = dump("-sass", file.name) if name.startswith("attention_large") else ""
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "hgmma": code.count("HGMMA"),
    }


def dump(what: str, file: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, what, file], check=True, capture_output=True, text=True).stdout


def main(target: GPUTarget) -> None:
    launched: list[tuple[str, Any]] = []
    compile_and_launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        module = self.fn.__module__.rpartition(".")[2]
        kernel = compile_and_launch(self, *args, **kwargs | {"warmup": True})
        launched.append((f"{module}.{self.fn.__name__}", kernel))

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    for side, width, dtype in sorted(SHAPES, key=str):
        problem = WindowAttentionProblem(1, (side, side), (side, side), 16, width, dtype, "cpu")
        qkv = torch.zeros(1, problem.tokens, 3 * problem.dim, dtype=dtype)
        row, table = qkv[:, 0, : problem.dim], torch.zeros(problem.table_rows, 16)
        out, lse = window_attention(problem, qkv, table, row, row, 1.0)
        window_attention_backward(problem, out, qkv, table, row, row, out, lse, 1.0)
        for name, kernel in launched:
            shape = f"window {side}, head width {width}, {str(dtype).removeprefix('torch.')}"
            report = Kernel(name, shape, kernel.metadata.shared, **inspect(name, kernel))
            print(json.dumps(asdict(report)), flush=True)
        launched.clear()


if __name__ == "__main__":
    (arch,) = sys.argv[1:]
    main(GPUTarget("cuda", int(arch), 32) if arch.isdigit() else GPUTarget("hip", arch, 64))
