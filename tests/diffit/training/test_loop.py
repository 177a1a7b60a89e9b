"""The loop against a plain one, bit for bit after interruptions, and with faults."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.diffusion import EDMDenoiser, edm_loss
from diffit.models import create_model, load_model
from diffit.training.loop import MAX_SKIPPED, Trainer
from tests.diffit.training.tiny import CLASSES, IMAGE, latents, pictures, stats, trainer


@pytest.fixture(params=["image", "latent"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of either network."""
    if request.param == "image":
        return pictures(tmp_path / "set.zip")
    return latents(tmp_path / "set")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Of the image network."""
    return pictures(tmp_path / "set.zip")


def weights(out: Path) -> dict[str, Tensor]:
    return load_model(out / "weights.safetensors")[0].state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def test_it_is_the_plain_loop(images: Path, tmp_path: Path) -> None:
    """EDM's training written out; equal up to the order in which float32 is added."""
    run = trainer(images, tmp_path / "run", lr=0.01, lr_ramp=20)
    network = create_model(IMAGE).train()
    network.time.label_dropout = 0.0
    network.load_state_dict(run.network.state_dict())
    averages = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(6):
        batch = run.batches.part(step, 0, 8)
        assert batch.labels is not None
        draws = iter([batch.level, batch.noise])
        loss = edm_loss(
            EDMDenoiser(network, 0.5),
            batch.x,
            torch.eye(CLASSES + 1, CLASSES)[batch.labels],
            augment_labels=batch.augment_labels,
            randn_like=lambda _, draws=draws: next(draws),
        )
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        (loss.mean() * 3 * 8 * 8).backward()
        seen = step * 8
        optimizer.param_groups[0]["lr"] = 0.01 * min(seen / 20, 1)
        optimizer.step()
        beta = 0.5 ** (8 / max(min(10_000, 0.05 * seen), 1e-8))
        for average, parameter in zip(averages, network.parameters(), strict=True):
            average.mul_(beta).add_(parameter.detach(), alpha=1 - beta)
    run.train()
    assert [line["loss"] for line in stats(tmp_path / "run")] == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(run.network.parameters(), network.parameters(), strict=True):
        assert ours.allclose(theirs, atol=1e-6)
    result, preset = load_model(tmp_path / "run" / "weights.safetensors")
    assert preset == IMAGE
    for ours, theirs in zip(result.parameters(), averages, strict=True):
        assert ours.allclose(theirs, atol=1e-6)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    """Fifty steps on eleven samples."""
    trainer(data, tmp_path / "run", steps=50, lr=0.01, lr_ramp=0, checkpoint_every=50).train()
    losses = [line["loss"] for line in stats(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_stopped_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, stop: int) -> None:
    """Also where the last checkpoint is older than the last line of the log."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(data, whole, lr_ramp=0).train()

    class Killed(BaseException):
        pass

    run = trainer(data, parts, lr_ramp=0)
    step_of_run = run._step

    def step(number: int, *arguments: Any) -> Any:
        if number == stop:
            raise Killed
        return step_of_run(number, *arguments)

    run._step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.train()
    assert len(stats(parts)) == stop
    trainer(data, parts, lr_ramp=0).train()
    assert stats(parts) == stats(whole)
    assert same(weights(parts), weights(whole))


def test_a_finished_run_is_left_alone(images: Path, tmp_path: Path) -> None:
    trainer(images, tmp_path / "run").train()
    before, lines = weights(tmp_path / "run"), stats(tmp_path / "run")
    trainer(images, tmp_path / "run").train()
    assert same(weights(tmp_path / "run"), before)
    assert stats(tmp_path / "run") == lines
    trainer(images, tmp_path / "run", steps=8).train()  # more steps go on
    assert stats(tmp_path / "run")[:6] == lines
    assert len(stats(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch": 8}, {"micro_batch": 4}, {"micro_batch": 3}, {"grad_checkpointing": True}],
)
def test_how_a_batch_is_split_does_not_matter(
    data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Gradients of parts are added in another order: float32's 1e-7, times a few for six steps.

    Adam divides by the size of a gradient, so parameters whose gradient is exactly zero apart from
    rounding (the key bias) move by noise; nothing depends on them, and losses show it.
    """
    trainer(data, tmp_path / "whole", lr_ramp=0).train()
    trainer(data, tmp_path / "split", lr_ramp=0, **changes).train()
    for ours, theirs in zip(stats(tmp_path / "split"), stats(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"compile": True}])
