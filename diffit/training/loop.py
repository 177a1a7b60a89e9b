"""The loop: one process or those of torchrun, until the last step, a signal, or too many faults.

All that is random is a function of the seed and of the position (``batches``), apart from the
masks of dropout, which are one of the seed, the step and the first image of a part. So the run
goes on bit for bit from a checkpoint, and a batch gives the same result however it is split, up to
the order in which float32 adds its gradients.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffit.data.dataset import Dataset
from diffit.data.order import stream_seed
from diffit.files import replacing, sha256_of
from diffit.models import DiffusionNetwork, create_model, get_preset, save_weights
from diffit.models.weights import find_weights, require_finite
from diffit.ranks import Ranks
from diffit.training.batches import Batches, ahead
from diffit.training.checkpoint import Checkpoints
from diffit.training.ema import EMA, whole
from diffit.training.log import Log, matmul_ceiling
from diffit.training.objective import objective_of
from diffit.training.parallel import blocks, distribute, reduced_at_once, total
from diffit.training.recipe import BETAS, EPS, Recipe

WEIGHTS = "weights.safetensors"
RUN = "run.json"
MAX_SKIPPED = 10  # steps in a row without finite gradients

# Called by the first process with the averaged network and the path of a PNG to draw.
Draw = Callable[[DiffusionNetwork, Path], None]


@dataclass(frozen=True)
class Running:
    """How a run is carried out. Only rounding depends on it.

    Args:
        device: of this process.
        micro_batch: images of a forward pass; the batch is accumulated. None: all of a process.
        dtype: of autocast; parameters, averages and losses are float32.
        tf32: whether float32 products on GPUs may round their inputs to ten bits.
        parallel: "ddp" or "fsdp".
        grad_checkpointing: compute blocks twice instead of keeping their inside.
        compile: torch.compile every block.
        keep: checkpoints that stay, beside the best.
        tensorboard: write events, too.
    """

    device: torch.device
    micro_batch: int | None = None
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    parallel: str = "ddp"
    grad_checkpointing: bool = False
    compile: bool = False
    keep: int = 2
    tensorboard: bool = False


class Trainer:
    """One run in its folder; the same arguments again go on with it.

    Args:
        preset: name of the network.
        recipe: its hyper-parameters.
        dataset: what it learns.
        out: folder of the run, made if need be.
        seed: of everything.
        running: how.
        ranks: the processes.
        init: weights to begin with, as for ``from_pretrained``; None: random ones.
        draw: called with every snapshot; None: no pictures.

    Raises:
        ValueError: arguments that do not fit one another, or a folder with another run.
        OSError: the folder cannot be written to, ``init`` cannot be found.
    """

    def __init__(
        self,
        preset: str,
        recipe: Recipe,
        dataset: Dataset,
        out: Path,
        *,
        seed: int,
        running: Running,
        ranks: Ranks,
        init: str | None = None,
        draw: Draw | None = None,
    ) -> None:
        if recipe.batch_size % ranks.size:
            raise ValueError(
                f"--batch-size: expected a multiple of the {ranks.size} processes, "
                f"got {recipe.batch_size}"
            )
        self.preset, self.recipe, self.running, self.ranks = preset, recipe, running, ranks
        self.out, self.seed, self._draw = out, seed, draw
        torch.manual_seed(stream_seed(seed, "weights"))
        source, state = _weights(preset, init) if init is not None else (None, None)
        if ranks.first:
            self._claim_folder(dataset, source)
        ranks.all(None)

        torch.set_float32_matmul_precision("high" if running.tf32 else "highest")
        self.network = create_model(preset).train().to(running.device)
        if state is not None:
            self.network.load_state_dict(state)
        self.network.set_grad_checkpointing(running.grad_checkpointing)
        self.objective = objective_of(self.network, get_preset(preset).sampling)
        self.batches = Batches(
            dataset,
            batch_size=recipe.batch_size,
            seed=seed,
            num_classes=self.network.num_classes,
            label_dropout=self.objective.label_dropout,
            augment=recipe.augment if self.objective.augmented else None,
            timesteps=self.objective.timesteps,
        )
        self.model = distribute(self.objective.module, running.parallel, running.device, ranks.size)
        if running.compile:
            for block in blocks(self.network):
                block.compile()
        self.ema = EMA(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=BETAS, eps=EPS)
        self.updates = 0  # of the optimiser
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.checkpoints = Checkpoints(out / "checkpoints", running.keep, ranks)

    def train(self) -> None:
        """Train from where the folder is, to the last step or to SIGTERM.

        Raises:
            ValueError, OSError: data that cannot be read, a disk that cannot be written.
            RuntimeError: too many steps in a row were not finite.
        """
        step = self._resume()
        log = None
        if self.ranks.first:
            log = Log(self.out, step, tensorboard=self.running.tensorboard)
        try:
            with _sigterm() as stopping:
                step, stopped = self._steps(step, log, stopping)
        finally:
            if log is not None:
                log.close()
        if stopped:
            self._say(f"stopped at step {step}; the same command goes on")
            return
        self._save_weights(self.out / WEIGHTS)
        self._say(f"{self.out / WEIGHTS}: the averaged weights after {step} steps")

    def _steps(self, step: int, log: Log | None, stopping: Callable[[], bool]) -> tuple[int, bool]:
        """Train until done or stopped: the steps that are done, and whether it was stopped."""
        recipe = self.recipe
        parts = self._parts()
        keys = ((s, part) for s in range(step, recipe.steps) for part in parts)
        waiting = ahead(lambda key: self.batches.part(key[0], *key[1]), keys)
        speed = _Speed(self)
        losses: list[float] = []
        bar = tqdm(
            total=recipe.steps,
            initial=step,
            unit=" steps",
            disable=None if self.ranks.first else True,  # None: where there is no terminal
        )
        with bar:
            while step < recipe.steps:
                loss, norm, stop = self._step(step, parts, waiting, stopping())
                step += 1
                losses.append(loss)
                if log is not None:
                    line = {"step": step, "images": step * recipe.batch_size, "loss": loss}
                    line |= {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
                    log.write({**line, "skipped": self.skipped, **speed.numbers()})
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if step % recipe.snapshot_every == 0 or step == recipe.steps:
                    self._snapshot(step)
                if stop or step % recipe.checkpoint_every == 0 or step == recipe.steps:
                    finite = [value for value in losses if math.isfinite(value)]
                    mean = sum(finite) / len(finite) if finite else math.inf
                    self.checkpoints.save(step, mean, self._state(step))
                    losses.clear()
                if stop:
                    return step, True
        return step, False

    def _parts(self) -> list[tuple[int, int]]:
        """Which images of a batch this process sees, part by part."""
        share = self.recipe.batch_size // self.ranks.size
        first = self.ranks.rank * share
        size = min(self.running.micro_batch or share, share)
        return [(first + i, first + min(i + size, share)) for i in range(0, share, size)]

    def _step(
        self, step: int, parts: list[tuple[int, int]], waiting: Iterator[Any], stop: bool
    ) -> tuple[float, float, bool]:
        """One step: the loss over all processes, the norm of its gradient, who asked to stop."""
        recipe, device = self.recipe, self.running.device
        images = step * recipe.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(images)
        # Replicas and shards average over processes; this makes it the mean over the batch.
        scale = self.objective.scale * self.ranks.size / recipe.batch_size
        summed = torch.zeros(2, dtype=torch.float64, device=device)
        summed[1] = float(stop)
        autocast = torch.autocast(
            device.type, self.running.dtype, enabled=self.running.dtype != torch.float32
        )
        for part in parts:
            batch = next(waiting).to(device)
            torch.manual_seed(stream_seed(self.seed, "dropout", step, part[0]))
            with reduced_at_once(self.model, last=part is parts[-1]):
                with autocast:
                    losses = self.objective.losses(self.model, batch)
                (losses.sum() * scale).backward()
            summed[0] += losses.detach().double().sum()
        loss_sum, stops = total(summed).tolist()
        loss = loss_sum / recipe.batch_size
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = float(whole(nn.utils.get_total_norm(gradients)))
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.ema.update(self.network, recipe.ema_beta(images))
            self.updates += 1
            self.skipped_in_a_row = 0
        else:
            self._skip(step, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, stops > 0

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise RuntimeError(
                f"{MAX_SKIPPED} steps in a row, to step {step + 1}, without a finite loss and "
                f"gradient (loss {loss}, norm {norm}): the last checkpoint is from before; try a "
                "lower --lr, or --dtype float32"
            )

    def _state(self, step: int) -> dict[str, Tensor]:
        """Everything that a run is made of, by names; the tensors are those in use."""
        progress = (step, self.updates, self.skipped, self.skipped_in_a_row)
        state = {"progress": torch.tensor(progress, dtype=torch.int64)}
        state |= {f"network/{name}": t for name, t in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state[parameter]
            if not moments:  # Adam makes them in its first step
                moments["step"] = torch.zeros(())
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            state[f"ema/{name}"] = self.ema.averages[name]
            state[f"exp_avg/{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
        return state

    def _resume(self) -> int:
        state = self._state(0)
        step, refused = self.checkpoints.load(state)
        for reason in refused:
            self._say(f"refused: {reason}")
        if step is None:
            return 0
        _, self.updates, self.skipped, self.skipped_in_a_row = state["progress"].tolist()
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.updates)
        self._say(f"going on from step {step}")
        return step

    def _claim_folder(self, dataset: Dataset, source: Path | None) -> None:
        """Note what the run is; refuse to mix it with another, and data that cannot be read."""
        identity = {
            "preset": self.preset,
            "data": dataset.fingerprint,
            "seed": self.seed,
            "batch_size": self.recipe.batch_size,
            "init": None if source is None else sha256_of(source),
        }
        path = self.out / RUN
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: cannot be read: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{path}: expected a JSON object, got {found!r:.40}")
            if other := [name for name in identity if identity[name] != found.get(name)]:
                differences = ", ".join(f"{n} {found.get(n)} not {identity[n]}" for n in other)
                raise ValueError(
                    f"{self.out}: holds another run ({differences}); choose another --out"
                )
            return
        dataset.check()
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(identity).encode())

    def _averaged(self) -> DiffusionNetwork | None:
        """The network with averaged weights, for the first process, on its device."""
        state = self.ema.state_dict(self.network)
        if not self.ranks.first:
            return None
        network = create_model(self.preset)
        network.load_state_dict(state)
        return network.eval().to(self.running.device)

    def _save_weights(self, path: Path) -> DiffusionNetwork | None:
        network = self._averaged()
        if network is not None:
            path.parent.mkdir(exist_ok=True)
            save_weights(network, path, preset=self.preset)
        return network

    def _snapshot(self, step: int) -> None:
        path = self.out / "snapshots" / f"{step:08d}.safetensors"
        network = self._save_weights(path)
        if network is not None and self._draw is not None:
            self._draw(network, path.with_suffix(".png"))

    def _say(self, text: str) -> None:
        if self.ranks.first:
            tqdm.write(text)


def _weights(preset: str, source: str) -> tuple[Path, dict[str, Tensor]]:
    """The file and its tensors, as the network of the preset takes them."""
    known = get_preset(preset)
    path = find_weights(source, known.options.get("input_size", 32))
    network = known.network.from_pretrained(path, **known.options)
    require_finite(network, str(path))
    return path, network.state_dict()


class _Speed:
    """Images per second, and the share of the ceiling of the processes' devices that it is.

    A training step counts as three evaluations, and a multiply-add as two operations.
    """

    def __init__(self, trainer: Trainer) -> None:
        running = trainer.running
        ceiling = matmul_ceiling(running.device, running.dtype) * trainer.ranks.size
        operations = 3 * 2 * get_preset(trainer.preset).gflops * 1e9
        self._most = ceiling / operations
        self._batch_size = trainer.recipe.batch_size
        self._last = time.perf_counter()

    def numbers(self) -> dict[str, float]:
        """Of the time since the last call."""
        now = time.perf_counter()
        rate, self._last = self._batch_size / (now - self._last), now
        return {"images_per_second": rate, "share_of_ceiling": rate / self._most}


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came, instead of the end that it would be."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
