"""What the networks share: checkpointing, starting anew, checks, files, EDM's protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffit.models.weights import Pretrained
from diffit.nn.block import DiffiTBlock
from diffit.nn.embeddings import NoiseEmbedder

TIME_EMBEDDINGS = ("sinusoidal", "fourier")


class DiffusionNetwork(Pretrained):
    """A network that can checkpoint its blocks, start anew, and be saved and loaded.

    Attributes:
        num_classes: classes, which is also the id that means no class.
    """

    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters a block, and compute the block again in the backward pass."""
        self.grad_checkpointing = enable

    def _run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            result: Any = checkpoint(block, *inputs, use_reentrant=False)
            return result
        return block(*inputs)

    def _reset_layers(self) -> None:
        """What each layer does by itself; also after ``to_empty``."""
        for layer in self.modules():
            reset = getattr(layer, "reset_parameters", None)
            if layer is not self and callable(reset):
                reset()


class ImageNetwork(DiffusionNetwork):
    """What the image-space networks share: the protocol of the inner network of EDM.

    A network makes its prediction from the picture and the time token in ``_predict``, and ends
    with the convolution ``head``.

    Args:
        img_resolution: height and width of the pictures.
        img_channels: their channels.
        label_dim: classes, 0: unconditional.
        augment_dim: width of EDM's augmentation label, 9, or 0: none.
        time_width: width of the embedding of the noise level.
        temb_dim: width of the time token.
        label_dropout: how often a label is dropped while training, for guidance.
        time_embedding: "sinusoidal" or "fourier".
    """

    LABEL_KEYS = ("time.label.weight", "time.label.bias")
    head: nn.Conv2d

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        augment_dim: int,
        *,
        time_width: int,
        temb_dim: int,
        label_dropout: float,
        time_embedding: str,
    ) -> None:
        super().__init__()
        require_choice("time_embedding", time_embedding, TIME_EMBEDDINGS)
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = self.num_classes = label_dim
        self.augment_dim = augment_dim
        self.time = NoiseEmbedder(
            time_width,
            temb_dim,
            label_dim=label_dim,
            augment_dim=augment_dim,
            label_dropout=label_dropout,
            fourier=time_embedding == "fourier",
        )

    def reset_parameters(self) -> None:
        """Start anew: PyTorch's defaults; the head and the ends of all branches are zero."""
        self._reset_layers()
        zero_(self.head)
        for block in self.modules():
            if isinstance(block, DiffiTBlock):
                zero_(block.attn.proj)
                zero_(block.mlp.fc2)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """``F(x; c_noise)`` of EDM's preconditioning.

        Args:
            x: (B, img_channels, img_resolution, img_resolution), the noisy picture times c_in, in
                the dtype of the parameters unless autocast is on.
            noise_labels: (B,), c_noise = ln(sigma) / 4.
            class_labels: (B, label_dim), one-hot; a row of zeros, or None: no class.
            augment_labels: (B, augment_dim); None: not augmented.

        Returns:
            (B, img_channels, img_resolution, img_resolution).

        Raises:
            ValueError, TypeError: an input that does not fit, naming it.
        """
        require_images(x, self.img_channels, self.img_resolution)
        if noise_labels.shape != x.shape[:1]:
            raise ValueError(
                f"noise_labels: expected ({x.shape[0]},), one for each of x, "
                f"got shape {tuple(noise_labels.shape)}"
            )
        for name, labels, width in (
            ("class_labels", class_labels, self.label_dim),
            ("augment_labels", augment_labels, self.augment_dim),
        ):
            if labels is not None and labels.shape != (x.shape[0], width):
                raise ValueError(
                    f"{name}: expected ({x.shape[0]}, {width}), got shape {tuple(labels.shape)}"
                )
        return self._predict(x, self.time(noise_labels, class_labels, augment_labels))

    def _predict(self, x: Tensor, temb: Tensor) -> Tensor:
        """x and result (B, img_channels, img_resolution, img_resolution), temb (B, temb_dim)."""
        raise NotImplementedError


def require_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of those known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def require_images(x: Tensor, channels: int, size: int) -> None:
    """Raise ValueError unless x is (B, channels, size, size)."""
    if x.dim() != 4 or x.shape[1:] != (channels, size, size):
        raise ValueError(f"x: expected (B, {channels}, {size}, {size}), got shape {tuple(x.shape)}")


def zero_(layer: nn.Module) -> None:
    """Set the parameters of a layer to zero, so that its branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