def test_bfloat16_and_compiled_blocks(
    data: Path, tmp_path: Path, changes: dict[str, Any], default_algorithms: None
) -> None:
    """bfloat16 has eight bits: losses agree to a hundredth. Compiled float32: to 1e-5."""
    trainer(data, tmp_path / "plain", lr_ramp=0, steps=3).train()
    trainer(data, tmp_path / "other", lr_ramp=0, steps=3, **changes).train()
    near = 1e-2 if "dtype" in changes else 1e-5
    ours, theirs = ([line["loss"] for line in stats(tmp_path / n)] for n in ("other", "plain"))
    assert ours == pytest.approx(theirs, rel=near)
    assert "dtype" not in changes or ours != theirs
    assert all(p.dtype == torch.float32 for p in weights(tmp_path / "other").values())


def poison(run: Trainer, steps: set[int], what: str) -> None:
    """Let the loss, or the gradient alone, be NaN in these steps."""
    part = run.batches.part

    def poisoned(step: int, start: int, stop: int) -> Any:
        batch = part(step, start, stop)
        if step in steps and what == "loss":
            batch.noise[0, 0, 0, 0] = float("nan")
        return batch

    run.batches.part = poisoned  # type: ignore[method-assign]
    if what == "gradient":
        parameter, norms = next(run.network.parameters()), iter(range(10**6))
        parameter.register_hook(lambda g: g * float("inf") if next(norms) in steps else g)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    images: Path, tmp_path: Path, what: str
) -> None:
    run = trainer(images, tmp_path / "run", lr_ramp=0)
    poison(run, {2, 4}, what)
    run.train()
    lines = stats(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert run.updates == 4
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_too_many_in_a_row_stop_the_run(images: Path, tmp_path: Path) -> None:
    run = trainer(images, tmp_path / "run", steps=40, checkpoint_every=4)
    poison(run, set(range(4, 40)), "loss")
    with pytest.raises(RuntimeError, match="10 steps in a row, to step 14, without a finite loss"):
        run.train()
    assert MAX_SKIPPED == 10
    assert len(stats(tmp_path / "run")) == 13


def test_sigterm_writes_a_checkpoint_and_ends_the_run(images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(images, whole, lr_ramp=0).train()
    run = trainer(images, parts, lr_ramp=0, checkpoint_every=100)
    step_of_run = run._step

    def step(number: int, *arguments: Any) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of_run(number, *arguments)

    run._step = step  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    run.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (parts / "weights.safetensors").exists()
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["00000004"]
    trainer(images, parts, lr_ramp=0, checkpoint_every=100).train()
    assert stats(parts) == stats(whole)
    assert same(weights(parts), weights(whole))


def test_a_damaged_checkpoint_costs_steps_only(images: Path, tmp_path: Path, capsys: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(images, whole, lr_ramp=0).train()
    trainer(images, parts, lr_ramp=0, steps=4).train()
    data = next((parts / "checkpoints" / "00000004").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    trainer(images, parts, lr_ramp=0).train()
    output = capsys.readouterr().out
    assert f"refused: {data.parent}" in output
    assert "going on from step 2" in output
    assert stats(parts) == stats(whole)
    assert same(weights(parts), weights(whole))


def test_a_folder_holds_one_run(images: Path, tmp_path: Path) -> None:
    trainer(images, tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"holds another run \(batch_size 8 not 4\)"):
        trainer(images, tmp_path / "run", batch_size=4)
