"""Classifier-free guidance: its weight as a function of time, and a network guided by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from diffit.diffusion.edm import check_class_ids, one_hot

TOLERANCE = 1e-3
NUM_TIMESTEPS = 1000


class Guidance(Protocol):
    """When and where to guide: ``out = out_0 + w(t) (out_y - out_0)`` on the first channels."""

    @property
    def channels(self) -> int | Literal["all"]:
        """How many channels of the picture or its noise are guided; the rest are conditional."""

    def weight(self, t: Tensor) -> Tensor:
        """w at times t, which are what the guided callable gets: time steps or sigmas."""


@dataclass(frozen=True)
class ConstantGuidance:
    """``w = scale`` at all times.

    Args:
        scale: 1 is no guidance.
        channels: how many are guided. The published networks guide 3, of 4 latent channels; of a
            picture these are all.
    """

    scale: float
    channels: int | Literal["all"] = 3

    def weight(self, t: Tensor) -> Tensor:
        """(B,) -> (B,), float64."""
        return torch.full_like(t, self.scale, dtype=torch.float64)


@dataclass(frozen=True)
class PowerCosineGuidance:
    """``w(t) = 1 + (scale - 1) (1 - cos(pi (1 - t / 1000)^power)) / 2``, t the time step.

    From 1 in pure noise to scale at the end: the schedule of the published 256-pixel network,
    after Gao et al. 2023 (MDT).

    Args:
        scale: w at t = 0.
        power: larger delays guidance.
        channels: see ``ConstantGuidance``.
    """

    scale: float
    power: float = 4.0
    channels: int | Literal["all"] = 3

    def weight(self, t: Tensor) -> Tensor:
        """(B,) time steps 0..1000 -> (B,), float64."""
        progress = (1 - t.double() / NUM_TIMESTEPS) ** self.power
        return 1 + (self.scale - 1) * torch.sin(math.pi / 2 * progress) ** 2


@dataclass(frozen=True)
class IntervalGuidance:
    """``w = scale`` where low <= t <= high, and 1 outside (Kynkäänniemi et al. 2024).

    Args:
        scale: w inside.
        low, high: time steps, or sigmas for an EDM denoiser.
        channels: see ``ConstantGuidance``.
    """

    scale: float
    low: float
    high: float
    channels: int | Literal["all"] = 3

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low: expected at most high = {self.high}, got {self.low}")

    def weight(self, t: Tensor) -> Tensor:
        """(B,) -> (B,), float64."""
        t = t.double()
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.scale, 1.0).double()


class Guided:
    """A network with its labels bound, guided: ``guided(x, t)``. Made by ``guided``.

    All other attributes are the network's.

    Attributes:
        evaluations: how many samples the network has evaluated.
        saved: how many unconditional ones it has not, because w was 1 there.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        labels: Tensor,
        null: Tensor,
        guidance: Guidance,
        tolerance: float,
    ) -> None:
        self.model = model
        self.guidance = guidance
        self.tolerance = tolerance
        self.evaluations = 0
        self.saved = 0
        self._labels = labels
        self._null = null  # one label

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet, while this is unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, ...), t (B,) -> what the network gives, guided; in float32 if it was narrower."""
        batch = len(x)
        if len(self._labels) != batch:
            raise ValueError(
                f"x: expected {len(self._labels)} images, one for each of class_labels, got {batch}"
            )
        labels = self._labels = self._labels.to(x.device)
        weight = self.guidance.weight(t)
        rows = ((weight - 1).abs() > self.tolerance).nonzero().flatten()  # to be guided
        self.evaluations += batch + len(rows)
        self.saved += batch - len(rows)
        if not len(rows):
            return self.model(x, t, labels)
        null = self._null.to(x.device).expand(len(rows), *labels.shape[1:])
        out = self.model(
            torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), torch.cat([labels, null])
        )
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        out, unconditional = out.split([batch, len(rows)])
        channels = self.guidance.channels
        picture = x.shape[1]  # channels beyond are variances
        k = picture if channels == "all" else min(channels, picture)
        w = weight[rows].to(out.dtype).view(-1, *[1] * (x.dim() - 1))
        out, base = out.clone(), unconditional[:, :k]
        out[rows, :k] = base + w * (out[rows, :k] - base)
        return out


def guided(
    model: Callable[..., Tensor],
    class_labels: Tensor,
    guidance: Guidance,
    *,
    tolerance: float = TOLERANCE,
) -> Guided:
    """Bind labels and guidance, so that a sampler can call ``model(x, t)``.

    Both halves are evaluated in one batch; where ``|w - 1| <= tolerance`` the unconditional half is
    not. What this changes is at most tolerance times the difference of the halves.

    Args:
        model: ``model(x, t, y)`` with ``num_classes`` (``LatentDiffiT``), or ``model(x, sigma,
            class_labels)`` with ``label_dim`` (``EDMDenoiser``).
        class_labels: (B,), integers 0..num_classes - 1, or num_classes for no class; for a denoiser
            also (B, label_dim) one-hot.
        guidance: for example ``ConstantGuidance(1.5)``.
        tolerance: see above.

    Raises:
        ValueError, TypeError: labels that do not fit, a network without classes, or guidance by
            time step for a denoiser, whose time is sigma.
    """
    channels = guidance.channels
    if channels != "all" and channels < 1:
        raise ValueError(f"channels: expected a positive number or 'all', got {channels!r}")
    if not hasattr(model, "label_dim"):
        num_classes = int(model.num_classes)  # type: ignore[attr-defined]
        if class_labels.dim() != 1:
            raise ValueError(
                f"class_labels: expected (B,), integers, got shape {tuple(class_labels.shape)}"
            )
        check_class_ids(class_labels, num_classes)
        null = torch.tensor([num_classes], dtype=torch.int64)
        return Guided(model, class_labels.long(), null, guidance, tolerance)
    if not model.label_dim:
        raise ValueError("model: expected a network with classes to guide by, got label_dim = 0")
    if isinstance(guidance, PowerCosineGuidance):
        raise ValueError(
            "guidance: PowerCosineGuidance is a function of the time steps 0..999, and this "
            "denoiser's time is sigma: use ConstantGuidance or IntervalGuidance"
        )
    labels = one_hot(class_labels, model.label_dim)
    return Guided(model, labels, labels.new_zeros(1, model.label_dim), guidance, tolerance)
