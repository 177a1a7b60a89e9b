"""A checkpoint is whole or not used; the newest, and the best, stay."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.files import sha256_of
from diffit.ranks import Ranks
from diffit.training import checkpoint
from diffit.training.checkpoint import Checkpoints


def state(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((3, 5), value), "n": torch.tensor([int(value), 2])}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Of steps 1, 2 and 3, the last two of which stay."""
    result = Checkpoints(tmp_path / "run", keep=2, ranks=Ranks())
    for step in (1, 2, 3):
        result.save(step, 1.0 / step, state(step))
    return result


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_comes_back(checkpoints: Checkpoints) -> None:
    found = state(0)
    assert checkpoints.load(found) == (3, [])
    assert all(found[name].equal(tensor) for name, tensor in state(3).items())
    assert names(checkpoints) == ["00000002", "00000003"]


def test_the_best_stays(checkpoints: Checkpoints) -> None:
    checkpoints.save(4, 0.1, state(4))
    for step in (5, 6, 7):
        checkpoints.save(step, 1.0, state(step))
    assert names(checkpoints) == ["00000004", "00000006", "00000007"]


def damage(folder: Path, how: str) -> str:
    data = next(folder.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        content[len(content) // 3] ^= 4
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    elif how == "index":
        (folder / ".metadata").write_bytes(b"")
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(how)
    return folder.name


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "bit", "missing", "index", "no manifest"),
        *('{"sha', "[]", "3", "{}", '{"sha256": 3}', '{"sha256": []}', '{"sha256": {}}'),
    ],
)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(
    checkpoints: Checkpoints, how: str
) -> None:
    damage(checkpoints.folder / "00000003", how)
    found = state(0)
    step, refused = checkpoints.load(found)
    assert step == 2
    assert len(refused) == 1
    assert refused[0].startswith(str(checkpoints.folder / "00000003"))
    assert all(found[name].equal(tensor) for name, tensor in state(2).items())
    checkpoints.save(3, 0.0, state(30))  # in its place
    assert checkpoints.load(found) == (3, [])
    assert found["a"].equal(state(30)["a"])


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"loss": null}', '{"loss": "low"}'])
def test_an_odd_manifest_of_an_old_one_is_no_obstacle(
    checkpoints: Checkpoints, manifest: str
) -> None:
    (checkpoints.folder / "00000002" / "manifest.json").write_text(manifest)
    checkpoints.save(4, 1.0, state(4))
    assert names(checkpoints) == ["00000003", "00000004"]


def test_none_whole_is_an_error(checkpoints: Checkpoints) -> None:
    for folder in checkpoints.folder.iterdir():
        damage(folder, "bit")
    with pytest.raises(ValueError, match=r"no whole checkpoint.*00000003.*00000002"):
        checkpoints.load(state(0))


def test_another_network_is_an_error(checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"00000003: does not fit this run"):
        checkpoints.load({**state(0), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"00000003: does not fit this run"):
        checkpoints.load({**state(0), "a": torch.zeros(3, 6)})


def test_what_a_killed_process_left_is_ignored_and_cleared(checkpoints: Checkpoints) -> None:
    left = checkpoints.folder / ".tmp-00000009"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.load(state(0))[0] == 3
    checkpoints.save(4, 1.0, state(4))
    assert not left.exists()


def test_a_failed_write_leaves_the_others(checkpoints: Checkpoints, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"\.tmp-00000004: could not be written: No space left"):
        checkpoints.save(4, 1.0, state(4))
    assert names(checkpoints) == ["00000002", "00000003"]
    assert checkpoints.load(state(0))[0] == 3


class Bad:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_an_index_cannot_run_code(checkpoints: Checkpoints, capsys: Any) -> None:
    folder = checkpoints.folder / "00000003"
    (folder / ".metadata").write_bytes(pickle.dumps(Bad()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][".metadata"] = sha256_of(folder / ".metadata")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    # PyTorch 2.11 keeps the reason to itself.
    with pytest.raises(ValueError, match=r"the index holds builtins.print|metadata is None"):
        checkpoints.load(state(0))
    assert "this must not run" not in capsys.readouterr().out
