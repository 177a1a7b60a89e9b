"""Several processes against one, and processes that are killed."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.diffit.training.kills import checkpoints, kill_at_random, same_run, wait, weights
from tests.diffit.training.processes import PATIENCE, Processes, finish
from tests.diffit.training.tiny import ROOT, command, environment, pictures, python, stats

KILLS = 4  # `python -m tests.diffit.training.kills` does 50


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "set.zip")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output.txt"


def test_two_processes_are_one_that_splits_its_batch_in_two(
    images: Path, tmp_path: Path, output: Path
) -> None:
    """Bit for bit: a sum of two gradients does not depend on who adds them, and to double one and
    halve the sum is exact. The norm of the gradient, which is only logged, is added up by shards.

    To one that does not split it: to 1e-5, as float32 adds gradients in another order.
    """
    options = ("--steps", "6", "--checkpoint-every", "4", "--lr", "0.01", "--snapshot-every", "6")
    finish(command(images, tmp_path / "split", *options, "--micro-batch", "4"), output)
    finish(command(images, tmp_path / "whole", *options), output)
    finish(command(images, tmp_path / "fsdp", *options, "--parallel", "fsdp"), output, size=2)
    torchrun = python(command(images, tmp_path / "ddp", *options), processes=2)
    subprocess.run(torchrun, cwd=ROOT, env=environment(), check=True, timeout=PATIENCE)
    for how in ("ddp", "fsdp"):
        for ours, split, whole in zip(
            *(stats(tmp_path / name) for name in (how, "split", "whole")), strict=True
        ):
            assert ours == pytest.approx(whole, rel=1e-5)
            assert ours.pop("grad_norm") == pytest.approx(split.pop("grad_norm"), rel=1e-6)
            assert ours == split
        ours_, split_ = weights(tmp_path / how), weights(tmp_path / "split")
        assert all(ours_[name].equal(split_[name]) for name in split_)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_killed_process_costs_the_steps_since_the_checkpoint(
    images: Path, tmp_path: Path, output: Path, how: str
) -> None:
    options = ("--steps", "30", "--checkpoint-every", "10", "--parallel", how)
    finish(command(images, tmp_path / "whole", *options), output, size=2)
    words = command(images, tmp_path / "run", *options)
    with Processes(words, output, size=2) as processes:
        wait(lambda: len(checkpoints(tmp_path / "run")) >= 1)
        processes.ranks[1].kill()
        codes = processes.wait()
    assert codes[0] not in (0, None), output.read_text()
    assert codes[1] == -signal.SIGKILL
    done = len(stats(tmp_path / "run"))
    assert done < 30
    match = re.search(r"going on from step (\d+)", finish(words, output, size=2))
    assert match is not None
    assert done - int(match[1]) <= 10 + 1
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_fit_any_number_of_processes(
    images: Path, tmp_path: Path, output: Path
) -> None:
    out = tmp_path / "run"
    options = ("--lr", "0.01", "--snapshot-every", "100")
    steps = command(images, out, *options, "--steps", "2", "--parallel", "fsdp")
    finish(steps, output, size=2)
    finish(command(images, out, *options, "--steps", "4"), output)
    finish(command(images, out, *options, "--steps", "6"), output, size=2)
    finish(command(images, tmp_path / "whole", *options, "--steps", "6"), output)
    for ours, whole in zip(stats(out), stats(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(whole, rel=1e-5)


def test_kill_9_at_random_moments(images: Path, tmp_path: Path) -> None:
    died = kill_at_random(images, tmp_path, kills=KILLS, seed=0)
    assert sum(died.values()) == KILLS
    assert died["inside a write"] > 0
