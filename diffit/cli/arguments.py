"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """At least 1.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def finite_number(text: str) -> float:
    """Neither infinite nor NaN.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """Finite and above 0.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    number = finite_number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number
