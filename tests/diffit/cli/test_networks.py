"""The weights that come with the source tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffit.cli import main
from diffit.cli.networks import SHIPPED, find_network
from diffit.files import sha256_of
from diffit.models import create_model, save_weights
from tests.diffit.cli.test_sample import PRESET

PRESETS = (PRESET, "diffit_emoji_64")
FILE = SHIPPED / f"{PRESET}.safetensors"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shipped_file_is_small_and_found(preset: str) -> None:
    """Tensors in bfloat16, under 8 MB; names and shapes of the preset; run in float32."""
    file = SHIPPED / f"{preset}.safetensors"
    assert file.stat().st_size < 8e6
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    by_preset, by_file = find_network(preset, None), find_network(None, str(file))
    assert by_preset.weights == sha256_of(file)
    assert by_file.preset == preset
    assert {value.dtype for value in by_preset.network.parameters()} == {torch.float32}
    create_model(preset).load_state_dict(by_preset.network.state_dict(), strict=True)


def test_no_other_file_is_shipped() -> None:
    assert {path.stem for path in SHIPPED.glob("*.safetensors")} == set(PRESETS)


def test_weights_are_of_their_preset(tmp_path: Path) -> None:
    """Those of another are refused; without a note, or one that is not known, they need to fit."""
    for preset in ("diffit_cifar10_32", f"{PRESET}_time_bias"):
        with pytest.raises(
            ValueError,
            match=rf"^{FILE}: expected weights of preset {preset}, got those of {PRESET}$",
        ):
            find_network(preset, str(FILE))
    network = find_network(PRESET, str(FILE)).network
    for notes in ({}, {"preset": "diffit_new"}):
        save_weights(network, tmp_path / "a.safetensors", **notes)
        assert find_network(PRESET, str(tmp_path / "a.safetensors")).preset == PRESET


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shipped_network_draws(preset: str, tmp_path: Path, capsys: Any) -> None:
    """On white, as all pictures of the set are, with something on it; random weights are not."""
    out = tmp_path / "a.npz"
    command = ["sample", "--preset", preset, "--steps", "5", "--seeds", "0-1", "--out", str(out)]
    assert main(command) == 0
    assert "no weights" not in capsys.readouterr().out
    with np.load(out) as arrays:
        pictures = arrays["arr_0"].astype(float)
    for picture in pictures:
        assert np.median(np.concatenate([picture[0], picture[-1]])) > 200
        assert picture.std() > 20
    assert np.abs(pictures[0] - pictures[1]).mean() > 10
