"""Commands of several processes, forked from one that has imported what they need.

torchrun and the imports take longer than a run of a tiny network; what torchrun tells its
processes, ``Processes`` tells them. The forkserver starts once for all tests of a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from tests.diffit.training import tiny

PATIENCE = 120  # seconds for what takes a few

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([tiny.__name__, "diffit.cli.pictures", "torch._dynamo"])


class Processes:
    """A command of ``tiny`` as ``size`` processes, whose output goes to a file.

    As a context it leaves none behind.
    """

    def __init__(self, words: list[str], output: Path, size: int = 1) -> None:
        self.output = output
        output.touch()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.ranks: list[BaseProcess] = []
        for rank in range(size):
            known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            known |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            self.ranks.append(_context.Process(target=_run, args=(words, output, known)))
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def wait(self) -> list[int | None]:
        """Until all have ended: their exit codes, minus a signal that ended them."""
        for process in self.ranks:
            process.join(PATIENCE)
        return [process.exitcode for process in self.ranks]


def finish(words: list[str], output: Path, size: int = 1) -> str:
    """What a command prints, once it has ended well."""
    with Processes(words, output, size) as processes:
        codes = processes.wait()
    assert codes == [0] * size, output.read_text()
    return output.read_text()


def _run(words: list[str], output: Path, environment: dict[str, object]) -> None:
    import torch

    os.environ |= {name: str(value) for name, value in environment.items()}
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the forkserver ignores it
    torch.set_num_threads(1)
    sys.exit(tiny.run(words))
