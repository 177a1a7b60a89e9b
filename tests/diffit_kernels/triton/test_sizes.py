"""The same numbers as Triton's own functions give."""

from __future__ import annotations

import pytest

from diffit_kernels.triton.sizes import cdiv, next_power_of_2

triton = pytest.importorskip("triton")


def test_as_triton_has_them() -> None:
    for count in range(1, 140):
        assert next_power_of_2(count) == triton.next_power_of_2(count)
        for size in (1, 3, 16, 64, 139):
            assert cdiv(count, size) == triton.cdiv(count, size)
