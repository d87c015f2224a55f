"""Which predictions find which instances, and the average precision that follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .ground_truth import Compared, best_first, by_group


@dataclass(frozen=True)
class Ranked:
    """Predictions by class, in a class by falling score. bounds (K+1,): where each class begins and the last one ends;
    instances (K,): how many instances a class has."""

    compared: Compared
    bounds: np.ndarray
    instances: np.ndarray

    @property
    def place(self) -> np.ndarray:
        """The rank of each prediction in its class (N,), from 0."""
        return np.arange(len(self.compared.label)) - self.bounds[self.compared.label]

    def classes(self) -> Iterator[tuple[int, slice, int]]:
        """Of each class its number, the slice of its predictions, and its instances."""
        for number, instances in enumerate(self.instances.tolist()):
            yield number, slice(self.bounds[number], self.bounds[number + 1]), instances

    def take(self, rows: np.ndarray) -> Ranked:
        """Some of these predictions, rows rising."""
        return Ranked(self.compared.take(rows), np.searchsorted(rows, self.bounds), self.instances)


def rank(compared: Compared) -> Ranked:
    """Of equal scores the last comes first."""
    order = best_first(compared.scores)
    by_class, bounds = by_group(compared.label[order], len(compared.truth.classes))
    instances = np.bincount(compared.truth.label, minlength=len(compared.truth.classes))
    return Ranked(compared.take(order[by_class]), bounds, instances)


def match(ranked: Ranked, tious: np.ndarray) -> np.ndarray:
    """Whether each prediction finds an instance (T,N), for tIoU thresholds (T,).

    Greedy, as in ActivityNet's evaluator: in the order of scores each takes the instance of its video and class with
    the largest tIoU, at or above the threshold, that none before it took; of equal tIoUs the last in the file. A
    segment or instance that ends before it starts has tIoU 0, and so have two without length (where the evaluator
    divides 0 by 0, and takes that for found).
    """
    from .detection_loops import match as loop

    found, truth = ranked.compared, ranked.compared.truth
    videos = len(truth.videos)
    order, offsets = by_group(truth.label * videos + truth.video, len(truth.classes) * videos)
    starts, ends = (np.ascontiguousarray(column) for column in truth.segments[order].T)
    rows = loop(found.starts, found.ends, found.label * videos + found.video, starts, ends, offsets, tious)
    return rows >= 0


def average_precision(hits: np.ndarray, instances: int, weight: float | None = None) -> np.ndarray:
    """Interpolated average precision (T,) of ranked predictions, hits (T,n), of a class with so many instances.

    The area under the precision that is reached at each recall or at a larger one, as in PASCAL VOC 2010 and later;
    0 without predictions. weight: the number of instances that recall is multiplied by in the normalized precision of
    Alwassel et al. and Hoiem et al.; None: precision as it is.
    """
    true = np.cumsum(hits, 1, dtype=np.float64)
    false = np.arange(1, hits.shape[1] + 1) - true
    true *= 1 if weight is None else weight / instances
    precision = true / (true + false)
    reached = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    return (reached * hits).sum(1) / instances
