"""From the features of two sets of pictures to the metrics between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffit.evaluation.features import Extractor
from diffit.evaluation.metrics import frechet_distance, inception_score, precision_recall
from diffit.evaluation.statistics import Moments, StoredStatistics

SPLITS = 10  # of the inception score


@dataclass(frozen=True)
class Reference:
    """What pictures are compared with.

    Attributes:
        statistics: of its features.
        features: (n, dim), of its pictures where there are any.
    """

    statistics: StoredStatistics
    features: Tensor | None = None


class FeatureSet:
    """What is gathered of the features of a set of pictures.

    Attributes:
        pooled: moments of the features that the Frechet distance is taken of.
        spatial: moments of those of guided-diffusion's sFID; None: the network has none.
        features: batches of the pooled features, empty where only moments are kept.
        probabilities: batches of the probabilities of classes, likewise.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.name = extractor.name
        self.pooled = Moments(extractor.dim)
        self.spatial = Moments(extractor.spatial_dim) if extractor.spatial_dim else None
        self.features: list[Tensor] = []
        self.probabilities: list[Tensor] = []

    @classmethod
    def of(cls, extractor: Extractor, batches: Iterable[Tensor], *, keep: bool) -> FeatureSet:
        """Of batches of pictures (B, 3, H, W), uint8.

        Args:
            keep: the features themselves, beside their moments.

        Raises:
            ValueError: features that are not finite.
        """
        found = cls(extractor)
        for images in batches:
            batch = extractor(images)
            found.pooled.add(batch.pooled)
            if found.spatial is not None and batch.spatial is not None:
                found.spatial.add(batch.spatial)
            if keep:
                found.features.append(batch.pooled.cpu())
                found.probabilities.append(batch.probabilities.cpu())
        return found

    @classmethod
    def merged(cls, parts: Sequence[FeatureSet]) -> FeatureSet:
        """The whole, of which part r of n holds the pictures r, r + n, r + 2n, ..."""
        whole = parts[0]
        for part in parts[1:]:
            whole.pooled.merge(part.pooled)
            if whole.spatial is not None and part.spatial is not None:
                whole.spatial.merge(part.spatial)
        whole.features = _interleaved([part.features for part in parts])
        whole.probabilities = _interleaved([part.probabilities for part in parts])
        return whole

    def reference(self) -> Reference:
        """To compare others with.

        Raises:
            ValueError: there are fewer than two.
        """
        spatial = None if self.spatial is None else self.spatial.statistics()
        return Reference(
            StoredStatistics(self.pooled.statistics(), spatial, self.name),
            torch.cat(self.features) if self.features else None,
        )


def measure(extractor: Extractor, samples: FeatureSet, reference: Reference) -> dict[str, float]:
    """The metrics, by name.

    The Frechet distance always; that of the spatial features where both sides have them;
    precision and recall where the reference has features; the inception score of the network's
    own classes. The score is taken over ten parts of the samples, shuffled: they may be sorted by
    class.

    Args:
        extractor: gave the features of both.
        samples: with its features kept.
        reference: from the same network.

    Raises:
        ValueError: features of another network, or too few.
    """
    ours, theirs = samples.reference().statistics, reference.statistics
    name = extractor.name
    found = {extractor.distance: frechet_distance(theirs.pooled, ours.pooled)}
    if ours.spatial is not None and theirs.spatial is not None:
        found[f"s{extractor.distance}"] = frechet_distance(theirs.spatial, ours.spatial)
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, torch.cat(samples.features))
        found |= {f"precision_{name}": precision, f"recall_{name}": recall}
    probabilities = torch.cat(samples.probabilities)
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))
    score, deviation = inception_score(probabilities[order], SPLITS)
    return found | {f"is_{name}": score, f"is_{name}_deviation": deviation}


def _interleaved(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    tensors = [torch.cat(list(part)) for part in parts if part]  # the last may have none
    if not tensors:
        return []
    whole = tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
    for rank, tensor in enumerate(tensors):
        whole[rank :: len(parts)] = tensor
    return [whole]
