"""How the networks of the presets are trained: the hyper-parameters of the paper as data.

What the paper leaves open is marked. Dropout, label dropout and the deviation of the data are part
of the presets (``diffit.models``); the distribution of the noise levels is the default of
``diffit.diffusion.edm_loss``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffit.models import get_preset


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Args:
        batch_size: images per step, over all processes.
        steps: of the optimiser.
        lr: learning rate of Adam, once it has ramped up.
        lr_ramp: images over which it rises from 0; 0: constant.
        ema_halflife: images after which a weight counts half in the average.
        ema_ramp: early, the half-life is at most this share of the images seen; None: never.
        ema_decay: per step, in place of a half-life.
        augment: probability of each geometric augmentation; 0: none.
        checkpoint_every, snapshot_every: steps.
    """

    batch_size: int
    steps: int
    lr: float
    lr_ramp: int = 0
    ema_halflife: float = 0.0
    ema_ramp: float | None = None
    ema_decay: float | None = None
    augment: float = 0.0
    checkpoint_every: int = 1_000
    snapshot_every: int = 10_000

    def lr_at(self, images: int) -> float:
        """The learning rate after so many images."""
        return self.lr * min(images / self.lr_ramp, 1.0) if self.lr_ramp else self.lr

    def ema_beta(self, images: int) -> float:
        """What the average keeps of itself in a step, after so many images (EDM, appendix F.2)."""
        if self.ema_decay is not None:
            return self.ema_decay
        halflife = self.ema_halflife
        if self.ema_ramp is not None:
            halflife = min(halflife, images * self.ema_ramp)
        return float(0.5 ** (self.batch_size / max(halflife, 1e-8)))


BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, everywhere

CIFAR10 = Recipe(
    batch_size=512,
    steps=200_000,
    lr=1e-3,
    lr_ramp=10_000_000,
    ema_halflife=500_000.0,
    ema_ramp=0.05,
    augment=0.12,
)
FFHQ = replace(CIFAR10, batch_size=256, lr=2e-4, augment=0.15)
# Ours, for 3,812 pictures.
EMOJI = replace(
    CIFAR10,
    batch_size=256,
    steps=3_000,
    lr_ramp=50_000,
    ema_halflife=50_000.0,
    augment=0.0,
    checkpoint_every=500,
    snapshot_every=500,
)
# Small steps: on a GPU that a step does not fill, their number counts.
EMOJI_64 = replace(EMOJI, batch_size=128, steps=6_000, lr_ramp=25_000)
# Their steps are those of the paper's comparison with DiT.
LATENT_256 = Recipe(batch_size=256, steps=1_000_000, lr=3e-4, ema_decay=0.9999)
LATENT_512 = replace(LATENT_256, batch_size=512, lr=1e-4)
RECIPES = (  # a preset's recipe is the first whose word is in its name
    ("cifar10", CIFAR10),
    ("ffhq", FFHQ),
    ("emoji_64", EMOJI_64),
    ("emoji", EMOJI),
    ("256", LATENT_256),
    ("512", LATENT_512),
)


def get_recipe(preset: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        ValueError: there is no such preset.
    """
    get_preset(preset)
    return next(recipe for word, recipe in RECIPES if word in preset)
