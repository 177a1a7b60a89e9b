"""Moments by batches are those of the whole; files keep statistics in both formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffit.evaluation import (
    FeatureStatistics,
    Moments,
    StoredStatistics,
    read_statistics,
    write_statistics,
)
from diffit.evaluation.statistics import holds


def features(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator)


def moments(parts: list[Tensor], d: int) -> Moments:
    gathered = Moments(d)
    for part in parts:
        gathered.add(part)
    return gathered


def assert_same(got: FeatureStatistics, expected: FeatureStatistics, scale: float = 1) -> None:
    """Within rounding of numbers as large as the features."""
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-14, atol=1e-14 * scale)
    atol = 1e-14 * expected.covariance.diagonal().max().item()
    np.testing.assert_allclose(got.covariance, expected.covariance, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (0, 3, 1, 2, 0, 1), (1,) * 7])
def test_batches_are_the_whole(sizes: tuple[int, ...]) -> None:
    x = features(7, 5)
    assert_same(moments(list(x.split(sizes)), 5).statistics(), FeatureStatistics.of(x))


def test_parts_merge() -> None:
    """Also with one that has seen nothing; 33 features of 8 kinds in three parts."""
    x = features(33, 8)
    whole = Moments(8)
    for part in (x[0::3], x[1::3], x[:0], x[2::3]):
        whole.merge(moments([part], 8))
    assert_same(whole.statistics(), FeatureStatistics.of(x))


def test_far_from_the_origin() -> None:
    """A mean of 1e8 and a spread of 1: sums of squares would have lost the spread."""
    x = features(64, 3).double() + 1e8
    got = moments(list(x.split(5)), 3).statistics()
    expected = FeatureStatistics.of(x - 1e8)
    # x - 1e8 is exact, and x is known to 1e8 x 1e-16.
    np.testing.assert_allclose(got.covariance, expected.covariance, rtol=1e-6)
    np.testing.assert_allclose(got.mean - 1e8, expected.mean, atol=1e-7)


def test_bfloat16() -> None:
    """The sums are float64 whatever the features are."""
    x = features(40, 4).bfloat16()
    assert_same(moments([x], 4).statistics(), FeatureStatistics.of(x))


def test_wrong_features() -> None:
    gathered = Moments(3)
    with pytest.raises(ValueError, match=r"features: expected \(n, 3\), got \(2, 4\)"):
        gathered.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        gathered.add(torch.full((2, 3), torch.nan))
    gathered.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="features: expected at least 2, got 1"):
        gathered.statistics()


def written(path: Path, stored: StoredStatistics) -> Path:
    with path.open("wb") as file:
        write_statistics(file, stored)
    return path


def same(a: FeatureStatistics, b: FeatureStatistics) -> bool:
    return bool(
        torch.equal(a.mean, b.mean)
        and torch.equal(a.covariance, b.covariance)
        and a.count == b.count
    )


def test_round_trip(tmp_path: Path) -> None:
    """Every bit, with and without spatial features and a name."""
    pooled, spatial = (FeatureStatistics.of(features(20, d)) for d in (4, 6))
    full = read_statistics(
        written(tmp_path / "a.npz", StoredStatistics(pooled, spatial, "inception"))
    )
    assert full.spatial is not None
    assert same(full.pooled, pooled)
    assert same(full.spatial, spatial)
    assert full.features == "inception"
    bare = read_statistics(written(tmp_path / "b.npz", StoredStatistics(pooled)))
    assert same(bare.pooled, pooled)
    assert bare.spatial is None
    assert bare.features is None


def test_entries_of_the_formats(tmp_path: Path) -> None:
    """EDM reads mu and sigma; guided-diffusion mu_s and sigma_s as well, where there is mu."""
    pooled, spatial = (FeatureStatistics.of(features(20, d)) for d in (4, 6))
    path = written(tmp_path / "a.npz", StoredStatistics(pooled, spatial))
    with np.load(path) as arrays:
        for name, expected in (
            ("mu", pooled.mean),
            ("sigma", pooled.covariance),
            ("mu_s", spatial.mean),
            ("sigma_s", spatial.covariance),
        ):
            assert arrays[name].dtype == np.float64
            assert np.array_equal(arrays[name], expected)


def test_foreign_files(tmp_path: Path) -> None:
    """EDM's, of float64 alone, and a reference batch of guided-diffusion, with pictures."""
    mu, sigma = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(
        tmp_path / "batch.npz",
        arr_0=pictures,
        mu=mu.astype(np.float32),
        sigma=sigma,
        mu_s=np.ones(2),
        sigma_s=2 * np.eye(2),
    )
    edm = read_statistics(tmp_path / "edm.npz")
    assert torch.equal(edm.pooled.mean, torch.arange(3.0, dtype=torch.float64))
    assert edm.pooled.count == 0
    batch = read_statistics(tmp_path / "batch.npz")
    assert batch.spatial is not None
    assert torch.equal(batch.pooled.mean, edm.pooled.mean)
    assert torch.equal(batch.spatial.covariance, 2 * torch.eye(2, dtype=torch.float64))
    assert holds(tmp_path / "batch.npz", "arr_0")
    assert holds(tmp_path / "batch.npz", "mu")
    assert not holds(tmp_path / "edm.npz", "arr_0")
    assert not holds(tmp_path / "nowhere.npz", "mu")
    broken = (tmp_path / "edm.npz").read_bytes().replace(b"PK\1\2", b"PK\1\1")
    (tmp_path / "broken.npz").write_bytes(broken)
    assert not holds(tmp_path / "broken.npz", "mu")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"expected mu \(d,\) and sigma \(d, d\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"got \(3,\), \(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "expected finite numbers"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros((2, 2)), "sigma_s": 0},
            r"expected mu_s \(d,\) and sigma_s \(d, d\)",
        ),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "mu: expected numbers, got <U1"),
        ({"mu": np.zeros(1), "sigma": np.array([["a"]])}, "sigma: expected numbers, got <U1"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": "a"}, "count: expected numbers, got <U1"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": [1, 2]}, "count: expected one number"),
        (
            {"mu": np.array([None]), "sigma": np.eye(1)},
            "not a whole npz of numbers: .*allow_pickle",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        read_statistics(tmp_path / "a.npz")
    assert "a.npz: " in str(raised.value)
