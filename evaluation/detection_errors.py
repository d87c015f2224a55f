"""What the false detections are: the false positive analysis of DETAD.

Alwassel, Caba Heilbron, Escorcia, Ghanem, "Diagnosing Error in Temporal Action Detectors", ECCV 2018;
https://github.com/HumamAlwassel/DETAD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .ground_truth import Counts, GroundTruthSource, by_group, compare
from .matching import Ranked, average_precision, match, rank
from .proposals import ProposalSource
from .tious import check_tious

TYPES = ("true positive", "double detection", "wrong label", "localization", "confusion", "background")
_HIT, _DOUBLE, _WRONG, _LOCALIZATION, _CONFUSION, _BACKGROUND = range(6)


@dataclass(frozen=True)
class ErrorBreakdown:
    """Errors among the top F*G predictions: of each class the F times as many as it has instances with the best scores.

    numbers (T,F,6): predictions by tIoU, by rank (of each class the first G, the second G, ...), and by TYPES.
    shares (F,6): of the predictions of a rank, mean over the tIoUs; nan for a rank without predictions.
    average_map_n: normalized mAP of these predictions, mean over the tIoUs; gain (6,): how much higher it is without
    the errors of a type; 0 for true positives.
    """

    tious: np.ndarray
    numbers: np.ndarray
    shares: np.ndarray
    average_map_n: float
    gain: np.ndarray
    counts: Counts

    @property
    def overall(self) -> np.ndarray:
        """Shares (6,) of all these predictions; nan where there are none."""
        with np.errstate(invalid="ignore"):
            return (self.numbers.sum(1) / self.numbers[0].sum()).mean(0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, by the names of the types."""
        return {
            "ranks": len(self.shares),
            "shares": [_named(row) for row in self.shares], "overall": _named(self.overall),
            "average_map_n": self.average_map_n, "gain": _named(self.gain),
            "numbers": self.numbers.tolist(), "types": list(TYPES),
        }  # fmt: skip


def error_breakdown(
    ground_truth: GroundTruthSource, predictions: ProposalSource, tious: Sequence[float] | np.ndarray = (0.5,),
    subset: str = "test", factor: int = 10, least: float = 0.1,
) -> ErrorBreakdown:  # fmt: skip
    """Sorts the top factor*G predictions of each class, G its instances, by what they are at each tIoU threshold.

    A prediction that finds an instance as in mean_average_precision() is a true positive. Of any other one, the
    instance of its video with the largest tIoU, whatever its class and whether found or not, decides (of equal ones
    the first in the file):

    tIoU >= threshold: double detection if its class is the predicted one, wrong label if not;
    least <= tIoU < threshold: localization error if it is, confusion if not;
    below, or none in the video: background error.

    As DETAD's false_positive_analysis.py, but a video without instances always gives background errors (there, only
    its first prediction does, and the others are compared with another video), and instances without length stay in.
    The precision of the normalized mAP is r*N/(r*N + false positives), r the recall and N the mean number of
    instances of the classes. Raises UserError as mean_average_precision(), and for factor < 1.
    """
    levels = check_tious(tious)
    if factor < 1:
        raise UserError(f"errors are looked for among the top 1G predictions or more, not {factor}G")
    ranked = rank(compare(ground_truth, predictions, subset))
    ranked = ranked.take(np.flatnonzero(ranked.place < factor * ranked.instances[ranked.compared.label]))
    hits = match(ranked, levels)
    types = _types(ranked, hits, levels, least)
    numbers = np.zeros((len(levels), factor, len(TYPES)), np.int64)
    slices = ranked.place // ranked.instances[ranked.compared.label]
    for level in range(len(levels)):
        np.add.at(numbers[level], (slices, types[level]), 1)
    with np.errstate(invalid="ignore"):
        shares = (numbers / numbers[0].sum(1)[:, None]).mean(0)
    base = _normalized(ranked, hits, np.ones_like(hits))
    gain = [0.0, *(_normalized(ranked, hits, types != kind) - base for kind in range(1, len(TYPES)))]
    return ErrorBreakdown(levels, numbers, shares, base, np.array(gain), ranked.compared.counts)


def _types(ranked: Ranked, hits: np.ndarray, levels: np.ndarray, least: float) -> np.ndarray:
    """Of each threshold and prediction (T,N) its number in TYPES."""
    from .detection_loops import nearest

    found, truth = ranked.compared, ranked.compared.truth
    order, offsets = by_group(truth.video, len(truth.videos))
    starts, ends = (np.ascontiguousarray(column) for column in truth.segments[order].T)
    row, overlap = nearest(found.starts, found.ends, found.video, starts, ends, offsets)
    same = (row >= 0) & (truth.label[order][row] == found.label)
    high = np.where(same, _DOUBLE, _WRONG)
    low = np.where(same, _LOCALIZATION, _CONFUSION)
    types = np.where(overlap >= levels[:, None], high, np.where(overlap >= least, low, _BACKGROUND))
    return np.where(hits, _HIT, types)


def _normalized(ranked: Ranked, hits: np.ndarray, kept: np.ndarray) -> float:
    """Average mAP_N of the predictions that are kept (T,N)."""
    mean = float(ranked.instances.mean())
    values = [
        average_precision(hits[level : level + 1, part][:, kept[level, part]], instances, mean)
        for _, part, instances in ranked.classes()
        for level in range(len(hits))
    ]
    return float(np.mean(values))


def _named(values: np.ndarray) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(TYPES, values, strict=True)}
