"""Numbers of tiles, and their sizes.

Triton's own functions for them can also be called in kernels, and take microseconds a call for it.
"""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """Parts of ``size`` that hold ``count``."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least that is not below a positive ``count``."""
    return 1 << (count - 1).bit_length()
