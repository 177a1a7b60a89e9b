"""Files of networks: round trips, the published layout, the hub, and files that are wrong."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffit_kernels as dk
from diffit import files
from diffit.models import ImageDiffiT, LatentDiffiT, load_model, save_weights, weights
from tests.diffit.models.networks import image_inputs, latent_inputs, small_image, small_latent


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """As the published files are: the index of every layer, and nothing about the network."""
    state = small_latent().state_dict()
    index = dk.relative_position_index((3, 3))
    state |= {f"blocks.{i}.attn.relative_position_index": index.clone() for i in range(2)}
    save_file(state, tmp_path / "diffit_256.safetensors")
    return tmp_path / "diffit_256.safetensors"


def test_published_file(published: Path) -> None:
    network = LatentDiffiT.from_pretrained(published)
    assert not network.training
    assert torch.equal(network(*latent_inputs()), small_latent()(*latent_inputs()))
    other, preset = load_model(published)
    assert isinstance(other, LatentDiffiT)
    assert preset is None


def test_published_sizes_are_inferred() -> None:
    for size, learn_sigma in ((32, True), (64, False)):
        with torch.device("meta"):
            network = LatentDiffiT(size, learn_sigma=learn_sigma)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        config = weights.published_config(Path("file"), shapes)
        assert config == {
            "input_size": size,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 1152,
            "depth": 28,
            "num_heads": 16,
            "mlp_ratio": 4.0,
            "num_classes": 1000,
            "learn_sigma": learn_sigma,
        }


def test_files_are_mapped(published: Path) -> None:
    """The parameters are pages of the file; writing to them does not reach it."""
    before = published.read_bytes()
    network = LatentDiffiT.from_pretrained(published)
    assert str(published) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert published.read_bytes() == before


@pytest.mark.parametrize("make", [small_image, small_latent])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    """As a folder, as its file, and by whoever does not know the class."""
    network = make().to(dtype)
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads(json.dumps(network._hub_mixin_config))
    file = tmp_path / "model.safetensors"
    inputs = image_inputs if isinstance(network, ImageDiffiT) else latent_inputs
    expected = network(*inputs(dtype=dtype))
    for loaded in (
        type(network).from_pretrained(tmp_path),
        type(network).from_pretrained(str(file)),
        load_model(tmp_path)[0],
    ):
        assert next(loaded.parameters()).dtype == dtype
        assert torch.equal(loaded(*inputs(dtype=dtype)), expected)
        assert loaded._hub_mixin_config == config


def test_notes(tmp_path: Path) -> None:
    save_weights(small_image(), tmp_path / "a.safetensors", preset="diffit_emoji_32")
    assert load_model(tmp_path / "a.safetensors")[1] == "diffit_emoji_32"


def test_another_number_of_classes(published: Path) -> None:
    """Everything but the table of labels is kept, and a warning names it."""
    with pytest.warns(UserWarning, match=r"another number of classes.*y_embedder.embedding_table"):
        network = LatentDiffiT.from_pretrained(published, num_classes=7)
    before, after = small_latent().state_dict(), network.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name == "y_embedder.embedding_table.weight":
            assert tensor.shape == (8, 16)
            assert 0.01 < tensor.std() < 0.03
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("label_dim", "keys"), [(6, {"weight"}), (0, set())])
def test_another_number_of_classes_of_pictures(
    tmp_path: Path, label_dim: int, keys: set[str]
) -> None:
    small_image().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"time\.label\.weight"):
        network = ImageDiffiT.from_pretrained(tmp_path, label_dim=label_dim)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes.get("time.label.weight") == ((16, 6) if keys else None)


def test_no_warning_without_a_reason(published: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LatentDiffiT.from_pretrained(published, num_classes=5, class_dropout_prob=0.3)


def test_hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published repository holds two networks and no configuration."""
    asked: list[str] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append(filename)
        if filename == "model.safetensors":
            raise LocalEntryNotFoundError(filename)
        assert repo_id == "nvidia/DiffiT"
        return str(published)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    network = LatentDiffiT.from_pretrained("nvidia/DiffiT", revision="main")
    assert torch.equal(network(*latent_inputs()), small_latent()(*latent_inputs()))
    assert asked[-1] == "diffit_256.safetensors"
    with pytest.raises(ValueError, match="does not fit the network"):
        LatentDiffiT.from_pretrained("nvidia/DiffiT", input_size=64)
    assert asked[-1] == "diffit_512.safetensors"
    assert isinstance(load_model("nvidia/DiffiT")[0], LatentDiffiT)


