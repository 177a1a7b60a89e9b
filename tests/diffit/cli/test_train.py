"""``diffit train``: from pictures to weights that sample; wrong input costs one line."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffit.cli import main
from diffit.cli.networks import SHIPPED
from diffit.models import load_model, save_weights
from diffit.training.log import Log
from tests.diffit.training.kills import wait
from tests.diffit.training.processes import Processes
from tests.diffit.training.tiny import (
    IMAGE,
    LATENT,
    ROOT,
    command,
    environment,
    latents,
    pictures,
    python,
    stats,
)

pytestmark = pytest.mark.usefixtures("tiny_presets")

Train = Callable[..., int]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "set.zip")


@pytest.fixture
def train(images: Path, tmp_path: Path) -> Train:
    """Runs the command; ``name=value`` is ``--name value``."""

    def run(**changes: Any) -> int:
        options: dict[str, Any] = {"preset": IMAGE, "data": images, "out": tmp_path / "run"}
        options |= {"steps": 3, "batch_size": 4, "device": "cpu", **changes}
        words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not True]
        words += [f"--{k.replace('_', '-')}" for k, v in options.items() if v is True]
        return main(["train", *words])

    return run


def test_from_pictures_to_weights_that_sample(train: Train, tmp_path: Path) -> None:
    assert train() == 0
    run = tmp_path / "run"
    assert [line["step"] for line in stats(run)] == [1, 2, 3]
    assert load_model(run / "weights.safetensors")[1] == IMAGE
    with Image.open(run / "snapshots" / "00000003.png") as grid:
        assert grid.size == (48, 48)
    words = ["sample", "--weights", str(run / "weights.safetensors"), "--out"]
    assert main([*words, str(tmp_path / "grid.png"), "--seeds", "0-3"]) == 0


def test_latents(train: Train, tmp_path: Path) -> None:
    assert train(preset=LATENT, data=latents(tmp_path / "latents")) == 0
    assert load_model(tmp_path / "run" / "weights.safetensors")[1] == LATENT
    assert not list((tmp_path / "run" / "snapshots").glob("*.png"))


def test_begins_with_weights(train: Train, tmp_path: Path, capsys: Any) -> None:
    """In half precision; a folder takes no others than those it began with."""
    assert train() == 0
    first, again = tmp_path / "half.safetensors", tmp_path / "again"
    network, _ = load_model(tmp_path / "run" / "weights.safetensors")
    save_weights(network.bfloat16(), first, preset=IMAGE)
    assert train(out=again, init=first, lr=1e-12, lr_ramp=1) == 0
    tuned = load_model(again / "weights.safetensors")[0].state_dict()
    for name, tensor in network.state_dict().items():
        assert tuned[name].dtype == torch.float32
        assert tuned[name].allclose(tensor.float(), rtol=0, atol=1e-9), name
    assert "holds another run (init" in wrong(capsys, train(out=again))


def test_every_option(train: Train, tmp_path: Path) -> None:
    options = {"lr": 0.01, "seed": 1, "micro_batch": 3, "dtype": "bfloat16", "keep": 1}
    flags = {"tf32": True, "grad_checkpointing": True, "checkpoint_every": 1}
    assert train(**options, **flags, snapshot_every=2, parallel="fsdp") == 0
    run = tmp_path / "run"
    assert sorted(path.stem for path in (run / "snapshots").glob("*.png")) == [
        "00000002",
        "00000003",
    ]
    assert 1 <= len(list((run / "checkpoints").iterdir())) <= 2  # the newest and the best


def wrong(capsys: Any, code: int) -> str:
    """The one line of wrong input."""
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("diffit train: ")
    assert error.count("\n") == 1, error
    return str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "tiny_emoji_"}, "the nearest is 'tiny_emoji'"),
        ({"data": "missing.zip"}, "missing.zip: no such file or folder"),
        ({"preset": LATENT}, "expected a folder of latents"),
        ({"init": "missing.safetensors"}, "missing.safetensors: no such file"),
        ({"init": SHIPPED / "diffit_emoji_32.safetensors"}, "does not fit"),
        ({"device": "none"}, "--device: none cannot be used here"),
    ],
)
def test_wrong_arguments(
    train: Train, tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    assert message in wrong(capsys, train(**changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_name(train: Train, capsys: Any) -> None:
    """It would be the current one."""
    with pytest.raises(SystemExit, match="2"):
        train(out="")
    assert capsys.readouterr().err == "diffit train: argument --out: expected a folder, got ''\n"


@pytest.mark.parametrize(
    ("step", "message"), [(1, "before the first checkpoint"), (3, "from the last checkpoint in ")]
)
def test_interrupted(
    train: Train, tmp_path: Path, capsys: Any, monkeypatch: Any, step: int, message: str
) -> None:
    """It says what is kept."""
    observed = iter(range(1, 10))

    def interrupt(*_: Any, **__: Any) -> None:
        if next(observed) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", interrupt)
    assert train(checkpoint_every=1) == 130
    assert message in capsys.readouterr().err
    assert any((tmp_path / "run").glob("checkpoints/[0-9]*")) == (step > 1)


@pytest.mark.parametrize("option", ["steps", "batch_size", "lr", "keep", "micro_batch"])
def test_arguments_out_of_range(train: Train, capsys: Any, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(**{option: 0})
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_data(train: Train, images: Path, tmp_path: Path, capsys: Any) -> None:
    with zipfile.ZipFile(images) as archive:
        archive.extractall(tmp_path / "set")
    folder = tmp_path / "set"
    index, picture = folder / "dataset.json", folder / "00000" / "img00000004.png"
    whole, labels = picture.read_bytes(), index.read_text()

    (tmp_path / "empty").mkdir()
    assert "no pictures in it" in wrong(capsys, train(data=tmp_path / "empty"))
    picture.write_bytes(whole[:50])
    assert "img00000004.png: cannot be read" in wrong(capsys, train(data=folder))
    Image.new("RGB", (9, 9)).save(picture)
    assert "img00000004.png: expected 8 x 8" in wrong(capsys, train(data=folder))
    picture.write_bytes(whole)
    index.unlink()
    assert "no dataset.json in it" in wrong(capsys, train(data=folder))
    index.write_text(json.dumps({"labels": json.loads(labels)["labels"][:5]}))
    assert "img00000005.png: expected a class 0..2, got no label" in wrong(
        capsys, train(data=folder)
    )
    index.write_text(labels.replace("1]", "3]"))
    assert "expected a class 0..2, got 3" in wrong(capsys, train(data=folder))
    assert not (tmp_path / "run").exists()
    index.write_text(labels.replace("2]", "1]"))
    assert train(data=folder, out=tmp_path / "two") == 0
    assert "has 2 of the 3 classes" in capsys.readouterr().out
    index.write_text(labels)
    assert train(data=folder) == 0
    assert "classes" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(train: Train, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("not a folder")
    for out, message in (
        (tmp_path / "file", "--out: expected a folder, got "),
        (tmp_path / "file/run", f"{tmp_path / 'file'} is a file"),
        ("/proc/run", "--out: '/proc' cannot be written to: "),  # even for root
    ):
        assert message in wrong(capsys, train(out=out, data="not looked at yet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "[]", r"run.json: expected a JSON object, got []"),
        ("run.json", "{", "run.json: cannot be read: Expecting property name"),
        ("run.json", b"\xff\xff", "run.json: cannot be read: 'utf-8' codec"),
        ("stats.jsonl", "[]\n", "stats.jsonl: line 1: expected an object with the numbers step, "),
        ("stats.jsonl", '{"loss": 1}\n', "stats.jsonl: line 1: expected an object"),
        ("stats.jsonl", '{"step": "1", "images": 1, "loss": 1}\n', "stats.jsonl: line 1: expected"),
        ("stats.jsonl", "no json\n{}\n", "stats.jsonl: line 1: expected an object"),
        ("stats.jsonl", b"\x89PNG\r\n\x1a\n\0", "stats.jsonl: line 1: expected an object"),
    ],
)
def test_a_run_that_is_none(
    train: Train, tmp_path: Path, capsys: Any, name: str, content: str | bytes, message: str
) -> None:
    """The file is named, and left as it was."""
    assert train() == 0
    file = tmp_path / "run" / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    capsys.readouterr()
    assert message in wrong(capsys, train())
    assert file.read_bytes() == before


@pytest.mark.parametrize("what", ["checkpoint", "snapshot"])
def test_a_full_disk_is_one_line_and_costs_nothing(
    train: Train, images: Path, tmp_path: Path, what: str
) -> None:
    """A limit on the size of files stands in for a full disk."""
    assert train(checkpoint_every=1) == 0
    run = tmp_path / "run"
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    words = python(command(images, run, "--steps", "9", f"--{what}-every", "4"))
    words[words.index("--batch-size") + 1] = "4"
    limited = subprocess.run(
        words,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert limited.returncode == 2, limited.stderr
    message = limited.stderr.splitlines()[-1]
    assert message.startswith("diffit train: ")
    assert "File too large" in message
    assert "Traceback" not in limited.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert train(steps=9) == 0
    assert [line["step"] for line in stats(run)] == list(range(1, 10))


def test_sigterm_exits_with_0_and_the_same_command_goes_on(images: Path, tmp_path: Path) -> None:
    words = command(images, tmp_path / "run", "--steps", "100000")
    with Processes(words, tmp_path / "output.txt") as processes:
        log = tmp_path / "run" / "stats.jsonl"
        wait(lambda: log.exists() and len(stats(log.parent)) >= 3)
        processes.ranks[0].terminate()
        assert processes.wait() == [0]
    assert "the same command goes on" in processes.output.read_text()
    steps = len(stats(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{steps:08d}"]


def test_tensorboard_that_is_not_there(train: Train, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install 'diffit[tensorboard]'" in wrong(capsys, train(tensorboard=True))
