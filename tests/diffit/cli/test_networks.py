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

FILE = SHIPPED / f"{PRESET}.safetensors"


def test_the_shipped_file_is_small_and_found() -> None:
    """Tensors in bfloat16, under 8 MB; names and shapes of the preset; run in float32."""
    assert FILE.stat().st_size < 8e6
    assert {tensor.dtype for tensor in load_file(FILE).values()} == {torch.bfloat16}
    by_preset, by_file = find_network(PRESET, None), find_network(None, str(FILE))
    assert by_preset.weights == sha256_of(FILE)
    assert by_file.preset == PRESET
    assert {value.dtype for value in by_preset.network.parameters()} == {torch.float32}
    create_model(PRESET).load_state_dict(by_preset.network.state_dict(), strict=True)


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


def test_the_shipped_network_draws(tmp_path: Path, capsys: Any) -> None:
    """On white, as all pictures of the set are, with something on it; random weights are not."""
    out = tmp_path / "a.npz"
    command = ["sample", "--preset", PRESET, "--steps", "5", "--seeds", "0-1", "--out", str(out)]
    assert main(command) == 0
    assert "no weights" not in capsys.readouterr().out
    with np.load(out) as arrays:
        pictures = arrays["arr_0"].astype(float)
    for picture in pictures:
        assert np.median(np.concatenate([picture[0], picture[-1]])) > 200
        assert picture.std() > 20
    assert np.abs(pictures[0] - pictures[1]).mean() > 10
