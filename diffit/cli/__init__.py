"""The command line: ``diffit COMMAND ...``, also as ``python -m diffit``.

A command is a module with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``, entered in
``COMMANDS``. Importing it is quick: what needs PyTorch is imported by ``run``. Wrong input raises
an error there, which becomes one line and the exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Protocol

from diffit.cli import data, encode, evaluate, info, models, sample, train, viz
from diffit.cli.arguments import WRONG_INPUT, Parser

INTERRUPTED = 130  # exit code
LONGEST_MESSAGE = 500


class Command(Protocol):
    """What a module of a command has."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Declare the arguments."""

    def run(self, arguments: argparse.Namespace, /) -> None:
        """Do it; an error is wrong input."""


COMMANDS: dict[str, Command] = {
    "sample": sample,
    "train": train,
    "evaluate": evaluate,
    "viz": viz,
    "models": models,
    "data": data,
    "data encode": encode,
    "info": info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for wrong input, 130 after Ctrl-C.

    Raises:
        SystemExit: arguments that do not parse (code 2), or ``--help`` (code 0).
    """
    parser = Parser(prog="diffit", description="DiffiT diffusion networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.HELP, description=command.HELP)
        )
    words = list(sys.argv[1:] if argv is None else argv)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    arguments = parser.parse_args(words)
    _quiet_libraries()
    try:
        COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt as interrupt:
        message, code = str(interrupt) or "interrupted", INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        message, code = _one_line(error), WRONG_INPUT
    else:
        return 0
    if argv is None:  # the process ends: what fails while it is taken down is no news
        sys.unraisablehook = lambda _: None
    print(f"diffit {arguments.command}: {message}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """No advice and no retries of the hub's libraries: what fails is told in one line."""
    for variable in ("HF_HUB_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # read when they are imported
    warnings.filterwarnings("ignore", module="huggingface_hub|diffusers")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = textwrap.shorten(str(error), LONGEST_MESSAGE, placeholder=" ...")
    return text or type(error).__name__
