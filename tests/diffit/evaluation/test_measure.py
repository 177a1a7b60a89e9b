"""Metrics of sets of pictures, with a network whose features are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffit.evaluation import Features, FeatureSet, FeatureStatistics, Reference, measure
from diffit.evaluation.features import Extractor


class Means:
    """The mean of each channel; classes by the largest; the corners are the spatial features."""

    name, distance, dim, spatial_dim = "means", "fd_means", 3, 6
    package, weights = "none", "none"

    def __call__(self, images: Tensor) -> Features:
        pooled = images.float().mean(dim=(2, 3))
        corners = torch.cat([images[:, :, 0, 0], images[:, :, -1, -1]], dim=1).float()
        return Features(pooled, (pooled / 4).softmax(dim=1), corners)


class Pixels(Means):
    """Without spatial features: the first pixel alone, as float64 numbers say."""

    name, distance, spatial_dim = "pixels", "fd_pixels", 0

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __call__(self, images: Tensor) -> Features:
        chosen = self.features[images[:, 0, 0, 0].long()]
        return Features(chosen, chosen.softmax(dim=1))


def pictures(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 4, 5), generator=generator, dtype=torch.uint8)


def gathered(extractor: Extractor, images: Tensor, batch: int = 4) -> FeatureSet:
    return FeatureSet.of(extractor, images.split(batch), keep=True)


def reference(extractor: Extractor, images: Tensor) -> Reference:
    return gathered(extractor, images).reference()


def test_a_set_and_itself() -> None:
    """Distance 0 within rounding; every picture is covered."""
    images = pictures(21, 0)
    metrics = measure(Means(), gathered(Means(), images), reference(Means(), images))
    assert list(metrics) == [
        *("fd_means", "sfd_means", "precision_means", "recall_means"),
        *("is_means", "is_means_deviation"),
    ]
    spread = reference(Means(), images).statistics.pooled.covariance.trace().item()
    assert abs(metrics["fd_means"]) < 1e-12 * spread
    assert metrics["precision_means"] == metrics["recall_means"] == 1


def test_known_gaussians() -> None:
    """Features whose means and covariances are made exact: |mu|^2 + sum (s_a - s_b)^2."""
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T  # covariance 1
    a, b, mu = (torch.tensor(x).double() for x in ([1.0, 2, 3], [4.0, 2, 0.5], [1.0, -2, 0]))
    numbered = torch.zeros(64, 3, 1, 1, dtype=torch.uint8)
    numbered[:, 0, 0, 0] = torch.arange(64)
    first, second = Pixels(z * a), Pixels(z * b + mu)
    metrics = measure(first, gathered(second, numbered, 7), reference(first, numbered))
    assert metrics["fd_pixels"] == pytest.approx(5 + 9 + 0 + 6.25, rel=1e-12)
    assert "sfd_pixels" not in metrics


def test_processes_and_batches_change_nothing() -> None:
    """Five processes, the last of which has one picture less; and seven, some without any."""
    images, base = pictures(14, 2), reference(Means(), pictures(17, 3))
    whole = measure(Means(), gathered(Means(), images, 14), base)
    for size in (1, 5, 7, 16):
        parts = [gathered(Means(), images[rank::size], 2) for rank in range(size) if rank < 14]
        parts += [FeatureSet(Means()) for _ in range(size - len(parts))]
        merged = FeatureSet.merged(parts)
        assert torch.equal(torch.cat(merged.features), Means()(images).pooled)
        assert measure(Means(), merged, base) == pytest.approx(whole, rel=1e-12)


def test_only_moments() -> None:
    """What is not kept is not there; precision and recall need features."""
    images = pictures(12, 4)
    moments = FeatureSet.of(Means(), images.split(5), keep=False)
    assert moments.features == moments.probabilities == []
    metrics = measure(Means(), gathered(Means(), images), moments.reference())
    assert "precision_means" not in metrics
    assert metrics["fd_means"] == pytest.approx(0, abs=1e-9)


def test_sorted_by_class() -> None:
    """The score of a set in the order of its classes is that of the set."""
    images = torch.zeros(300, 3, 1, 1, dtype=torch.uint8)
    for channel in range(3):
        images[100 * channel : 100 * (channel + 1), channel] = 255
    metrics = measure(Means(), gathered(Means(), images, 300), reference(Means(), images))
    # Parts of 30: the share of a class in one of them is about a third.
    assert 2.8 < metrics["is_means"] <= 3


def test_not_finite() -> None:
    bad = Pixels(torch.full((1, 3), torch.nan))
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        gathered(bad, torch.zeros(2, 3, 1, 1, dtype=torch.uint8))


def test_statistics_are_those_of_the_features() -> None:
    images = pictures(9, 5)
    stored = gathered(Means(), images).reference().statistics
    expected = FeatureStatistics.of(Means()(images).pooled)
    assert torch.allclose(stored.pooled.covariance, expected.covariance, rtol=1e-12)
    assert stored.features == "means"
