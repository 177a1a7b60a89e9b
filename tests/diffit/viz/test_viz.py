"""Recorded attention against the formula, and the pictures made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffit_kernels as dk
from diffit.cli import main
from diffit.models import save_weights
from diffit.nn import TMSA
from diffit.viz import AttentionRecorder, attention_received, bias_tables, record_sampling
from tests.diffit.models.networks import (
    image_inputs,
    latent_inputs,
    small_image,
    small_latent,
    stirred,
)


def test_maps_are_the_softmax() -> None:
    """Of one layer, in float64, with the token's part of q and k and without."""
    torch.manual_seed(0)
    layer = stirred(TMSA(16, 2, temb_dim=6, window_size=3)).double()

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            return self.layer(x, temb)

    x, temb = torch.randn(2, 9, 16).double(), torch.randn(2, 6).double()
    recorder = AttentionRecorder(Network())
    with recorder.recording():
        recorder.network(x, torch.tensor([3.0, 3.0]), temb)
    (moment,) = recorder.moments
    assert moment.time == 3
    table = layer.relative_position_bias_table
    bias = table[dk.relative_position_index((3, 3))].permute(2, 0, 1)
    for maps, token in (
        (moment.with_time, layer.qkv_temb(temb)[:, None]),
        (moment.without_time, 0),
    ):
        q, k, _ = (layer.qkv(x) + token).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        expected = (q @ k.mT / math.sqrt(8) + bias).softmax(-1)
        torch.testing.assert_close(maps["layer"][:, 0], expected)


@pytest.mark.parametrize(
    ("make", "inputs"), [(small_image, image_inputs), (small_latent, latent_inputs)]
)
def test_recording_changes_nothing(make: Any, inputs: Any) -> None:
    """The result is that of the fused path, and afterwards the layers are as they were."""
    network = make().double()
    args = tuple(t.double() if t.is_floating_point() else t for t in inputs())
    expected = network(*args)
    recorder = AttentionRecorder(network)
    with recorder.recording():
        got = network(*args)
    torch.testing.assert_close(got, expected)
    assert len(recorder.moments[0].with_time) == len(recorder.layers)
    assert recorder.moments[0].without_time.keys() == recorder.moments[0].with_time.keys()
    with pytest.raises(RuntimeError, match="stop"), recorder.recording():
        raise RuntimeError("stop")
    assert torch.equal(network(*args), expected)
    assert len(recorder.moments) == 1


def test_attention_received() -> None:
    """Two windows of 1 x 2 side by side: in the left one all attend to the second token."""
    probabilities = torch.zeros(2, 1, 2, 2)
    probabilities[0, 0, :, 1] = 1
    probabilities[1, 0] = 0.5
    assert attention_received(probabilities, (1, 4), (1, 2)).tolist() == [[0, 2, 1, 1]]
    heads = probabilities.repeat(1, 3, 1, 1)
    heads[0, 2] = torch.eye(2)
    assert attention_received(heads, (1, 4), (1, 2), head=2).tolist() == [[1, 1, 1, 1]]


def test_windows_lie_where_they_belong() -> None:
    """Each window attends to its first token alone."""
    probabilities = torch.zeros(4, 1, 4, 4)
    probabilities[..., 0] = 1
    received = attention_received(probabilities, (4, 4), (2, 2))
    assert np.argwhere(received == 4).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert received.sum() == 16


@pytest.mark.parametrize("make", [small_image, small_latent])
def test_moments_of_a_sample(make: Any) -> None:
    """From noise to the picture, evenly spread; rows of probabilities."""
    moments = record_sampling(make(), steps=7, moments=3, label=1)
    times = [moment.time for moment in moments]
    assert len(times) == 3
    assert times == sorted(times, reverse=True)
    for moment in moments:
        for maps in (*moment.with_time.values(), *moment.without_time.values()):
            torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    with pytest.raises(ValueError, match=r"moments: expected 1\.\.steps = 2, got 3"):
        record_sampling(make(), steps=2, moments=3)
    with pytest.raises(ValueError, match="label: expected"):
        record_sampling(make(), label=99)


