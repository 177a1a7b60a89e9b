"""The recipes hold the paper's numbers, and their schedules are EDM's formulas."""

from __future__ import annotations

import pytest

from diffit.models import list_models
from diffit.training import get_recipe


@pytest.mark.parametrize(
    ("preset", "batch", "lr", "augment"),
    [
        ("diffit_cifar10_32", 512, 1e-3, 0.12),
        ("diffit_cifar10_32_tokens_512_512", 512, 1e-3, 0.12),
        ("diffit_ffhq_64_small", 256, 2e-4, 0.15),
        ("diffit_ffhq_64_tokens_256_256", 256, 2e-4, 0.15),
        ("diffit_xl_2_256", 256, 3e-4, 0.0),
        ("diffit_xl_2_512", 512, 1e-4, 0.0),
    ],
)
def test_the_paper_s_numbers(preset: str, batch: int, lr: float, augment: float) -> None:
    recipe = get_recipe(preset)
    assert (recipe.batch_size, recipe.lr, recipe.augment) == (batch, lr, augment)


def test_the_first_word_that_fits_decides() -> None:
    assert get_recipe("diffit_emoji_32_time_mlp").batch_size == 256
    assert get_recipe("diffit_emoji_64").batch_size == 128


def test_every_preset_has_a_recipe() -> None:
    assert all(get_recipe(name).steps > 0 for name in list_models())
    with pytest.raises(ValueError, match="nearest"):
        get_recipe("diffit_cifar10")


def test_schedules() -> None:
    cifar10 = get_recipe("diffit_cifar10_32")
    assert cifar10.lr_at(0) == 0
    assert cifar10.lr_at(2_500_000) == pytest.approx(2.5e-4)
    assert cifar10.lr_at(99_000_000) == 1e-3
    # The half-life: 0.5 Mimg, early 5 % of the images seen.
    assert cifar10.ema_beta(0) == 0
    assert cifar10.ema_beta(1_000_000) == pytest.approx(0.5 ** (512 / 50_000))
    assert cifar10.ema_beta(50_000_000) == pytest.approx(0.5 ** (512 / 500_000))
    latent = get_recipe("diffit_xl_2_256")
    assert latent.lr_at(0) == 3e-4
    assert latent.ema_beta(0) == latent.ema_beta(10**9) == 0.9999
