"""What a test can run on: the reference, and the compiled kernels on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import diffit_kernels as dk
from diffit_kernels import native

BACKENDS = ["reference"]
if dk.available_backends()["cpu"] is None:
    BACKENDS += [f"cpu-{name}" for name in native.instruction_sets()]

# One of each kind, for tests of what surrounds the kernels.
FASTEST = list({name.partition("-")[0]: name for name in BACKENDS}.values())


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Run the operators inside the ``with`` block on one entry of ``BACKENDS``."""
    name, _, instruction_set = backend.partition("-")
    with dk.use_backend(name):
        if instruction_set:
            with native.use_instruction_set(instruction_set):
                yield
        else:
            yield