def test_a_repository_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what was asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (LatentDiffiT.from_pretrained, load_model):
        with pytest.raises(OSError, match=r"^nvidia/DiffiT: no such file or folder, nor.*[^\n]$"):
            load("nvidia/DiffiT")


@pytest.mark.parametrize(
    "source", ["nowhere", "no/such/folder", "/folder", "./folder", "../a", "a/b.safetensors"]
)
def test_what_is_no_repository_is_not_asked_for(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "hf_hub_download", None)
    for load in (LatentDiffiT.from_pretrained, load_model):
        with pytest.raises(FileNotFoundError, match=f"^{Path(source)}: no such file or folder$"):
            load(source)


def test_cut_off(published: Path) -> None:
    content = published.read_bytes()
    for length in (0, 5, 500, len(content) - 1):
        published.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"diffit_256.*: not a whole safetensors file \(.*\)"):
            LatentDiffiT.from_pretrained(published)


def edited(published: Path, **changes: Tensor | None) -> Path:
    state = load_file(published)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, published)
    return published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__1__mlp__fc2__bias": None}, r"missing blocks\.1\.mlp\.fc2\.bias$"),
        ({"head__weight": torch.zeros(1)}, r"unknown head\.weight$"),
        (
            {"blocks__0__attn__proj__weight": torch.zeros(3, 16)},
            r"blocks\.0\.attn\.proj\.weight: expected \(16, 16\), got \(3, 16\)$",
        ),
        (
            {"blocks__0__attn__proj__bias": None, "x": torch.zeros(1)},
            r"missing blocks\.0\.attn\.proj\.bias; unknown x$",
        ),
        ({"pos_embed": None}, r"nor the published layout: missing pos_embed; it holds blocks"),
        ({f"{i}": torch.zeros(1) for i in range(5)}, r"unknown 0, 1, 2 and 2 more$"),
    ],
)
def test_keys_that_do_not_fit(published: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        LatentDiffiT.from_pretrained(edited(published, **changes))
    assert "\n" not in str(raised.value)


def test_foreign_files(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration of ImageDiffiT .* it holds blocks"):
        ImageDiffiT.from_pretrained(published)
    small_image().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds ImageDiffiT, not LatentDiffiT"):
        LatentDiffiT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        LatentDiffiT.from_pretrained(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load_model(tmp_path / "nothing.safetensors")


IMAGE = {"network": "ImageDiffiT"}


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"config": {}}, "metadata 'diffit': expected network beside config, got none"),
        ({"network": ["a"]}, r"metadata 'diffit': network: expected a name, got \['a'\]"),
        ({"config": [1]}, r"metadata 'diffit': config: expected an object, got \[1\]"),
        ({"preset": 3}, "metadata 'diffit': preset: expected a name, got 3"),
        (IMAGE | {"config": {"width": 2}}, "makes no ImageDiffiT: .*argument 'width'"),
        (IMAGE | {"config": {"channels": 3}}, "makes no ImageDiffiT: "),
        (IMAGE | {"config": {"channels": []}}, "makes no ImageDiffiT: "),
        (IMAGE | {"config": {"head_dim": 0}}, "makes no ImageDiffiT: "),
        (IMAGE | {"config": {"label_dim": 3}}, r"does not fit the network: missing "),
    ],
)
def test_odd_metadata(tmp_path: Path, note: dict[str, Any], message: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({}, file, {"diffit": json.dumps(note)})
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match=rf"^{file}: .*{message}"),
    ):
        load_model(file)


def test_not_finite() -> None:
    network = small_latent()
    weights.require_finite(network, "file")
    with torch.no_grad():
        network.blocks[1].mlp.fc1.weight[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"file: not finite: blocks\.1\.mlp\.fc1\.weight$"):
        weights.require_finite(network, "file")


def test_the_umask_is_followed(tmp_path: Path) -> None:
    """As of the files beside it, also where there was one with other rights."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            save_weights(small_image(), tmp_path / "a.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "a.safetensors"
    save_weights(small_image(), file)
    before = file.read_bytes()

    def fail(state: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_weights(small_image(), file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert file.read_bytes() == before
