"""Compiles what the launchers launch, for GPUs that need not be there.

Kernels that were imported for the interpreter cannot be compiled, so this runs in a process of its
own: ``compiled(module)`` starts it, and there every call of ``module.launches()`` runs on tensors
without memory, with the launch replaced by a record of its arguments.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# name: backend, architecture, threads of a warp, bytes of shared memory that a program may have
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "sm_120": ("cuda", 120, 32, 99 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# What becomes of one kernel: target, call, kernel, shared memory, registers, spills, instructions.
Result = dict[str, Any]


def compiled(module: str) -> list[Result]:
    """Every kernel that a call of ``module.launches()`` launches, for every target."""
    changes = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-m", __name__, module],
        cwd=Path(__file__).parents[3],
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(process.stdout)


def assert_fits(results: list[Result]) -> None:
    """Shared memory within the target's; no spills where the number is known."""
    wrong = [
        result
        for result in results
        if result["shared"] > TARGETS[result["target"]][-1]
        or (result["target"] in ("sm_80", "sm_90") and result["spills"])
    ]
    assert not wrong, wrong


def print_report(results: list[Result]) -> None:
    """One line for each kernel, for ``pytest -s``."""
    print()
    for result in results:
        print(
            f"{result['target']:7} {result['call']:44} {result['kernel']:14} "
            f"{result['registers'] or '':>4} registers {result['shared']:>7} bytes shared "
            f"{result['spills']} spills"
        )


@contextmanager
def _recorded(record: Callable[..., None]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = run


def _main(module: str) -> None:
    results = []
    for name, call in importlib.import_module(module).launches().items():

        def record(kernel: Any, *arguments: Any, name: str = name, **named: Any) -> None:
            results.extend(_compile(name, kernel, arguments, named))

        with _recorded(record), torch.device("meta"):
            call()
    print(json.dumps(results))


def _compile(name: str, kernel: Any, arguments: tuple[Any, ...], named: Any) -> Iterator[Result]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: named.pop(key) for key in ("num_warps", "num_stages") if key in named}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        constant = parameter.is_constexpr or value is None or (type(value) is int and value == 1)
        if constant:
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = _TYPES[value.dtype]
        else:
            kind = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        # As the launch does for tensors that PyTorch allocates and for sizes divisible by 16.
        divisible = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if divisible and not constant:
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    for target, (backend, architecture, warp, _) in TARGETS.items():
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(
            source, target=GPUTarget(backend, architecture, warp), options=options
        )
        result = {
            "target": target,
            "call": name,
            "kernel": kernel.__name__,
            "shared": binary.metadata.shared,
            "registers": None,
            "spills": None,
            "access_bits": None,
            "hgmma": None,
        }
        if target in ("sm_80", "sm_90"):
            result |= _machine_code(binary.asm["cubin"])
        elif backend == "hip":
            assembly = binary.asm["amdgcn"]
            result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
            result["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        yield result


def _machine_code(cubin: bytes) -> Result:
    """From the cubin: registers, instructions that spill, widths of accesses to global memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    accesses = re.findall(rb"\b(?:LDG|STG)\.E([.\w]*)", code)
    widths = {int((re.findall(rb"\.(?:U)?(\d+)", access) or [32])[-1]) for access in accesses}
    return {
        "registers": int(re.search(rb"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(rb"\b(?:STL|LDL)\b", code)),
        "access_bits": sorted(widths),
        "hgmma": b"HGMMA" in code,
    }


if __name__ == "__main__":
    _main(sys.argv[1])
