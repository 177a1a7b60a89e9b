"""Tasks in processes that may die: a fault on the GPU takes its process, never the next task.

A worker reads tasks from its input, a line of JSON each, and answers with lines of JSON: where it
is, and at the end the result. Where it is to be alone on the device, it waits for a line more.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gpu.schedule import last_lines

Task = dict[str, Any]
Result = dict[str, Any]

ALONE = "timing"  # what a worker says where it is to be alone


@dataclass(frozen=True)
class Answer:
    """The result of a task, or where its worker was and what it said when it ended."""

    result: Result | None
    at: str = ""
    error: str = ""


class Worker:
    """A process that answers tasks."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._received = b""

    def ask(
        self, task: Task, seconds: float, until: float, wait_for_turn: Callable[[], None]
    ) -> Answer:
        """The answer; where there is none in time, or no more worker, it is closed.

        The wait to be alone does not count in the seconds; ``until`` (in ``time.time()``) holds.
        """
        process, begin = self._process, time.monotonic()
        last = begin + until - time.time()
        end = min(begin + seconds, last)
        assert process.stdin is not None
        at = ""
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
            while True:
                message = self._line(end)
                if message is None:
                    self.close()
                    return Answer(None, at, f"no answer after {seconds:.0f} s")
                said = json.loads(message)
                if "result" in said:
                    return Answer(said["result"])
                at = said["at"]
                if at == ALONE:
                    before = time.monotonic()
                    wait_for_turn()
                    end = min(end + time.monotonic() - before, last)
                    if time.monotonic() >= end:
                        self.close()
                        return Answer(None, at, "its turn came too late")
                    process.stdin.write(b"\n")
                    process.stdin.flush()
        except (BrokenPipeError, EOFError):
            self.close()
            self._errors.seek(0)
            lines = last_lines(self._errors.read().decode(errors="replace"))
            said = lines[-1] if lines else "said nothing"
            return Answer(None, at, f"the process ended with {process.returncode}: {said}")

    def _line(self, end: float) -> bytes | None:
        """The next line, or None at ``end``; EOFError when there will be none."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([output], [], [], max(end - time.monotonic(), 0))[0]:
                return None
            received = os.read(output, 1 << 16)
            if not received:
                raise EOFError
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Turns:
    """Who prepares does so beside others; who is ready acts alone, and while nobody prepares."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._preparing = self._ready = 0
        self._acting = False

    @contextmanager
    def prepare(self) -> Iterator[Callable[[], None]]:
        """Begins when nobody is ready; gives what waits for the turn, which ends with the block."""
        ready = False
        with self._changed:
            self._changed.wait_for(lambda: self._ready == 0)
            self._preparing += 1

        def wait_for_turn() -> None:
            nonlocal ready
            with self._changed:
                ready = True
                self._preparing -= 1
                self._ready += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._preparing == 0 and not self._acting)
                self._acting = True

        try:
            yield wait_for_turn
        finally:
            with self._changed:
                if ready:
                    self._acting = False
                    self._ready -= 1
                else:
                    self._preparing -= 1
                self._changed.notify_all()


def run(
    command: Sequence[str],
    tasks: Iterable[Task],
    handle: Callable[[Task, Answer], Task | None],
    *,
    count: int,
    until: float,
    task_seconds: float,
) -> list[Task]:
    """Have ``count`` workers answer the tasks in order; those that were left at ``until``.

    ``handle`` gets one answer at a time, and may return a task to be done next. A worker that died
    or did not answer within ``task_seconds`` is replaced.
    """
    waiting, lock, turns = deque(tasks), threading.Lock(), Turns()
    failures: list[BaseException] = []

    def work() -> None:
        worker = None
        try:
            while time.time() < until:
                with turns.prepare() as wait_for_turn:
                    with lock:
                        if not waiting or time.time() >= until:
                            return
                        task = waiting.popleft()
                    worker = worker or Worker(command)
                    answer = worker.ask(task, task_seconds, until, wait_for_turn)
                with lock:
                    if answer.result is None:
                        worker = None
                        if time.time() >= until:
                            waiting.appendleft(task)
                            return
                    again = handle(task, answer)
                    if again is not None:
                        waiting.appendleft(again)
        except BaseException as error:
            failures.append(error)
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return list(waiting)


def serve(function: Callable[[Task, Callable[[str], None]], Result]) -> None:
    """Answer tasks until the input ends; what the task prints goes to the error output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    def at(place: str) -> None:
        say(at=place)
        if place == ALONE:
            sys.stdin.readline()

    for line in sys.stdin:
        try:
            say(result=function(json.loads(line), at))
        except Exception as error:
            traceback.print_exc()
            print(first_line(error), file=sys.stderr, flush=True)
            os._exit(1)  # at once: without its device a process may not end in order


def is_lost(device: torch.device) -> bool:
    """Whether a fault on the device has left this process without it: then it has to end."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def command(part: str, device: torch.device) -> list[str]:
    """A worker of a part on a device."""
    return [sys.executable, "-m", "gpu", part, "--device", str(device), "--serve"]
