"""What commands share: their parser, types of arguments, whether output can be written."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

WRONG_INPUT = 2  # exit code
MOST_STEPS = 10_000


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(WRONG_INPUT, f"{self.prog}: {message}\n")


def positive_int(text: str) -> int:
    """At least 1.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def sampler_steps(text: str) -> int:
    """From 1 to ``MOST_STEPS``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    steps = positive_int(text)
    if steps > MOST_STEPS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_STEPS} steps, got {text!r}")
    return steps


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


def require_writable(option: str, folder: Path) -> None:
    """Raise OSError, naming the option, if no file can be made there: before the work."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{option}: {str(folder)!r} cannot be written to: {error.strerror}"
        ) from error


def require_out(option: str, path: Path, suffix: str, *sources: Path | None) -> None:
    """Raise unless a file of that suffix can be written there: before the work.

    Raises:
        ValueError: another suffix, no folder for it, or one of the sources in its place.
        OSError: the folder cannot be written to.
    """
    if path.suffix != suffix or path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{option}: expected a {suffix} in a folder that exists, got {str(path)!r}"
        )
    for source in sources:
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise ValueError(
                f"{option}: expected another file than what is read, got {str(path)!r}"
            )
    require_writable(option, path.parent)


def named_folder(text: str) -> Path:
    """A folder; without a name it would be the current one.

    Raises:
        argparse.ArgumentTypeError: it has none.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def require_out_folder(option: str, path: Path) -> None:
    """Raise unless files can be written there once the folder is made: before the work.

    Raises:
        ValueError: there is a file in its place.
        OSError: it cannot be written to.
    """
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{option}: expected a folder, got {str(path)!r}: {there} is a file")
    require_writable(option, there)
