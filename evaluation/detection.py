"""Metrics of temporal action detection: mean average precision and average recall, as ActivityNet's evaluators define.

Heilbron et al., "ActivityNet", CVPR 2015; https://github.com/activitynet/ActivityNet, eval_detection.py and
eval_proposal.py. THUMOS14's results are given by the same definition of average precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .detection_errors import ErrorBreakdown, error_breakdown
from .ground_truth import (
    Counts,
    GroundTruthSource,
    best_first,
    by_group,
    compare,
    read_ground_truth,
    renumbered,
)
from .matching import average_precision, match, rank
from .proposals import ProposalSource, read_proposals
from .soft_nms import soft_nms, soft_nms_classes
from .tious import THUMOS14, check_tious, parse_tious

__all__ = [
    "AverageRecall", "DetectionResult", "ErrorBreakdown", "average_recall", "error_breakdown",
    "mean_average_precision", "parse_tious", "soft_nms", "soft_nms_classes",
]  # fmt: skip


@dataclass(frozen=True)
class DetectionResult:
    """ap (T,K): average precision by tIoU threshold and class, 0..1; map (T,): its mean over classes; average_map: the
    mean of that over the thresholds. instances, predictions (K,): how many of each class there are and were used."""

    subset: str
    tious: np.ndarray
    classes: tuple[str, ...]
    ap: np.ndarray
    map: np.ndarray
    average_map: float
    instances: np.ndarray
    predictions: np.ndarray
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        """As JSON values, by the names of the classes."""
        columns = (self.classes, self.instances.tolist(), self.predictions.tolist(), self.ap.T.tolist())
        return {
            "subset": self.subset, "tious": self.tious.tolist(), "map": self.map.tolist(),
            "average_map": self.average_map, "counts": self.counts._asdict(),
            "per_class": {
                name: {"instances": instances, "predictions": predictions, "ap": ap}
                for name, instances, predictions, ap in zip(*columns, strict=True)
            },
        }  # fmt: skip


@dataclass(frozen=True)
class AverageRecall:
    """recall (T,M): the share of instances found, by tIoU threshold and by number of proposals a video on average (M,);
    average (M,): its mean over the thresholds."""

    tious: np.ndarray
    numbers: np.ndarray
    recall: np.ndarray
    average: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: getattr(self, name).tolist() for name in ("numbers", "recall", "average")}


def mean_average_precision(
    ground_truth: GroundTruthSource, predictions: ProposalSource, tious: Sequence[float] | np.ndarray = THUMOS14,
    subset: str = "test",
) -> DetectionResult:  # fmt: skip
    """Interpolated average precision of each class of a subset at tIoU thresholds (T,), as ActivityNet's evaluator.

    ground_truth, predictions: JSON files of ground_truth.py and proposals.py, gzipped or not, or their values.
    Classes are those that the subset has instances of, in order of the first. Predictions of each class are assigned
    to instances in order of their scores, see matching.match().

    A class without predictions has AP 0, as has an empty prediction file. Ignored and counted are predictions of
    videos outside the subset (as in the original implementation's copy of the evaluator) and of other labels; those
    of the subset's videos without instances are false positives. A prediction that ends before it starts is a false
    positive, an instance that does is never found, and negative times are times like others.
    Raises UserError for files that are not JSON or not of their format, times and scores that are nan or infinite, a
    subset that is not there or has no instances, and thresholds outside (0, 1].
    """
    levels = check_tious(tious)
    compared = compare(ground_truth, predictions, subset)
    ranked = rank(compared)
    hits = match(ranked, levels)
    ap = np.stack([average_precision(hits[:, part], instances) for _, part, instances in ranked.classes()], 1)
    by_level = ap.mean(1)
    return DetectionResult(
        subset, levels, compared.truth.classes, ap, by_level, float(by_level.mean()), ranked.instances,
        np.diff(ranked.bounds), compared.counts,
    )  # fmt: skip


def average_recall(
    ground_truth: GroundTruthSource, predictions: ProposalSource, tious: Sequence[float] | np.ndarray = THUMOS14,
    numbers: Sequence[int] = (1, 10, 50, 100), subset: str = "test",
) -> AverageRecall:  # fmt: skip
    """Recall with N proposals a video on average, for each N of numbers (M,): ActivityNet's average recall.

    Of V videos with instances and P proposals of them, a video with n keeps the best int(n * N*V/P), so longer videos
    with more proposals keep more. An instance counts as found if any proposal kept of its video has tIoU with it at or
    above the threshold: labels do not matter, and one proposal may find several. This is what eval_proposal.py gives
    for max_avg_nr_proposals=N at the end of its curve; ActivityNet takes thresholds 0.5:0.95:0.05.
    Raises UserError as mean_average_precision(), and for numbers below 1.
    """
    from .detection_loops import best_overlaps

    levels, wanted = check_tious(tious), np.array(numbers, np.int64)
    if wanted.ndim != 1 or not len(wanted) or wanted.min() < 1:
        raise UserError(f"average recall is for 1 or more proposals a video, not {numbers!r}")
    truth, found = read_ground_truth(ground_truth, subset), read_proposals(predictions)
    annotated = np.unique(truth.video)
    video = renumbered(found.videos, tuple(truth.videos[number] for number in annotated))[found.video]
    rows = best_first(found.scores)
    rows = rows[video[rows] >= 0]
    order, offsets = by_group(video[rows], len(annotated))
    starts, ends = (np.ascontiguousarray(column) for column in found.segments[rows[order]].T)
    each = np.diff(offsets)[:, None]
    rising = np.sort(wanted)
    kept = np.minimum(each, (each * (rising * float(len(annotated)) / max(1, len(rows)))).astype(np.int64))
    true_starts, true_ends = (np.ascontiguousarray(column) for column in truth.segments.T)
    best = best_overlaps(true_starts, true_ends, np.searchsorted(annotated, truth.video), starts, ends, offsets, kept)
    recall = (best >= levels[:, None, None]).mean(1)[:, np.searchsorted(rising, wanted)]
    return AverageRecall(levels, wanted, recall, recall.mean(0))
