"""What is minimised: EDM's loss for image networks, IDDPM's hybrid loss for latent ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffit.diffusion import EDMDenoiser, GaussianDiffusion, edm_loss
from diffit.diffusion.edm import one_hot
from diffit.models import DiffusionNetwork, ImageNetwork, LatentDiffiT, Sampling
from diffit.training.batches import Batch

TIMESTEPS = 1000


class EDMObjective:
    """EDM's loss (``diffit.diffusion.edm_loss``).

    Attributes:
        module: what is trained, with the parameters of the network.
        scale: of the gradient. EDM minimises the sum over pixels, and so do we: Adam's eps sees
            its size. What is logged is the mean over pixels.
        timesteps, augmented, label_dropout: how batches are made.
    """

    timesteps: int | None = None

    def __init__(self, network: ImageNetwork, sampling: Sampling) -> None:
        self.module: nn.Module = EDMDenoiser(network, sampling.sigma_data)
        self.scale = float(network.img_channels * network.img_resolution**2)
        self.augmented = network.augment_dim > 0
        self.label_dropout = network.time.label_dropout
        network.time.label_dropout = 0.0  # labels are dropped by image, in the batch
        self._label_dim = network.label_dim
        self._sigma_data = sampling.sigma_data

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(B,), float32, of ``module`` as it is wrapped."""
        draws = iter((batch.level, batch.noise))
        labels = None if batch.labels is None else one_hot(batch.labels, self._label_dim)
        told: dict[str, Any] = {}
        if batch.augment_labels is not None:
            told["augment_labels"] = batch.augment_labels
        return edm_loss(
            model,
            batch.x,
            labels,
            sigma_data=self._sigma_data,
            randn_like=lambda _: next(draws),
            **told,
        )


class HybridObjective:
    """IDDPM's hybrid loss (``GaussianDiffusion.training_losses``); attributes as above."""

    timesteps: int | None = TIMESTEPS
    scale = 1.0
    augmented = False

    def __init__(self, network: LatentDiffiT) -> None:
        self.module: nn.Module = network
        self.label_dropout = network.y_embedder.dropout
        network.y_embedder.dropout = 0.0
        self._diffusion = GaussianDiffusion(TIMESTEPS, learn_sigma=network.learn_sigma)

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(B,), float32."""
        return self._diffusion.training_losses(
            lambda x, t: model(x, t, batch.labels), batch.x, batch.level, batch.noise
        ).loss


Objective = EDMObjective | HybridObjective


def objective_of(network: DiffusionNetwork, sampling: Sampling) -> Objective:
    """The one that fits the network."""
    if isinstance(network, ImageNetwork):
        return EDMObjective(network, sampling)
    assert isinstance(network, LatentDiffiT)
    return HybridObjective(network)
