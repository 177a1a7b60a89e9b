"""Fixtures: the command line on wrong input, weights for it, tiny presets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffit.cli import main
from diffit.models import PRESETS, save_weights
from tests.diffit.models.networks import small_image
from tests.diffit.training.tiny import TINY


@pytest.fixture
def fails(capsys: Any, tmp_path: Path, monkeypatch: Any) -> Callable[..., str]:
    """Runs a command that is wrong input; what it says. It leaves no file."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("diffit")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny conditional network for pictures of 32 x 32, that notes its preset."""
    network = small_image(img_resolution=32, label_dim=9, window_size=4)
    path = tmp_path / "tiny.safetensors"
    save_weights(network, path, preset="diffit_emoji_32")
    return path


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the others."""
    for name, preset in TINY.items():
        monkeypatch.setitem(PRESETS, name, preset)
