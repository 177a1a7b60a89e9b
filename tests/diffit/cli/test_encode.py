"""``diffit data encode``: latents that training reads, the same whoever writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffit.cli import main
from diffit.data import encode as encoding
from diffit.data.dataset import ImageDataset
from diffit.data.latents import LatentDataset
from diffit.diffusion import ImageNoise
from diffit.models.vae import LatentCodec
from diffit.ranks import Ranks
from tests.diffit.models.test_vae import tiny
from tests.diffit.training.tiny import (
    CLASSES,
    IMAGE,
    LATENT,
    pictures,
)

pytestmark = pytest.mark.usefixtures("tiny_presets")

COUNT = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "set.zip", COUNT, size=32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny().save_pretrained(folder)
    return folder


def encode(images: Path, vae: Path, out: Path, *more: str, preset: str = LATENT) -> int:
    named = ["--preset", preset, "--vae", str(vae), "--out", str(out), "--device", "cpu"]
    return main(["data", "encode", str(images), *named, *more])


def test_latents_are_draws_from_the_posterior_by_index(
    images: Path, vae: Path, tmp_path: Path, capsys: Any
) -> None:
    assert encode(images, vae, tmp_path / "z", "--batch-size", "4") == 0
    assert f"the latents of {COUNT} pictures" in capsys.readouterr().out
    codec = LatentCodec.from_pretrained(vae)
    pixels = ImageDataset(images, resolution=32, num_classes=CLASSES)
    latents = LatentDataset(tmp_path / "z", shape=(4, 4, 4), num_classes=CLASSES)
    assert len(latents) == COUNT
    assert pixels.labels is not None
    assert latents.labels is not None
    assert latents.labels.equal(pixels.labels)
    for i in (0, 4, COUNT - 1):
        x = pixels.read(i)[None].float() / 127.5 - 1
        expected = codec.encode(x, ImageNoise([i]).randn_like)[0]
        torch.testing.assert_close(latents.read(i), expected.half().float())


def test_processes_and_interruptions_change_nothing(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 4)
    assert encode(images, vae, tmp_path / "one") == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert sorted(whole) == [f"{start:08d}.safetensors" for start in (0, 4, 8)]

    codec = LatentCodec.from_pretrained(vae)
    pixels = ImageDataset(images, resolution=32, num_classes=CLASSES)
    for rank in range(2):
        encoding.encode(
            pixels,
            tmp_path / "two",
            codec,
            vae=str(vae),
            device=torch.device("cpu"),
            batch_size=3,
            ranks=Ranks(rank, 2),
            advance=lambda _: None,
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == whole

    (tmp_path / "two" / "00000004.safetensors").unlink()
    assert encode(images, vae, tmp_path / "two") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == whole


def test_wrong_input_is_one_line(images: Path, vae: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(code: int) -> str:
        assert code == 2
        error = capsys.readouterr().err
        assert error.startswith("diffit data encode: ")
        assert error.count("\n") == 1
        return str(error)

    out = tmp_path / "z"
    assert "expected a latent network" in refused(encode(images, vae, out, preset=IMAGE))
    with pytest.raises(SystemExit, match="2"):
        encode(images, vae, out, "--batch-size", "0")
    assert "--batch-size: expected a number of at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "--out: expected a folder" in refused(encode(images, vae, tmp_path / "file"))
    assert "no such file" in refused(encode(tmp_path / "missing.zip", vae, out))
    assert "found no autoencoder" in refused(encode(images, tmp_path / "missing", out))
    small = pictures(tmp_path / "small.zip", 2, size=8)
    assert "expected 32 x 32" in refused(encode(small, vae, out))
    assert not list(out.iterdir())

    assert encode(images, vae, out) == 0
    capsys.readouterr()
    other = pictures(tmp_path / "other.zip", 2, size=32)
    assert "choose another --out" in refused(encode(other, vae, out))
    shard = out / "00000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    assert "not a whole shard" in refused(encode(images, vae, out))
