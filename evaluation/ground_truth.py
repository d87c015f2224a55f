"""Annotated actions of untrimmed videos, in the JSON that THUMOS14 and ActivityNet use, beside what was predicted.

{"database": {VIDEO: {"subset": ..., "annotations": [{"segment": [START_S, END_S], "label": ...}]}}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .proposals import SEGMENTS, ProposalSource, is_segment, loaded, read_proposals, shown


@dataclass(frozen=True)
class GroundTruth:
    """G instances of a subset. videos: all of it, with and without instances; classes: in order of their first
    instance; video, label (G,): which of them; segments (G,2) in seconds."""

    subset: str
    videos: tuple[str, ...]
    classes: tuple[str, ...]
    video: np.ndarray
    label: np.ndarray
    segments: np.ndarray


GroundTruthSource = str | Path | Mapping[str, Any] | GroundTruth


class Counts(NamedTuple):
    """What became of the predictions. total: all; used: those that are measured; unknown_video, unknown_label: ignored
    as their video is not in the subset, or their label on none of its instances.

    reversed: used ones that end before they start, so that they find nothing; reversed_instances: instances that do.
    """

    total: int
    used: int
    unknown_video: int
    unknown_label: int
    reversed: int
    reversed_instances: int


@dataclass(frozen=True)
class Compared:
    """The predictions that count, by the ground truth's numbers: video, label, score, start, end (N,)."""

    truth: GroundTruth
    video: np.ndarray
    label: np.ndarray
    scores: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    counts: Counts

    def take(self, rows: np.ndarray) -> Compared:
        """Some of these predictions, or all in another order."""
        return replace(
            self, video=self.video[rows], label=self.label[rows], scores=self.scores[rows], starts=self.starts[rows],
            ends=self.ends[rows],
        )  # fmt: skip


def read_ground_truth(source: GroundTruthSource, subset: str) -> GroundTruth:
    """The instances of a subset, of a JSON file (gzipped or not) or its value; times may be text of numbers.

    Instances that end before they start stay in: no prediction finds them, as in ActivityNet's evaluator.
    Raises UserError for what is not JSON or not of this format, a subset that is not there or has no instance.
    """
    if isinstance(source, GroundTruth):
        if source.subset != subset:
            raise UserError(f"this ground truth is of subset {source.subset!r}, not {subset!r}")
        return source
    name, value = loaded(source, "the ground truth")
    database = value.get("database") if isinstance(value, Mapping) else None
    if not isinstance(database, Mapping):
        raise UserError(f"{name}: no \"database\" of videos; give THUMOS14's or ActivityNet's ground-truth JSON")
    for video, entry in database.items():
        if not isinstance(entry, Mapping) or "subset" not in entry:
            raise UserError(f'{name}: {video} has no "subset"')
    videos = [video for video, entry in database.items() if entry["subset"] == subset]
    if not videos:
        there = Counter(str(entry["subset"]) for entry in database.values())
        known = ", ".join(f"{other} ({count} videos)" for other, count in there.items()) or "no videos at all"
        raise UserError(f"{name}: there is no subset {subset!r}; there are {known}")
    classes: dict[str, int] = {}
    rows: list[tuple[int, int, float, float]] = []
    for number, video in enumerate(videos):
        annotations = database[video].get("annotations")
        if not isinstance(annotations, list | tuple):
            raise UserError(f'{name}: {video} has no list of "annotations"')
        for place, entry in enumerate(annotations, 1):
            where = f"{name}: annotation {place} of {video}"
            if not isinstance(entry, Mapping) or not isinstance(entry.get("label"), str):
                raise UserError(f"{where} has no label that is text")
            if not is_segment(entry.get("segment")):
                raise UserError(f"{where} has the segment {shown(entry.get('segment'))}; {SEGMENTS}")
            start, end = map(float, entry["segment"])
            rows.append((number, classes.setdefault(entry["label"], len(classes)), start, end))
    if not rows:
        raise UserError(f"{name}: the {len(videos)} videos of subset {subset!r} have no annotations to compare with")
    table = np.array(rows, np.float64)
    video_of, label = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    return GroundTruth(subset, tuple(videos), tuple(classes), video_of, label, table[:, 2:])


def compare(ground_truth: GroundTruthSource, predictions: ProposalSource, subset: str) -> Compared:
    """The predictions of the subset's videos and classes; the others are counted and left out. Raises UserError as
    read_ground_truth() and read_proposals()."""
    truth = read_ground_truth(ground_truth, subset)
    found = read_proposals(predictions)
    video = renumbered(found.videos, truth.videos)[found.video]
    label = renumbered(found.labels, truth.classes)[found.label]
    used = np.flatnonzero((video >= 0) & (label >= 0))
    starts, ends = found.segments[used].T
    counts = Counts(
        len(video), len(used), int((video < 0).sum()), int(((video >= 0) & (label < 0)).sum()),
        int((ends < starts).sum()), int((truth.segments[:, 1] < truth.segments[:, 0]).sum()),
    )  # fmt: skip
    return Compared(
        truth, video[used], label[used], found.scores[used], np.ascontiguousarray(starts), np.ascontiguousarray(ends),
        counts,
    )  # fmt: skip


def by_group(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N,) ordered by their group (N,) of `count`, in a group as they were, and where each group begins and the
    last one ends (count + 1,)."""
    order = np.argsort(groups, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count))])


def best_first(scores: np.ndarray) -> np.ndarray:
    """Rows by falling score, of equal ones the last first, as reversing a stable sort gives.

    ActivityNet's evaluator reverses numpy's default sort, which has no order for equal scores."""
    return np.argsort(scores, kind="stable")[::-1]


def renumbered(names: tuple[str, ...], known: tuple[str, ...]) -> np.ndarray:
    """The number of each name in `known`, -1 for those that are not."""
    numbers = {name: number for number, name in enumerate(known)}
    return np.array([numbers.get(name, -1) for name in names], np.int64)
