"""``diffit evaluate``: sets, statistics and networks; the record; wrong input costs a line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffit
from diffit.cli import main
from diffit.files import sha256_of
from tests.diffit.cli.test_sample import PRESET

EMOJI = Path(__file__).parents[3] / "examples/data/emoji32.zip"
COUNT = 11  # pictures of a set: an odd number, for small machines


def take(out: Path, first: int) -> Path:
    """A zip of some emoji."""
    with zipfile.ZipFile(EMOJI) as archive, zipfile.ZipFile(out, "w") as part:
        names = [name for name, _ in json.loads(archive.read("dataset.json"))["labels"]]
        for i, name in enumerate(names[first::97][:COUNT]):
            part.writestr(f"{i:02d}.png", archive.read(name))
    return out


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return take(tmp_path_factory.mktemp("sets") / "a.zip", 0)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return take(tmp_path_factory.mktemp("sets") / "b.zip", 5)


@pytest.fixture(scope="module")
def b_to_a(a: Path, b: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of b against a, beside the statistics of a, by one process."""
    out = tmp_path_factory.mktemp("b_to_a")
    command = ["evaluate", "--samples", str(b), "--reference", str(a)]
    command += ["--out", str(out / "result.json"), "--write-statistics", str(out / "a.npz")]
    assert main(command) == 0
    return out


@pytest.fixture
def evaluate(tmp_path: Path, capsys: Any) -> Callable[..., dict[str, Any]]:
    """Runs the command; the record."""

    def run(*arguments: object) -> dict[str, Any]:
        out = tmp_path / "result.json"
        assert main(["evaluate", *map(str, arguments), "--out", str(out)]) == 0
        record: dict[str, Any] = json.loads(out.read_text())
        printed = dict(
            line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2
        )
        for name, value in record["metrics"].items():
            assert float(printed[name]) == pytest.approx(value, rel=1e-5)
        return record

    return run


def test_a_set_and_itself(evaluate: Any, a: Path) -> None:
    record = evaluate("--samples", a, "--reference", a)
    metrics = record["metrics"]
    # Eleven pictures span ten dimensions; of the roots of the other 1,270 eigenvalues rounding
    # leaves sqrt(2^-52) of the largest each, at most.
    assert abs(metrics["fd_effnetlite0"]) < 1e-2
    assert metrics["precision_effnetlite0"] == metrics["recall_effnetlite0"] == 1
    assert 1 <= metrics["is_effnetlite0"] < COUNT
    assert not any("fid" in name for name in metrics)
    digest = hashlib.sha256(a.read_bytes()).hexdigest()
    assert record["samples"] == {"path": str(a), "sha256": digest, "count": COUNT}
    assert record["reference"] == record["samples"]
    assert record["features"]["name"] == "effnetlite0"
    assert record["versions"]["diffit"] == diffit.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["efficientnet-lite-pytorch"] == "0.1.0"


def test_statistics(
    evaluate: Any, a: Path, b: Path, b_to_a: Path, tmp_path: Path, capsys: Any
) -> None:
    """Written alone or beside; in place of the pictures they give the same distance."""
    alone = tmp_path / "alone.npz"
    assert main(["evaluate", "--reference", str(a), "--write-statistics", str(alone)]) == 0
    assert f"a.zip: {COUNT} pictures, " in capsys.readouterr().out
    pictures = json.loads((b_to_a / "result.json").read_text())
    with np.load(alone) as one, np.load(b_to_a / "a.npz") as two:
        assert one["mu"].shape == (1280,)
        assert all(np.array_equal(one[name], two[name]) for name in ("mu", "sigma", "count"))
    statistics = evaluate("--samples", b, "--reference", alone)
    assert "precision_effnetlite0" not in statistics["metrics"]
    expected = pictures["metrics"]["fd_effnetlite0"]
    assert statistics["metrics"]["fd_effnetlite0"] == expected
    assert expected > 10
    assert statistics["reference"] == {
        "path": str(alone),
        "sha256": sha256_of(alone),
        "count": COUNT,
    }

    # Pictures beside statistics, as guided-diffusion's reference batches have them.
    with zipfile.ZipFile(a) as archive:
        names = sorted(archive.namelist())
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names])
    with np.load(alone) as one:
        np.savez(tmp_path / "batch.npz", arr_0=images, mu=one["mu"], sigma=one["sigma"])
    both = evaluate("--samples", b, "--reference", tmp_path / "batch.npz")
    assert both["metrics"] == pictures["metrics"]
    assert both["reference"]["count"] is None  # of pictures that the statistics are of


def test_a_network(evaluate: Any, b_to_a: Path, weights: Path, tmp_path: Path) -> None:
    """Its pictures are those of `diffit sample`, and so are the metrics."""
    sampling = ["--weights", str(weights), "--steps", "1", "--seeds", "0-9,12", "--classes", "3,5"]
    sampling += ["--guidance", "2", "--batch-size", "4"]
    record = evaluate(*sampling, "--reference", b_to_a / "a.npz")
    assert record["samples"] == {
        "preset": PRESET,
        "weights": sha256_of(weights),
        "dtype": "float32",
        "sampler": "edm",
        "steps": 1,
        "guidance": 2.0,
        "interval": None,
        "vae": None,
        "seeds": "0-9,12",
        "classes": "3,5",
        "count": COUNT,
    }
    assert main(["sample", *sampling, "--out", str(tmp_path / "folder")]) == 0
    folder = tmp_path / "folder"
    on_disk = evaluate("--samples", folder, "--reference", b_to_a / "a.npz", "--batch-size", "4")
    assert on_disk["metrics"] == record["metrics"]
    assert len(on_disk["samples"]["sha256"]) == 64


def test_digest_of_a_folder(tmp_path: Path) -> None:
    """Of names and contents."""
    (tmp_path / "set/more").mkdir(parents=True)
    (tmp_path / "set/a.png").write_text("a")
    (tmp_path / "set/more/b.png").write_text("b")
    digests = [sha256_of(tmp_path / "set")]
    (tmp_path / "set/a.png").write_text("c")
    digests.append(sha256_of(tmp_path / "set"))
    (tmp_path / "set/more/b.png").rename(tmp_path / "set/b.png")
    digests.append(sha256_of(tmp_path / "set"))
    assert len(set(digests)) == 3


def test_torchrun(a: Path, b: Path, b_to_a: Path, tmp_path: Path) -> None:
    """Two processes measure what one does, within the rounding of float32 features."""
    one = json.loads((b_to_a / "result.json").read_text())["metrics"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    out = tmp_path / "two.json"
    subprocess.run(
        [
            *(*run, "-m", "diffit", "evaluate", "--samples", str(b), "--reference", str(a)),
            *("--out", str(out), "--write-statistics", str(tmp_path / "two.npz")),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    two = json.loads(out.read_text())["metrics"]
    assert two == pytest.approx(one, rel=1e-4)
    with np.load(tmp_path / "two.npz") as statistics:
        assert statistics["count"] == COUNT


def test_wrong_input(
    fails: Any,
    a: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """One line, exit code 2, no file."""
    (tmp_path / "a.zip").write_bytes(a.read_bytes())
    with zipfile.ZipFile(a) as archive:
        archive.extractall(tmp_path / "bad")
        archive.extractall(tmp_path / "few")
    for name in ("03.png", "04.png"):
        (tmp_path / "few" / name).unlink()
    (tmp_path / "bad/03.png").write_bytes((tmp_path / "bad/03.png").read_bytes()[:60])
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(
        tmp_path / "other.npz", mu=np.zeros(1280), sigma=np.eye(1280), features=np.array("other")
    )
    np.savez(tmp_path / "half.npz", mu=np.zeros(1280))
    np.savez(tmp_path / "words.npz", mu=np.array(["a"] * 1280), sigma=np.eye(1280))
    (tmp_path / "text").write_text("text")
    given = ("--samples", "a.zip", "--reference", "a.zip")
    for arguments, message in (
        (("--samples", "a.zip"), "the following arguments are required: --reference"),
        (("--reference", "a.zip"), "expected --samples, --preset or --weights"),
        (("--reference", "a.zip", "--steps", "3"), "expected --samples, --preset or --weights"),
        (("--samples", "no.zip", "--reference", "a.zip"), "no.zip: no such file or folder"),
        (("--samples", "a.zip", "--reference", "no.npz"), "no.npz: no such file or folder"),
        (("--samples", "text", "--reference", "a.zip"), "text: expected a folder, a zip, an npz"),
        (
            ("--reference", "fid.npz", "--write-statistics", "./fid.npz"),
            "--write-statistics: expected another file than what is read, got 'fid.npz'",
        ),
        (("--samples", "a.zip", "--reference", "bad"), "bad: 03.png: cannot be read"),
        (("--samples", "few", "--reference", "a.zip"), "few: expected at least 10 pictures, got 9"),
        (("--preset", PRESET, "--seeds", "0-8", "--reference", "a.zip"), "--seeds: expected at"),
        (
            ("--samples", "a.zip", "--reference", "fid.npz"),
            "expected statistics of 1280 features, as effnetlite0 has, got 2048",
        ),
        (
            ("--samples", "a.zip", "--reference", "other.npz"),
            "expected statistics of effnetlite0, got those of other",
        ),
        (
            ("--samples", "a.zip", "--reference", "words.npz"),
            "words.npz: mu: expected numbers, got <U1",
        ),
        (("--samples", "a.zip", "--reference", "half.npz"), "expected mu (d,) and sigma (d, d)"),
        ((*given, "--steps", "3"), "--steps: expected a network, not --samples, with it"),
        ((*given, "--seeds", "0-999"), "--seeds: expected a network, not --samples, with it"),
        ((*given, "--weights", "x"), "--weights: expected a network, not --samples"),
        ((*given, "--features", "inception"), "expected --inception-weights FILE"),
        ((*given, "--inception-weights", "x"), "expected --features inception with it"),
        (
            (*given, "--features", "inception", "--inception-weights", "no.pth"),
            "no.pth: No such file or directory",
        ),
        ((*given, "--features", "clip"), "invalid choice: 'clip'"),
        ((*given, "--out", "a.txt"), "--out: expected a .json in a folder that exists"),
        ((*given, "--out", "no/a.json"), "--out: expected a .json in a folder that exists"),
        ((*given, "--out", "/proc/a.json"), "--out: '/proc' cannot be written to: "),
        ((*given, "--write-statistics", "few"), "--write-statistics: expected a .npz"),
        ((*given, "--write-statistics", "a"), "--write-statistics: expected a .npz"),
        ((*given, "--device", "tpu"), "--device: tpu cannot be used here"),
        (
            ("--reference", "a.zip", "--write-statistics", "s.npz", "--out", "a.json"),
            "--out: expected --samples, --preset or --weights with it",
        ),
    ):
        out = () if "--out" in arguments else ("--out", "result.json")
        assert message in fails("evaluate", *arguments, *out), arguments
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "pip install 'diffit[evaluate]'" in fails("evaluate", *given)
