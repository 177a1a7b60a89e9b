"""Distances between sets of features, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

CHUNK = 1024  # rows of a matrix of distances at a time


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (d,) and covariance (d, d) of features, float64; ``count`` of them, 0: not known."""

    mean: Tensor
    covariance: Tensor
    count: int = 0

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features (n, d), n at least 2; the covariance is the unbiased one."""
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(
                f"features: expected (n, d) with n of 2 and more, got {tuple(features.shape)}"
            )
        features = features.double()
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers")
        return cls(features.mean(dim=0), features.T.cov(), len(features))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))`` (Heusel et al. 2017, equation 6).

    A B is similar to A^(1/2) B A^(1/2), which is symmetric: the trace of its root is the sum of
    the roots of eigenvalues that rounding alone makes negative. No matrix is rooted that need not
    have a root.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"b: expected {len(a.mean)} features as in a, got {len(b.mean)}; "
            "the two come from different networks"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    # Of equal sets rounding alone may make it negative.
    return max(((a.mean - b.mean).square().sum() + trace).item(), 0.0)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision: the share of generated features inside the union of balls around the real ones, each
    as large as the distance to its k-th neighbour. Recall: the same with the roles exchanged.

    Args:
        real, generated: features (n, d) and (m, d), more than ``neighbours`` of each.
        neighbours: k.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or len(features) <= neighbours:
            raise ValueError(
                f"{name}: expected (n, d) with more than {neighbours} features, "
                f"got {tuple(features.shape)}"
            )
    real, generated = real.double(), generated.double()
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    radii = torch.cat(
        [  # the nearest to a point is the point itself
            torch.cdist(chunk, centres).kthvalue(neighbours + 1, dim=1).values
            for chunk in centres.split(CHUNK)
        ]
    )
    inside = [(torch.cdist(chunk, centres) <= radii).any(dim=1) for chunk in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """``exp(E KL(p(y|x) || p(y)))`` (Salimans et al. 2016): mean and deviation over splits.

    Args:
        probabilities: (n, classes), rows that sum to 1, in random order.
        splits: parts of equal size, to within one; the first rows form the first.
    """
    if probabilities.dim() != 2 or len(probabilities) < splits:
        raise ValueError(
            f"probabilities: expected (n, classes) with n of at least {splits}, "
            f"got {tuple(probabilities.shape)}"
        )
    scores = []
    for part in probabilities.double().tensor_split(splits):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(divergence.sum(dim=1).mean().exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()
