"""How far generated pictures are from real ones, measured on features of a network."""

from diffit.evaluation.features import EffnetLite0, Features, Inception, create_extractor
from diffit.evaluation.measure import FeatureSet, Reference, measure
from diffit.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from diffit.evaluation.pictures import PictureSet
from diffit.evaluation.statistics import (
    Moments,
    StoredStatistics,
    read_statistics,
    write_statistics,
)

__all__ = [
    "EffnetLite0",
    "FeatureSet",
    "FeatureStatistics",
    "Features",
    "Inception",
    "Moments",
    "PictureSet",
    "Reference",
    "StoredStatistics",
    "create_extractor",
    "frechet_distance",
    "inception_score",
    "measure",
    "precision_recall",
    "read_statistics",
    "write_statistics",
]