def test_bias_tables() -> None:
    """The entry of the formula: index = (dy + wh - 1) (2 ww - 1) + dx + ww - 1."""
    layer = stirred(TMSA(16, 2, window_size=(2, 3)))
    (table,) = bias_tables(layer).values()
    assert table.shape == (2, 3, 5)
    rows = layer.relative_position_bias_table.detach().numpy()
    for dy in (-1, 0, 1):
        for dx in (-2, 0, 2):
            assert table[1, dy + 1, dx + 2] == rows[(dy + 1) * 5 + dx + 2, 1]


def test_a_network_without_tmsa() -> None:
    with pytest.raises(ValueError, match="network: expected layers of TMSA, Linear has none"):
        AttentionRecorder(torch.nn.Linear(2, 2))


def test_pictures(tmp_path: Path, capsys: Any) -> None:
    """One command, one PNG; from weights and for a latent network too."""
    save_weights(small_latent(), tmp_path / "l.safetensors", preset="diffit_s_2_256")
    weights = ["--weights", str(tmp_path / "l.safetensors"), "--steps", "3", "--moments", "2"]
    preset = ["--preset", "diffit_emoji_32", "--steps", "2", "--moments", "1", "--head", "0"]
    for arguments in (["attention", *weights], ["attention", *preset], ["bias", *preset]):
        assert main(["viz", *arguments, "--out", str(tmp_path / "a.png")]) == 0
        with Image.open(tmp_path / "a.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "l.safetensors"]
    assert "a.png: encoder.0.0.block.attn" in capsys.readouterr().out


def test_losses_of_runs(tmp_path: Path, capsys: Any) -> None:
    for name, steps in (("short", 3), ("long", 90)):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "images": 8 * i, "loss": 1 / i} for i in range(1, steps + 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "stats.jsonl").write_text(text + '{"step": 4, "lo')
    runs = ["--runs", *(str(tmp_path / name) for name in ("short", "long"))]
    out = tmp_path / "loss.png"
    assert main(["viz", "loss", *runs, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
    capsys.readouterr()
    out.unlink()
    odd = {
        "none": b'{"step": 1}',
        "list": b"[1]",
        "text": b'{"step": 1, "images": 8, "loss": "low"}',
        "binary": b"\x89PNG\r\n\x1a\n\0",
    }
    for name, content in odd.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "stats.jsonl").write_bytes(content)
    said = "stats.jsonl: line 1: expected an object with the numbers step, images, loss, got"
    for runs, message in (
        ([], "--runs: expected folders"),
        (["--runs", str(tmp_path)], "expected a stats.jsonl"),
        *((["--runs", str(tmp_path / name)], said) for name in odd),
    ):
        assert main(["viz", "loss", *runs, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_wrong_input(fails: Any) -> None:
    for arguments, message in (
        (("--out", "a.jpg"), "--out: expected a .png in a folder that exists, got 'a.jpg'"),
        (("--out", "no/a.png"), "--out: expected a .png in a folder that exists"),
        (("--out", "/proc/a.png"), "--out: '/proc' cannot be written to: "),
        (("--class", "99"), "--class: expected one of the 9 classes, got 99"),
        (("--class", "-1"), "--class: expected one of the 9 classes, got -1"),
        (("--steps", "2", "--moments", "3"), "--moments: expected at most --steps 2, got 3"),
        (("--moments", "0"), "--moments: expected a number of at least 1, got '0'"),
        (("--steps", "0"), "--steps: expected a number of at least 1, got '0'"),
    ):
        out = () if "--out" in arguments else ("--out", "a.png")
        given = ("--preset", "diffit_emoji_32", *arguments, *out)
        assert message in fails("viz", "attention", *given)


def test_wrong_layers_and_heads(tmp_path: Path, capsys: Any) -> None:
    save_weights(small_image(), tmp_path / "a.safetensors", preset="diffit_emoji_32")
    command = ["viz", "attention", "--weights", str(tmp_path / "a.safetensors")]
    for arguments, message in (
        (["--layers", "encoder.0.0.block"], "the nearest is 'encoder.0.0.block.attn'"),
        (["--head", "2"], "--head: expected 0..1, got 2"),
    ):
        assert main([*command, *arguments, "--out", str(tmp_path / "a.png")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
