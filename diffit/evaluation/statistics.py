"""Means and covariances gathered batch by batch, and the files they are kept in."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.evaluation.metrics import FeatureStatistics

ENTRIES = ("mu", "sigma", "mu_s", "sigma_s", "count", "features")  # the last two are ours


class Moments:
    """Count, mean (d,) and scatter ``sum (x - mean)(x - mean)^T`` (d, d) of features, float64.

    Parts merge without loss (Chan, Golub and LeVeque 1983, equations 2.1): with
    ``delta = mean_b - mean_a`` the scatter of both is
    ``S_a + S_b + delta delta^T n_a n_b / (n_a + n_b)``. Nothing large is subtracted from anything
    large, as it is in ``E x x^T - mean mean^T``.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in features (n, d), of any device and dtype.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features: expected (n, {len(self.mean)}), got {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers")
        if len(features) == 0:
            return
        features = features.to("cpu", torch.float64)
        part = Moments(0)
        part.count, part.mean = len(features), features.mean(dim=0)
        centred = features - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Take in what another has seen."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(delta, delta, alpha=self.count * other.count / count)
        self.mean += delta * (other.count / count)
        self.count = count

    def statistics(self) -> FeatureStatistics:
        """With the unbiased covariance.

        Raises:
            ValueError: there are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"features: expected at least 2, got {self.count}")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1), self.count)


@dataclass(frozen=True)
class StoredStatistics:
    """What a file of statistics holds.

    Attributes:
        pooled: of the features that the Frechet distance is taken of.
        spatial: of those of guided-diffusion's sFID, where the file has them.
        features: name of the network they come from, where the file says it.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: str | None = None


def holds(path: Path, entry: str) -> bool:
    """Whether this is an npz with that entry: "mu" of statistics, "arr_0" of pictures."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{entry}.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def read_statistics(path: Path) -> StoredStatistics:
    """From EDM's npz (``mu``, ``sigma``) or guided-diffusion's (``mu_s``, ``sigma_s`` as well).

    Raises:
        ValueError: something else.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ENTRIES if name in file}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole npz of numbers: {error}") from error
    return StoredStatistics(
        _statistics(path, arrays, "mu", "sigma"),
        _statistics(path, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None,
        str(arrays["features"]) if "features" in arrays else None,
    )


def write_statistics(file: BinaryIO, stored: StoredStatistics) -> None:
    """As an npz that ``read_statistics`` and EDM read; with spatial ones guided-diffusion too.

    Its evaluator wants the pictures as well, as ``arr_0``.
    """
    arrays: dict[str, Any] = {
        "mu": stored.pooled.mean.numpy(),
        "sigma": stored.pooled.covariance.numpy(),
        "count": np.int64(stored.pooled.count),
    }
    if stored.spatial is not None:
        arrays["mu_s"] = stored.spatial.mean.numpy()
        arrays["sigma_s"] = stored.spatial.covariance.numpy()
    if stored.features is not None:
        arrays["features"] = np.array(stored.features)
    np.savez(file, **arrays)


def _statistics(
    path: Path, arrays: Mapping[str, NDArray[Any]], mu: str, sigma: str
) -> FeatureStatistics:
    mean, covariance = arrays.get(mu, np.zeros(())), arrays.get(sigma, np.zeros(()))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: expected {mu} (d,) and {sigma} (d, d), got {mean.shape}, {covariance.shape}"
        )
    count = arrays.get("count", np.zeros((), np.int64))
    for name, array, kinds in (
        (mu, mean, "iuf"),
        (sigma, covariance, "iuf"),
        ("count", count, "iu"),
    ):
        if array.dtype.kind not in kinds:
            raise ValueError(f"{path}: {name}: expected numbers, got {array.dtype}")
    if count.shape:
        raise ValueError(f"{path}: count: expected one number, got {count.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mu}, {sigma}: expected finite numbers")
    return FeatureStatistics(
        torch.from_numpy(mean.astype(np.float64)),
        torch.from_numpy(covariance.astype(np.float64)),
        int(count),
    )
