"""Metrics of recognition: accuracy, likelihood and calibration of class scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import UserError

REMEDY_NOT_FINITE = "the weights have diverged, or overflow in this precision: try --precision fp32"
BINS = 15  # of the reliability diagram, as in Guo et al.
SHOWN = ("top1", "top5", "mean_class_accuracy", "ece", "loss")  # what is averaged over several splits


class Bin(NamedTuple):
    """The videos with a confidence in (low, high], their mean confidence and accuracy; nan where there are none."""

    low: float
    high: float
    videos: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class RecognitionResult:
    """Scores (V,K) and labels (V,) of V videos with their index rows, and what follows from them. Shares are 0..1.

    rank: (V,) place of the true class among a video's scores, 1 is best. loss: mean negative log-likelihood in nats.
    confusion: (K,K) videos by true and by best class, the first one of several that are best alike.
    ece: expected calibration error, from the bins of `reliability`. logits: (V,T',K) float32, means over a video's
    views, where they were kept.
    """

    rows: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rank: np.ndarray
    top1: float
    top5: float
    mean_class: float
    loss: float
    ece: float
    reliability: tuple[Bin, ...]
    confusion: np.ndarray
    logits: np.ndarray | None = None

    def per_class(self) -> np.ndarray:
        """Top-1 accuracy of each class (K,), of which mean_class is the mean; nan for a class without a video."""
        return _class_accuracy(self.labels, self.rank, self.scores.shape[1])


class NotFinite(UserError):
    """Scores that are nan or infinite."""


def score(
    rows: np.ndarray, scores: np.ndarray, labels: np.ndarray, keys: Sequence[str] | pa.ChunkedArray | None = None
) -> RecognitionResult:
    """Metrics of scores (V,K), not negative, against labels (V,). Ties count against the video: its rank is the worst
    it could be.

    Probabilities are the scores divided by their sum, as scores may be sums over time steps. keys: names of the V
    videos, for what is raised. Raises UserError for no videos, labels outside 0..K-1, and scores that are not finite,
    negative or all zero.
    """
    _refuse(rows, scores, labels, keys)
    classes = scores.shape[1]
    own = scores[np.arange(len(labels)), labels]
    rank = (scores >= own[:, None]).sum(1)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    sums = scores.sum(1)
    bins = reliability(scores.max(1) / sums, rank == 1)
    return RecognitionResult(
        rows, scores, labels, rank,
        top1=float((rank == 1).mean()), top5=float((rank <= min(5, classes)).mean()),
        mean_class=float(np.nanmean(_class_accuracy(labels, rank, classes))),
        loss=float(-np.log(np.clip(own / sums, 1e-12, None)).mean()),
        ece=calibration_error(bins), reliability=bins, confusion=confusion,
    )  # fmt: skip


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """Confidences (V,) in 0..1 and whether each prediction is right (V,), in bins of equal width.

    A confidence on an edge belongs to the bin below. Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural
    Networks", ICML 2017.
    """
    edges = np.arange(bins + 1) / bins
    where = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(where, confidence, bins) / count
        accuracy = np.bincount(where, right, bins) / count
    columns = (edges[:-1], edges[1:], count, mean, accuracy)
    return tuple(Bin(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean of |accuracy - confidence| over the bins, weighted by their videos."""
    filled = [entry for entry in bins if entry.videos]
    gaps = sum(entry.videos * abs(entry.accuracy - entry.confidence) for entry in filled)
    return gaps / sum(entry.videos for entry in filled)


def paired_difference(right: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
    """How much higher the accuracy of `right` (V,) is than that of `other` (V,) on the same videos, and the standard
    error of that difference: the paired one, which knows that both find the same videos hard. None for one video."""
    difference = right.astype(float) - other
    if len(difference) < 2:
        return float(difference.mean()), None
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def to_json(result: RecognitionResult, classes: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """The metrics as JSON values, with the classes' names, after what `about` says."""
    per_class = {
        name: {"videos": int(total), "top1": _number(value)}
        for name, total, value in zip(classes, result.confusion.sum(1), result.per_class(), strict=True)
    }
    bins = [
        {**entry._asdict(), "confidence": _number(entry.confidence), "accuracy": _number(entry.accuracy)}
        for entry in result.reliability
    ]
    return {
        **about,
        "videos": len(result.rows), "top1": result.top1, "top5": result.top5,
        "mean_class_accuracy": result.mean_class, "loss": result.loss, "ece": result.ece, "reliability": bins,
        "per_class": per_class, "classes": list(classes), "confusion": result.confusion.tolist(),
    }  # fmt: skip


def summary(results: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation (n - 1) over splits of the metrics in SHOWN; two splits or more."""
    columns = {name: np.array([values[name] for values in results]) for name in SHOWN}
    return (
        {name: float(column.mean()) for name, column in columns.items()},
        {name: float(column.std(ddof=1)) for name, column in columns.items()},
    )


def _refuse(rows: np.ndarray, scores: np.ndarray, labels: np.ndarray, keys: Sequence | pa.ChunkedArray | None) -> None:
    def named(number: int) -> str:
        if keys is None:
            return f"that of row {rows[number]}"
        key = keys[int(number)]
        return key.as_py() if isinstance(key, pa.Scalar) else key

    if not len(labels):
        raise UserError("there are no videos to score")
    classes = scores.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise UserError(
            f"{len(outside)} of {len(labels)} videos have labels outside 0..{classes - 1}, the first is "
            f"{named(outside[0])} with {labels[outside[0]]}; evaluate on videos that have one of the classes each"
        )
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise NotFinite(
            f"{len(bad)} of {len(labels)} videos have scores that are nan or infinite, the first is {named(bad[0])}; "
            f"{REMEDY_NOT_FINITE}"
        )
    bad = np.flatnonzero((scores < 0).any(1) | (scores.sum(1) <= 0))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(labels)} videos have scores that are negative or all zero, the first is "
            f"{named(bad[0])}; scores are probabilities, or sums of them"
        )


def _class_accuracy(labels: np.ndarray, rank: np.ndarray, classes: int) -> np.ndarray:
    # By rank, as top1: the confusion matrix counts a tie for the first class, which may be the true one.
    hits = np.bincount(labels[rank == 1], minlength=classes)
    with np.errstate(invalid="ignore"):
        return hits / np.bincount(labels, minlength=classes)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
