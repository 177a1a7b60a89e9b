"""Attention maps while a network samples, with the time token and as they were without it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffit.diffusion import EDMDenoiser, GaussianDiffusion, ImageNoise, edm_sample
from diffit.models import DiffusionNetwork, ImageNetwork, LatentDiffiT
from diffit.nn import TMSA

Maps = dict[str, Tensor]  # by name of the layer: (B, windows, heads, M, M)


@dataclass
class Moment:
    """One evaluation of a network.

    Attributes:
        time: its second argument for the first picture: the noise label or the time step.
        pictures: its first argument, (B, C, H, W).
        with_time, without_time: attention probabilities of every layer, as they were, and of the
            same tokens without the token's part in q and k; the latter of layers with a token.
    """

    time: float
    pictures: Tensor
    with_time: Maps = field(default_factory=dict)
    without_time: Maps = field(default_factory=dict)


class AttentionRecorder:
    """Records the attention of all ``TMSA`` layers of a network.

    Recorded evaluations take the unfused path, with the same result.

    Args:
        network: any; its first two arguments are pictures and time.
        calls: which evaluations to record, from 0; None: all.

    Attributes:
        moments: what was recorded, in order.
    """

    def __init__(self, network: nn.Module, calls: Collection[int] | None = None) -> None:
        self.network = network
        self.layers = {name: m for name, m in network.named_modules() if isinstance(m, TMSA)}
        if not self.layers:
            raise ValueError(f"network: expected layers of TMSA, {type(network).__name__} has none")
        self.calls = calls
        self.moments: list[Moment] = []
        self._moment: Moment | None = None
        self._count = 0

    @contextmanager
    def recording(self) -> Iterator[AttentionRecorder]:
        """Record what runs inside the ``with`` block."""
        hook = self.network.register_forward_pre_hook(self._begin)
        for name, layer in self.layers.items():
            layer.forward = partial(self._forward, name, layer.forward)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            hook.remove()
            self._moment = None
            for layer in self.layers.values():
                del layer.forward

    def _begin(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._moment = None
        if self.calls is None or self._count in self.calls:
            pictures, time = arguments[:2]
            self._moment = Moment(float(time.flatten()[0]), pictures.detach().clone())
            self.moments.append(self._moment)
        self._count += 1

    def _forward(
        self,
        name: str,
        forward: Any,
        x: Tensor,
        temb: Tensor | None = None,
        *,
        row: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        if self._moment is None:
            return forward(x, temb, row=row, grid_size=grid_size)
        run = partial(forward, grid_size=grid_size, return_attention=True)
        out, probabilities = run(x, temb, row=row)
        self._moment.with_time[name] = probabilities.detach().unflatten(0, (len(x), -1))
        if temb is not None or row is not None:
            _, probabilities = run(x)
            self._moment.without_time[name] = probabilities.detach().unflatten(0, (len(x), -1))
        return out


def attention_received(
    probabilities: Tensor, grid: tuple[int, int], window: tuple[int, int], head: int | None = None
) -> NDArray[np.float64]:
    """How much each token is attended to, in units of uniform attention.

    The mean over the queries of its window of the probability that they give it, times their
    number: the mean over a window is 1.

    Args:
        probabilities: (windows, heads, M, M) of one picture.
        grid: height and width in tokens.
        window: height and width of a window.
        head: which; None: the mean of all.

    Returns:
        (H, W).
    """
    (height, width), (wh, ww) = grid, window
    p = probabilities.double()
    p = p.mean(dim=1) if head is None else p[:, head]
    received = p.mean(dim=1) * (wh * ww)  # (windows, M): keys
    tiles = received.reshape(height // wh, width // ww, wh, ww)
    return tiles.transpose(1, 2).reshape(height, width).cpu().numpy()


@torch.no_grad()
def record_sampling(
    network: DiffusionNetwork,
    *,
    seed: int = 0,
    label: int | None = None,
    steps: int = 18,
    moments: int = 4,
    sigma_data: float = 0.5,
) -> list[Moment]:
    """Sample one picture and record some evaluations on the way, evenly spread.

    Args:
        network: an image network (EDM's sampler) or a latent one (DDIM).
        seed: of the picture.
        label: its class; None: no class.
        steps: of the sampler.
        moments: how many evaluations to record; the first and the last are among them.
        sigma_data: of EDM's preconditioning.

    Raises:
        ValueError: an argument that does not fit, naming it.
    """
    if not 1 <= moments <= steps:
        raise ValueError(f"moments: expected 1..steps = {steps}, got {moments}")
    noise, classes = ImageNoise([seed]), torch.tensor([network.num_classes])
    if label is not None:
        if not 0 <= label < network.num_classes:
            raise ValueError(f"label: expected 0..{network.num_classes - 1}, got {label}")
        classes = torch.tensor([label])
    chosen = [round(i * (steps - 1) / max(moments - 1, 1)) for i in range(moments)]
    if isinstance(network, ImageNetwork):
        size, channels = network.img_resolution, network.img_channels
        recorder = AttentionRecorder(network, {2 * step for step in chosen})
        denoiser = EDMDenoiser(network, sigma_data)
        with recorder.recording():
            edm_sample(
                denoiser,
                noise.randn((1, channels, size, size), dtype=torch.float64),
                class_labels=classes if network.label_dim else None,
                num_steps=steps,
            )
        return recorder.moments
    assert isinstance(network, LatentDiffiT)
    shape = (1, network.in_channels, network.input_size, network.input_size)
    diffusion = GaussianDiffusion(learn_sigma=network.learn_sigma, respacing=steps)
    recorder = AttentionRecorder(network, chosen)
    dtype = next(network.parameters()).dtype
    with recorder.recording():
        diffusion.ddim_sample_loop(
            lambda x, t: network(x.to(dtype), t, classes), noise.randn(shape, dtype=torch.float64)
        )
    return recorder.moments
