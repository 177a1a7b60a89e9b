"""Kill a run at random moments, again and again: ``python -m tests.diffit.training.kills``."""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from diffit.models import load_model
from tests.diffit.training.processes import PATIENCE, Processes, finish
from tests.diffit.training.tiny import command, pictures, stats

STEPS_OF_A_LIFE = 60  # more than a process makes before it is killed
EVERY = 10  # steps between checkpoints


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("[0-9]*"))


def weights(out: Path) -> dict[str, Tensor]:
    return load_model(out / "weights.safetensors")[0].state_dict()


def same_run(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return stats(ours) == stats(theirs) and all(a[name].equal(b[name]) for name in b)


def kill_at_random(images: Path, folder: Path, *, kills: int, seed: int) -> dict[str, int]:
    """Kill a run again and again, let it finish, and compare it with one that never was killed.

    Every second kill aims into the write of a checkpoint: a random time after its temporary
    folder appeared. The others come a random time after a checkpoint.

    Returns:
        How many processes left a half-written checkpoint behind, and how many did not.
    """
    draw = random.Random(seed)
    steps = STEPS_OF_A_LIFE * (kills + 1)
    options = ("--steps", str(steps), "--checkpoint-every", str(EVERY))
    options = (*options, "--snapshot-every", str(steps))
    whole, out, output = folder / "whole", folder / "run", folder / "output.txt"
    finish(command(images, whole, *options), output)
    died = {"inside a write": 0, "outside": 0}
    for kill in range(kills):
        before = checkpoints(out)
        with Processes(command(images, out, *options), output) as processes:
            wait(lambda before=before: checkpoints(out)[-1:] > before[-1:])  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.1))
            if kill % 2:
                wait(lambda: any((out / "checkpoints").glob(".tmp-*")))
                time.sleep(draw.uniform(0, 0.02))
            processes.ranks[0].kill()
            codes = processes.wait()
        assert codes == [-signal.SIGKILL], output.read_text()
        half_written = any((out / "checkpoints").glob(".tmp-*"))
        died["inside a write" if half_written else "outside"] += 1
    assert "refused" not in finish(command(images, out, *options), output)
    assert same_run(out, whole)
    return died


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = pictures(Path(scratch) / "set.zip")
        print(kill_at_random(data, Path(scratch), kills=arguments.kills, seed=arguments.seed))
