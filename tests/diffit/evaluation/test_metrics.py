"""Distances against their closed forms, against torchmetrics, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image import fid

from diffit.evaluation import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def test_statistics() -> None:
    x = features(11, 3, 0)
    statistics = FeatureStatistics.of(x.float())
    x = x.float().double().numpy()
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(x, rowvar=False), rtol=1e-12)
    assert statistics.count == 11


def test_gaussians_on_a_line() -> None:
    """(mu_a - mu_b)^2 + (sigma_a - sigma_b)^2."""
    a = FeatureStatistics(torch.tensor([1.0]).double(), torch.tensor([[9.0]]).double())
    b = FeatureStatistics(torch.tensor([3.0]).double(), torch.tensor([[4.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(4 + 1, abs=1e-12)


def test_covariances_that_commute() -> None:
    """The sum over the axes, in any common basis."""
    basis, _ = torch.linalg.qr(features(6, 6, 1))
    spreads = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(6, dtype=torch.float64)
    a, b = (FeatureStatistics(zero, basis @ s.square().diag() @ basis.T) for s in spreads)
    expected = (spreads[0] - spreads[1]).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(7, 12), (300, 5), (200, 64)])
def test_equals_torchmetrics(n: int, d: int) -> None:
    """Fewer features than dimensions too: covariances without full rank."""
    a, b = (FeatureStatistics.of(features(n, d, seed, seed / 3)) for seed in (1, 2))
    expected = fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_of_a_set_to_itself() -> None:
    a = FeatureStatistics.of(features(40, 16, 3))
    assert 0 <= frechet_distance(a, a) < 1e-9 * a.covariance.trace().item()
    singular = FeatureStatistics.of(features(10, 64, 0))  # rounding alone would make it negative
    assert frechet_distance(singular, singular) == 0


def test_is_symmetric() -> None:
    a, b = (FeatureStatistics.of(features(50, 9, seed)) for seed in (4, 5))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_precision_and_recall_on_a_line() -> None:
    """Real points 0, 1, 2, 3 with first neighbours at distance 1; generated ones at 0.5, 9, 9.5."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [9.0], [9.5]])
    precision, recall = precision_recall(real, generated, neighbours=1)
    assert precision == pytest.approx(1 / 3)
    # The ball around 0.5 reaches 8.5 far, to 9: all real points are inside.
    assert recall == 1.0
    precision, recall = precision_recall(real, generated + 100, neighbours=1)
    assert (precision, recall) == (0.0, 0.0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = features(23, 3, 7), features(17, 3, 8)
    whole = precision_recall(real, generated)
    monkeypatch.setattr("diffit.evaluation.metrics.CHUNK", 5)
    assert precision_recall(real, generated) == whole


def test_inception_score() -> None:
    """1 where all rows are equal; the number of classes where each has its own."""
    assert inception_score(torch.full((20, 4), 0.25)) == (pytest.approx(1), pytest.approx(0))
    certain = torch.eye(4).repeat(10, 1)
    assert inception_score(certain)[0] == pytest.approx(4)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    mean = [0.55, 0.45]
    expected = math.exp(
        sum(x * math.log(x / m) for row in p.tolist() for x, m in zip(row, mean, strict=True)) / 2
    )
    assert inception_score(p, splits=1)[0] == pytest.approx(expected, rel=1e-6)


def test_wrong_inputs() -> None:
    x = features(5, 3, 9)
    with pytest.raises(ValueError, match=r"features: expected \(n, d\) with n of 2 and more"):
        FeatureStatistics.of(x[:1])
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        FeatureStatistics.of(x / 0)
    with pytest.raises(ValueError, match="b: expected 3 features as in a, got 2"):
        frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(x[:, :2]))
    with pytest.raises(ValueError, match=r"generated: expected .* more than 3 features"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"probabilities: expected .* at least 10, got \(5, 3\)"):
        inception_score(x)
