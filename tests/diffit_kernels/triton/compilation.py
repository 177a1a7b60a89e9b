"""Compiles what the launchers launch, for GPUs that need not be there.

Kernels that were imported for the interpreter cannot be compiled, so this runs in a process of its
own: ``compiled(module)`` starts it. There, with each table of parameters, every call of
``module.launches(entries)`` runs on tensors without memory, with the launch replaced by
a record of its arguments. What was recorded is compiled by as many threads as there are cores.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch

from diffit_kernels.triton import configs

# name: backend, architecture, threads of a warp, bytes of shared memory that a program may have
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "sm_120": ("cuda", 120, 32, 99 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}

# The target of a device that a table names, by a part of its name.
_DEVICES = {
    "A100": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "B200": "sm_100",
    "RTX 50": "sm_120",
    "MI300": "gfx942",
}

# What versions of Triton are known to spill: target, end of the call, kernel, bytes of a thread. Of
# the kernels of large windows no other tile did better with all of them and as well on an H200.
_SPILLS = {
    "3.6": [("sm_80", "window 8x8, head width 32, float32", "forward", 40)],
    "3.7": [
        ("sm_80", "window 8x8, head width 32, float32", "forward", 16),
        ("sm_80", "", "add_rows", 8),
        ("sm_90", "", "add_rows", 8),
    ],
    "3.8": [
        ("sm_80", "window 8x8, head width 32, float32", "forward", 16),
        ("sm_80", "window 16x16, head width 72, float32, TF32 allowed", "backward_kv", 424),
        ("sm_90", "window 16x16, head width 72, float32, TF32 allowed", "backward_kv", 8),
    ],
}

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# What becomes of one kernel: target, call, kernel, shared memory, registers, spills, instructions.
Result = dict[str, Any]


def targets(table: str) -> list[str]:
    """Those on which the table may be used: all for the default."""
    if table == "default":
        return list(TARGETS)
    names = configs.tables()[table].devices
    found = {target for part, target in _DEVICES.items() for name in names if part in name}
    assert found, f"{table}.json: add the target of {names} to _DEVICES"
    return sorted(found)


def compiled(module: str) -> list[Result]:
    """Every kernel that a call of ``module.launches(entries)`` launches, for every target."""
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
    """Shared memory within the target's; on sm_80 and sm_90 no spills but those in ``_SPILLS``."""
    wrong = [
        result
        for result in results
        if result["shared"] > TARGETS[result["target"]][-1]
        or (result["target"] in ("sm_80", "sm_90") and result["spills"] > _known_spills(result))
    ]
    assert not wrong, wrong


def _known_spills(result: Result) -> int:
    version = ".".join(metadata.version("triton").split(".")[:2])
    return max(
        (
            spills
            for target, call, kernel, spills in _SPILLS.get(version, [])
            if (target, kernel) == (result["target"], result["kernel"])
            and result["call"].endswith(call)
        ),
        default=0,
    )


def print_report(results: list[Result]) -> None:
    """One line for each kernel, for ``pytest -s``."""
    print()
    for result in results:
        print(
            f"{result['target']:7} {result['call']:50} {result['kernel']:14} "
            f"{result['registers'] or '':>4} registers {result['shared']:>7} bytes shared "
            f"{result['spills']} spills"
        )


@contextmanager
def _recorded() -> Iterator[list[tuple[Any, Any]]]:
    """Sources and options of what is launched inside."""
    from triton.runtime.jit import JITFunction

    launched = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launched.append(_specialise(kernel, arguments, named))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launched
    finally:
        JITFunction.run = run


def _main(module: str) -> None:
    rows = []  # what tells them apart, and the work that they share where they are equal
    work: dict[tuple[str, ...], Future[Result]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for table, content in configs.tables().items():
            configs.table_of = lambda device, content=content: content
            configs.nearest.cache_clear()
            configs.is_listed.cache_clear()
            for name, call in importlib.import_module(module).launches(content.entries).items():
                with _recorded() as launched, torch.device("meta"):
                    call()
                for (source, options), target in product(launched, targets(table)):
                    key = (target, source.hash(), str(options))
                    if key not in work:
                        work[key] = pool.submit(_compile, target, source, options)
                    rows.append(({"target": target, "call": f"{table}: {name}"}, work[key]))
        print(json.dumps([row | future.result() for row, future in rows]))


def _specialise(kernel: Any, arguments: tuple[Any, ...], named: Any) -> tuple[Any, Any]:
    """The source with what is constant in it, and the options of the compiler."""
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
    return ASTSource(kernel, signature, constants, attributes), options


def _compile(target: str, source: Any, options: dict[str, int]) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget

    backend, architecture, warp, _ = TARGETS[target]
    binary = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    result = {
        "kernel": source.fn.__name__,
        "shared": binary.metadata.shared,
        "registers": None,
        "spills": None,
        "access_bits": None,
        "hgmma": None,
    }
    if backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(binary.asm["cubin"])
            result |= _resources(cubin)
            # To disassemble takes longer than to compile.
            result["hgmma"] = "wgmma" in binary.asm["ptx"] and "HGMMA" in _cuobjdump(
                "--dump-sass", cubin
            )
        result["access_bits"] = _access_bits(binary.asm["ptx"])
    elif backend == "hip":
        assembly = binary.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        result["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
    return result


def _resources(cubin: Path) -> Result:
    """Registers, and bytes of local memory of a thread: what spills."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
    }


def _access_bits(ptx: str) -> list[int]:
    """Widths of accesses to global memory."""
    accesses = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return sorted({int(count or 1) * int(bits) for count, bits in accesses})


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, check=True, text=True).stdout


if __name__ == "__main__":
    _main(sys.argv[1])
