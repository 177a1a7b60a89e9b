"""How far generated pictures are from real ones, measured on features of a network."""

from diffit.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

__all__ = ["FeatureStatistics", "frechet_distance", "inception_score", "precision_recall"]
