"""Networks of peers equal ours, wrong ones are refused, and the command line of the benchmark."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import model_bench
import network_table
import networks
import readme_table
from contest import CompileBudget, hold
from diffit.models import DiffusionNetwork, ImageDiffiT, LatentDiffiT, Preset, Sampling
from diffit_kernels import use_backend
from model_bench import QUICK_PACE, obstacle, tasks
from network_table import NetworkRow, derived_line, with_rates
from networks import PASSES, Task, build, evaluation_inputs, make_network, memory_estimate
from peers import eager, sdpa
from peers.networks import blocks, peer_network
from results import FAILED, OK, OTHER, OURS, SKIPPED, contests, read

CPU = torch.device("cpu")
GUIDED = Sampling("ddpm", 6, guidance_scale=4.4, guidance_schedule="power-cosine")
PRESETS = {
    "windows": Preset(
        ImageDiffiT,
        Sampling("edm", 3),
        0.1,
        0.001,
        None,
        {
            "img_resolution": 12,
            "label_dim": 3,
            "augment_dim": 9,
            "channels": (8, 16),
            "depths": (1, 2),
            "head_dim": 8,
            "window_size": 3,
            "temb_dim": 24,
            "dropout": 0.5,
        },
    ),
    "whole grid": Preset(
        LatentDiffiT,
        GUIDED,
        0.1,
        0.001,
        None,
        {"input_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5},
    ),
}
NAMES = list(PRESETS)
FAST = {"float32": 1e3, "bfloat16": 1e3, "float64": 1e3}


def evaluate(network: nn.Module, inputs: networks.Inputs) -> torch.Tensor:
    with torch.no_grad(), use_backend("reference"):
        return network(*inputs)


@pytest.mark.parametrize("peer", [eager.PEER, sdpa.PEER], ids=lambda peer: peer.name)
@pytest.mark.parametrize("name", NAMES)
def test_the_network_of_a_peer_equals_ours_in_float64(name: str, peer: Any) -> None:
    network = make_network(PRESETS[name], torch.float64, CPU)
    theirs = peer_network(network, peer)
    inputs = evaluation_inputs(network, 3, False, torch.float64, CPU)
    expected = evaluate(network, inputs)
    torch.testing.assert_close(evaluate(theirs, inputs), expected)
    assert expected.std() > 0.1  # not the zeros of a new network
    # Neither network owns the parameters: both are where ours are.
    places = {key: value.data_ptr() for key, value in network.named_parameters()}
    assert {key: value.data_ptr() for key, value in theirs.named_parameters()} == places


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_network_counts(name: str) -> None:
    network = make_network(PRESETS[name], torch.float64, CPU)
    assert not any(module.training for module in network.modules())
    for key, parameter in network.named_parameters():
        assert parameter.any(), key


@pytest.mark.parametrize("change", ["bias_table", "attn.proj", "fc2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_peer_is_refused(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: DiffusionNetwork, peer: Any) -> DiffusionNetwork:
        made = peer_network(network, peer)
        if peer.name == sdpa.PEER.name:
            for key, parameter in made.named_parameters():
                if change in key:
                    parameter.data = parameter.data * 0.9
        return made

    monkeypatch.setattr(networks, "peer_network", wrong)
    for direction in PASSES:
        rows = held(Task(PRESETS[name], direction, 2, steps=2))
        assert rows["sdpa"].status == FAILED, direction
        assert rows["sdpa"].median_ms is None
        assert rows["eager"].status == rows[OURS].status == OK


def held(task: Task, seconds: float = 0) -> dict[str, NetworkRow]:
    case = build(task, torch.float32, CPU)
    template = replace(TEMPLATE, operation=task.operation)
    budget = CompileBudget(seconds, "no time")
    rows = hold(case, task.direction, template, CPU, QUICK_PACE, budget, 1.0)
    return {row.contestant: with_rates(row, task) for row in rows}


TEMPLATE = NetworkRow("tiny", 2, 4, 4, 8, 1, "float32", "", "", "", "")


@pytest.mark.parametrize("direction", PASSES)
def test_dit_is_shown_and_is_no_peer(direction: str) -> None:
    pytest.importorskip("diffusers")
    rows = held(Task(PRESETS["whole grid"], direction, 2, steps=2))
    assert rows[OTHER].status == OK, rows[OTHER].reason
    assert rows[OTHER].median_ms is not None
    fastest = replace(rows[OTHER], median_ms=1e-9)
    (contest,) = contests([*rows.values(), fastest])
    assert contest.best is not None
    assert contest.best.contestant in {"eager", "sdpa"}


def test_without_diffusers_there_is_no_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    case = build(Task(PRESETS["whole grid"], "forward", 1), torch.float32, CPU)
    names = [contestant.name for contestant in case.contestants]
    assert names == ["ours", "eager", "sdpa", "compile", "compile-sdpa"]


def test_training_asks_for_the_gradient_of_every_parameter() -> None:
    task = Task(PRESETS["windows"], "training", 2)
    case = build(task, torch.float32, CPU)
    network = make_network(task.preset, torch.float32, CPU)
    assert case.truth["training"].keys() == dict(network.named_parameters()).keys()
    assert all(
        tensor.dtype == torch.float64
        for key, tensor in case.truth["training"].items()
        if not key.endswith(networks.TABLE)
    )


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("name", NAMES)
def test_evaluations_of_a_loop_are_counted(name: str, steps: int) -> None:
    preset = PRESETS[name]
    network = make_network(preset, torch.float32, CPU)
    seen = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    network.register_forward_pre_hook(count)
    images = networks.sample(network, preset, 2, steps)
    assert images.isfinite().all()
    assert seen == 2 * networks.evaluations(preset, steps)


def test_rates_of_other_steps_are_derived() -> None:
    preset = PRESETS["windows"]
    row = replace(TEMPLATE, median_ms=500.0, contestant=OURS, direction="sampling")
    own = with_rates(row, Task(preset, "sampling", 2, steps=3))
    assert (own.images_per_second, own.derived_images_per_second) == (4.0, None)
    few = with_rates(row, Task(preset, "sampling", 2, steps=2))
    assert (few.evaluations, few.own_evaluations) == (3, 5)
    assert few.derived_images_per_second == pytest.approx(4 * 3 / 5)
    assert "derived, not measured" in derived_line(few)
    assert with_rates(row, Task(preset, "forward", 2)).images_per_second is None


def test_what_does_not_fit_is_told() -> None:
    task = Task(replace(PRESETS["windows"], gflops=1e3), "forward", 1)
    assert "was left of --minutes" in obstacle(task, "float32", FAST, CPU, 1.0, False)
    assert obstacle(task, "float32", FAST, CPU, 1e6, False) == ""
    huge = replace(task, batch=10**12)
    assert "GiB of memory" in obstacle(huge, "float32", FAST, CPU, float("inf"), False)


def test_memory_holds_parameters_and_gradients_of_the_truth() -> None:
    task = Task(model_bench.MAIN["diffit_xl_2_256"], "forward", 1)
    forward, training = (
        memory_estimate(replace(task, direction=name), torch.float32) / 2**30
        for name in ("forward", "training")
    )
    assert 6 < forward < 8  # 561 M parameters of 4 and of 8 bytes
    assert 21 < training < 26  # and their gradients, and moments of two networks


def test_the_headline_comes_first_and_guided_steps_are_there() -> None:
    dtypes = ["--dtypes", "float32", "bfloat16"]
    args = model_bench.parse(["--out", "/tmp", "--passes", "training", "forward", *dtypes])
    found = [(name, dtype, task.operation) for name, dtype, task in tasks(args, FAST)]
    name = model_bench.HEADLINE
    assert found[:4] == [
        (name, dtype, operation)
        for dtype in ("float32", "bfloat16")
        for operation in ("step", "guided step")
    ]
    assert {name for name, _, _ in found} == set(model_bench.MAIN)


def test_every_preset_has_peers() -> None:
    for name, preset in model_bench.MAIN.items():
        with torch.device("meta"):
            network = preset.network(**preset.options)
        assert list(blocks(network)), name


def test_a_variant_of_the_block_has_no_peer() -> None:
    network = ImageDiffiT(16, channels=(32,), depths=(1,), time_entry="mlp")
    with pytest.raises(ValueError, match="TimeMLPBlock"):
        list(blocks(network))


def test_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bench, "MAIN", PRESETS)
    monkeypatch.setattr(model_bench, "QUICK", NAMES)
    monkeypatch.setattr(model_bench.ceilings, "linear_layer", lambda *_: FAST)
    assert model_bench.main(["--quick", "--dtypes", "float32", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    settings, rows = read(tmp_path, "models", NetworkRow)
    assert {(row.shape, row.operation, row.direction) for row in rows} == {
        ("windows", "step", "forward"),
        ("windows", "step", "training"),
        ("windows", "loop", "sampling"),
        ("whole grid", "step", "forward"),
        ("whole grid", "guided step", "forward"),
        ("whole grid", "step", "training"),
        ("whole grid", "loop", "sampling"),
    }
    for row in rows:
        assert row.status == (SKIPPED if row.contestant.startswith("compile") else OK), row
        loops = isinstance(row, NetworkRow) and row.images_per_second is not None
        assert loops == (row.status == OK and row.direction == "sampling")
    assert "derived, not measured" in out
    table = network_table.markdown(settings, rows).splitlines()
    assert table[2] == "| network | dtype | step | training | loop | guided step |"
    assert [line.count("|") for line in table[2:]] == [7] * 4
    assert all(f"| {name} | fp32 | " in line for name, line in zip(NAMES, table[4:], strict=True))
    assert "4 steps, eager" in table[5]
    titles, _, values = readme_table.network_summary_table([(settings, rows)]).splitlines()
    assert len(titles.split(" | ")) == 6
    _, _, *cells = values.strip("| ").split(" | ")
    assert [cell.rpartition(", ")[2] for cell in cells] == ["2", "1", "2", "2"]
    with (tmp_path / "models.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    device = json.loads((tmp_path / "models.json").read_text())["device"]
    assert list(lines[0]) == [*(field.name for field in fields(NetworkRow)), *device]


WRONG = {
    "unknown option": ["--fast"],
    "unknown preset": ["--presets", "diffit_cifar100"],
    "no preset": ["--presets"],
    "unknown dtype": ["--dtypes", "float16"],
    "unknown pass": ["--passes", "backward"],
    "no batch": ["--batch", "0"],
    "no steps": ["--sampling-steps", "0"],
    "no threads": ["--threads", "0"],
    "no GPU": ["--device", "cuda"],
    "time in words": ["--minutes", "long"],
    "no time": ["--minutes", "0"],
    "no number of seconds": ["--compile-seconds", "nan"],
    "folder is a file": ["--out", __file__],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_input_costs_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        model_bench.main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("model_bench.py: ")
    assert err.count("\n") == 1


def test_interrupt_costs_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_bench.ceilings, "linear_layer", interrupt)
    assert model_bench.main(["--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []
