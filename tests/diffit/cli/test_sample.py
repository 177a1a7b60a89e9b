"""``diffit sample``: pictures depend on their seeds alone; it resumes; wrong input costs a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from diffit.cli import main
from diffit.cli.pictures import Painter
from diffit.models import DDPMpp, Sampling, save_weights
from tests.diffit.models.networks import small_ddpmpp, small_image, small_latent, stirred

PRESET = "diffit_emoji_32"


@pytest.fixture
def sample(weights: Path, capsys: Any) -> Callable[..., str]:
    """Runs the command with these weights; what it printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["sample", "--weights", str(weights), "--steps", "2", *arguments]) == 0
        return capsys.readouterr().out

    return run


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_seed_is_a_picture(sample: Callable[..., str], tmp_path: Path) -> None:
    """Alone, in a batch, in another order: pixels to the last level, and the same class."""
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    sample("--seeds", "0-6", "--out", str(whole), "--batch-size", "7")
    sample("--seeds", "5,2", "--out", str(alone), "--batch-size", "1")
    for name in ("000005.png", "000002.png"):
        a, b = (np.asarray(Image.open(folder / name)) for folder in (whole, alone))
        # Products of another batch round elsewhere: by one of 256 levels at most.
        assert np.abs(a.astype(int) - b).max() <= 1
        assert Image.open(whole / name).info == Image.open(alone / name).info
    assert len(set(pngs(whole).values())) == 7


def test_what_counts_the_calls_changes_nothing() -> None:
    """A progress bar may return something."""
    network = small_image(img_resolution=32, label_dim=9, window_size=4)
    painter = Painter(network, Sampling("edm", 2))
    calls: list[int] = []
    quiet = painter.paint([0], [1], lambda: None)
    counted = painter.paint([0], [1], lambda: calls.append(1) or True)
    assert np.array_equal(quiet.pixels, counted.pixels)
    assert len(calls) == counted.evaluated == painter.evaluations == 3


def test_grid_and_npz(sample: Callable[..., str], tmp_path: Path) -> None:
    """The same pictures, in order, and their classes."""
    sample("--seeds", "0-4", "--out", str(tmp_path / "all"), "--batch-size", "5")
    sample("--seeds", "0-4", "--out", str(tmp_path / "a.npz"), "--batch-size", "5")
    out = sample("--seeds", "0-4", "--out", str(tmp_path / "a.png"), "--batch-size", "5")
    assert "a.png: 5 pictures" in out
    pictures = [np.asarray(Image.open(tmp_path / f"all/{seed:06d}.png")) for seed in range(5)]
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pictures)
        assert arrays["arr_1"].shape == (5,)
        assert ((arrays["arr_1"] >= 0) & (arrays["arr_1"] < 9)).all()
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (64, 96, 3)
    assert np.array_equal(grid[32:, 32:64], pictures[4])
    assert not list(tmp_path.glob("*.partial"))


def test_classes(sample: Callable[..., str], tmp_path: Path) -> None:
    """In turn over the seeds, by id or name."""
    sample("--seeds", "0-3", "--classes", "2,flags,none", "--out", str(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_1"].tolist() == [2, 8, 9, 2]


def test_guidance_counts_what_it_saves(sample: Callable[..., str], tmp_path: Path) -> None:
    """Two steps are three evaluations; the second noise level alone is in the interval."""
    out = sample(
        *("--seeds", "0-1", "--guidance", "2", "--guidance-interval", "0.001", "1"),
        *("--out", str(tmp_path / "a.png")),
    )
    # Six evaluations of sigma 80, 0.002, 0.002 for two pictures: those at 80 are not guided.
    assert "guidance: 2 of 12 evaluations were saved" in out


def test_all_kinds_of_networks(tmp_path: Path, capsys: Any) -> None:
    """NCSN++ without classes, and a latent network with its decoder and every sampler."""
    network = small_ddpmpp(img_resolution=32, label_dim=0, ncsnpp=True)
    assert isinstance(network, DDPMpp)
    save_weights(network, tmp_path / "u.safetensors", preset="ncsnpp_cifar10_32")
    arguments = ["sample", "--weights", str(tmp_path / "u.safetensors"), "--steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "u.png")]) == 0

    save_weights(small_latent(input_size=4), tmp_path / "l.safetensors", preset="diffit_s_2_256")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4
    )
    stirred(vae).save_pretrained(tmp_path / "vae")
    for sampler, steps in (("ddpm", "3"), ("ddim", "2"), ("dpm++", "2")):
        out = tmp_path / f"{sampler}.png"
        assert (
            main(
                [
                    *("sample", "--weights", str(tmp_path / "l.safetensors")),
                    *("--vae", str(tmp_path / "vae"), "--sampler", sampler, "--steps", steps),
                    *("--seeds", "0-1", "--dtype", "bfloat16", "--out", str(out)),
                ]
            )
            == 0
        )
        assert "evaluations were saved" in capsys.readouterr().out
        assert Image.open(out).size == (8, 4)


def test_random_weights_say_so(tmp_path: Path, capsys: Any) -> None:
    """Where none come with the project."""
    out = tmp_path / "a.png"
    preset = "diffit_emoji_32_time_mlp"
    assert main(["sample", "--preset", preset, "--steps", "1", "--out", str(out)]) == 0
    assert f"no weights for {preset}: the network is random" in capsys.readouterr().out


DIFFIT = (sys.executable, "-m", "diffit")


def words(weights: Path, out: Path, *arguments: str) -> list[str]:
    return [
        *("sample", "--weights", str(weights), "--steps", "2", "--seeds", "0-11"),
        *("--batch-size", "1", "--out", str(out), *arguments),
    ]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_goes_on_where_it_was_stopped(
    weights: Path, tmp_path: Path, capsys: Any, ending: int
) -> None:
    """Killed or interrupted between pictures; the rerun makes those that are missing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out, expected = tmp_path / "out.npz", tmp_path / "expected.npz"
    many = ("--seeds", "0-149")  # so that the signal comes before the last
    assert main(words(weights, expected, *many)) == 0
    command = [*DIFFIT, *words(weights, out, *many)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.npz.partial"
    while len(list(partial.glob("0*.png"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(ending)
    _, err = process.communicate()
    assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    if ending == signal.SIGINT:
        assert err.endswith(f"the same command goes on from what is in {partial}\n")
    before = pngs(partial)
    assert 3 <= len([name for name in before if name.startswith("0")]) < 150
    assert main(words(weights, out, *many)) == 0
    assert "of 150 pictures are there already" in capsys.readouterr().out
    assert out.read_bytes() == expected.read_bytes()
    assert not partial.exists()


def test_interrupted_in_the_first_batch(
    weights: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffit.cli.pictures.edm_sample", interrupt)
    assert main(words(weights, tmp_path / "out.npz")) == 130
    assert "interrupted before the first batch was done" in capsys.readouterr().err
    assert not (tmp_path / "out.npz.partial").exists()


def test_torchrun(weights: Path, tmp_path: Path) -> None:
    """Two processes make the pictures of one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    assert main(words(weights, one)) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*run, *DIFFIT[1:], *words(weights, two)], check=True, env=environment)
    assert one.read_bytes() == two.read_bytes()


def test_other_settings_are_refused(sample: Any, fails: Any, weights: Path) -> None:
    """Pictures of other settings are not mixed with these, nor lost."""
    sample("--seeds", "0-1", "--out", "all")
    arguments = ["sample", "--weights", str(weights), "--steps", "3", "--out", "all"]
    assert "was made otherwise (steps 2 not 3)" in fails(*arguments, "--seeds", "0-1")


def gpu_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("no more")


def cpu_memory(*_: Any, **__: Any) -> None:
    torch.empty(2**50)


@pytest.mark.parametrize("full", [gpu_memory, cpu_memory])
def test_out_of_memory(weights: Path, fails: Any, monkeypatch: Any, full: Any) -> None:
    """What a GPU raises, and what PyTorch's own allocator does for a petabyte."""
    monkeypatch.setattr("diffit.cli.pictures.edm_sample", full)
    arguments = ["sample", "--weights", str(weights), "--out", "a.png", "--batch-size", "8"]
    assert "try --batch-size 4" in fails(*arguments, "--seeds", "0-9")


def test_wrong_input(weights: Path, fails: Any, tmp_path: Path) -> None:
    """One line, exit code 2, no file."""
    whole = weights.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"foreign.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    broken = small_image(img_resolution=32, label_dim=9, window_size=4)
    with torch.no_grad():
        broken.stem.weight[0] = torch.nan
    save_weights(broken, tmp_path / "nan.safetensors", preset=PRESET)
    save_weights(small_image(), tmp_path / "small.safetensors", preset=PRESET)
    save_weights(small_image(), tmp_path / "unnoted.safetensors")
    save_weights(small_image(), tmp_path / "unknown.safetensors", preset="diffit_new")
    for name, note in (("future", '{"network": "FutureDiffiT"}'), ("list", "[1]"), ("text", "{")):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors", {"diffit": note})
    flat = {name: torch.zeros(1) for name in small_latent().state_dict()}
    save_file(flat, tmp_path / "flat.safetensors")
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("--preset", "diffit_emoji_23"), "the nearest is 'diffit_emoji_32'"),
        ((), "expected --preset, --weights or both"),
        (("--weights", "cut.safetensors"), "cut.safetensors: not a whole safetensors file"),
        (("--weights", "foreign.safetensors"), "missing x_embedder.proj.weight"),
        (("--weights", "foreign.safetensors"), "it holds foreign.weight"),
        (("--weights", "flat.safetensors"), "x_embedder.proj.weight: expected 4 dimensions"),
        (("--weights", "future.safetensors"), "holds 'FutureDiffiT', expected one of"),
        (("--weights", "list.safetensors"), "metadata 'diffit': expected a JSON object, got '[1]'"),
        (("--weights", "text.safetensors"), "metadata 'diffit': expected a JSON object, got '{'"),
        (("--weights", "nan.safetensors"), "not finite: stem.weight"),
        (("--weights", "unnoted.safetensors"), "notes no preset"),
        (
            ("--weights", "unknown.safetensors"),
            "unknown.safetensors: notes a preset that is not known here, 'diffit_new'",
        ),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (
            ("--weights", "small.safetensors", "--preset", PRESET),
            "diffit_emoji_32 is 32 pixels, the file holds 12 pixels",
        ),
        (("--preset", PRESET, "--classes", "9"), "--classes: expected 0 to 8, 'none'"),
        (("--preset", PRESET, "--classes", "cats"), "got 'cats'"),
        (("--preset", PRESET, "--sampler", "ddpm"), "--sampler: expected edm for ImageDiffiT"),
        (("--preset", PRESET, "--sampler", "euler"), "invalid choice: 'euler'"),
        (("--preset", PRESET, "--vae", "x"), "--vae: only latent networks have a decoder"),
        (("--preset", PRESET, "--steps", "0"), "expected a number of at least 1, got '0'"),
        (("--preset", PRESET, "--steps", "1" + "0" * 20), "--steps: expected at most 10000 steps"),
        (("--preset", PRESET, "--seeds", "5-2"), "the range '5-2' ends before it begins"),
        (("--preset", PRESET, "--guidance", "a"), "expected a finite number, got 'a'"),
        (("--preset", PRESET, "--guidance", "nan"), "expected a finite number, got 'nan'"),
        (("--preset", PRESET, "--out", ""), "--out: expected a file or a folder, got ''"),
        (("--preset", PRESET, "--seeds", "a"), "expected numbers and ranges such as 0-63"),
        (("--preset", PRESET, "--device", "tpu"), "--device: tpu cannot be used here"),
        (("--preset", PRESET, "--guidance-interval", "0", "1"), "expected --guidance SCALE"),
        (
            ("--preset", PRESET, "--guidance", "2", "--guidance-interval", "5", "1"),
            "--guidance-interval: expected LOW of at most HIGH, got 5 1",
        ),
        (("--preset", "diffit_cifar10_32", "--guidance", "2"), "has no classes to guide by"),
        (("--preset", PRESET, "--out", "a.jpg"), "ends in .png or .npz"),
        (("--preset", PRESET, "--out", "no/such/a.png"), "there is no folder 'no/such'"),
        (("--preset", PRESET, "--out", "file/a.png"), "there is no folder 'file'"),
        (("--preset", PRESET, "--out", "file"), "--out: expected a folder, got 'file'"),
        (("--preset", "none", "--out", "/proc/a.png"), "--out: '/proc' cannot be written to: "),
        (("--preset", "none", "--out", "/proc/a"), "--out: '/proc' cannot be written to: "),
    ):
        given = arguments if "--out" in arguments else (*arguments, "--out", "a.png")
        assert message in fails("sample", *given), arguments
