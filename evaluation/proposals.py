"""What a detector found in videos: scored segments in ActivityNet's results format, read, written and fused.

{"version": ..., "results": {VIDEO: [{"label": ..., "score": ..., "segment": [START_S, END_S]}]}, "external_data": {}}
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import UserError
from ..files import read_json, write_atomically
from . import soft_nms

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposals:
    """N scored segments of videos. videos, labels: names; video, label (N,): which of them; segments (N,2) in seconds;
    scores (N,), any number that is higher for what is surer."""

    videos: tuple[str, ...]
    labels: tuple[str, ...]
    video: np.ndarray
    label: np.ndarray
    segments: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, np.ndarray]]) -> Proposals:
        """From {video: {label: rows (n,3) of start and end in seconds, score}}. Raises UserError for what is not
        finite."""
        labels: dict[str, int] = {}
        video, label, rows = [], [], [np.empty((0, 3))]
        for number, by_label in enumerate(found.values()):
            for name, values in by_label.items():
                rows.append(np.asarray(values, np.float64).reshape(-1, 3))
                video.append(np.full(len(rows[-1]), number))
                label.append(np.full(len(rows[-1]), labels.setdefault(name, len(labels))))
        table = np.concatenate(rows)
        none = [np.empty(0, np.int64)]
        made = cls(
            tuple(found), tuple(labels), np.concatenate(none + video), np.concatenate(none + label), table[:, :2],
            table[:, 2],
        )  # fmt: skip
        if not np.isfinite(table).all():
            row = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
            shown = ", ".join(f"{value:g}" for value in table[row])
            raise UserError(
                f"a segment of {made.videos[made.video[row]]} with label {made.labels[made.label[row]]!r} is not "
                f"finite: {shown} (start, end, score)"
            )
        return made

    def to_json(self, version: str = "genkd") -> dict[str, Any]:
        """ActivityNet's results format; a video without a segment has an empty list."""
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in self.videos}
        columns = (self.video, self.label, self.scores, self.segments)
        for video, label, score, segment in zip(*(column.tolist() for column in columns), strict=True):
            results[self.videos[video]].append({"label": self.labels[label], "score": score, "segment": segment})
        return {"version": version, "results": results, "external_data": {}}


ProposalSource = str | Path | Mapping[str, Any] | Proposals


def write_proposals(path: Path, proposals: Proposals, version: str = "genkd") -> None:
    """Puts proposals into a file in ActivityNet's results format, whole or not at all."""
    write_atomically(path, json.dumps(proposals.to_json(version), ensure_ascii=False, allow_nan=False).encode())


def read_proposals(source: ProposalSource) -> Proposals:
    """Proposals of a JSON file (gzipped or not) or of its value; Proposals are given back.

    Only "results" is needed. Times may be numbers or text of numbers, and negative; a segment may end before it starts.
    Raises UserError for what is not JSON or not of this format, and for times and scores that are not finite, naming
    the first of them.
    """
    if isinstance(source, Proposals):
        return source
    name, value = loaded(source, "the predictions")
    results = value.get("results") if isinstance(value, Mapping) else None
    if not isinstance(results, Mapping):
        raise UserError(f'{name}: no "results" by video; give ActivityNet\'s results format, {{"results": {{...}}}}')
    entries = list(results.values())
    labels: dict[str, int] = {}
    try:
        label = [labels.setdefault(entry["label"], len(labels)) for found in entries for entry in found]
        scores = np.array([entry["score"] for found in entries for entry in found], np.float64)
        pairs = [entry["segment"] for found in entries for entry in found]
        fine = all(map(_is_text, labels)) and set(map(type, pairs)) <= {list, tuple} and set(map(len, pairs)) <= {2}
        # numpy reads one flat list faster than lists in a list.
        segments = np.array(list(itertools.chain.from_iterable(pairs)), np.float64)
        fine = fine and scores.ndim == 1 and bool(np.isfinite(segments).all() and np.isfinite(scores).all())
    except (KeyError, TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        _name_the_first(name, results)
    video = np.repeat(np.arange(len(entries)), np.array([len(found) for found in entries], np.int64))
    return Proposals(tuple(results), tuple(labels), video, np.array(label, np.int64), segments.reshape(-1, 2), scores)


def fuse_proposals(
    sources: Sequence[ProposalSource], weights: Sequence[float] | None = None, sigma: float = soft_nms.SIGMA,
    top_k: int = soft_nms.TOP_K, score_threshold: float = soft_nms.SCORE_THRESHOLD,
) -> Proposals:  # fmt: skip
    """Late fusion of detectors, such as the RGB and the flow stream: all their proposals together, scores times the
    weight of each (the largest counts as 1; all alike by default), then soft-NMS of each class of each video.

    Raises UserError for fewer than two sources, weights of another number, negative or all 0, and as read_proposals().
    """
    if len(sources) < 2:
        raise UserError("fusion takes the proposals of two detectors or more")
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} detectors; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not max(weights):
        raise UserError(f"weights {', '.join(f'{weight:g}' for weight in weights)}: must be 0 or more, and not all 0")
    read = [read_proposals(source) for source in sources]
    videos = {name: number for number, name in enumerate(dict.fromkeys(name for one in read for name in one.videos))}
    labels = {name: number for number, name in enumerate(dict.fromkeys(name for one in read for name in one.labels))}
    for number, one in enumerate(read, 1):
        if len(one.videos) < len(videos):
            log.warning("detector %d has %d of the %d videos; in the others it found nothing, as far as fusion knows",
                        number, len(one.videos), len(videos))  # fmt: skip
    video = np.concatenate([_numbers(one.videos, videos)[one.video] for one in read])
    label = np.concatenate([_numbers(one.labels, labels)[one.label] for one in read])
    scores = np.concatenate([one.scores * (weight / max(weights)) for one, weight in zip(read, weights, strict=True)])
    segments = np.concatenate([one.segments for one in read])
    rows, scores = soft_nms.soft_nms_groups(
        np.column_stack([segments, scores]), video * len(labels) + label, sigma, top_k, score_threshold
    )
    return Proposals(tuple(videos), tuple(labels), video[rows], label[rows], segments[rows], scores)


def loaded(source: Any, what: str) -> tuple[Any, Any]:
    """The value of a JSON file or the source itself if it is none, with what to call it in messages."""
    if isinstance(source, str | Path):
        return source, read_json(Path(source))
    return what, source


def _numbers(names: Sequence[str], numbers: Mapping[str, int]) -> np.ndarray:
    return np.array([numbers[name] for name in names], np.int64)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _name_the_first(name: Any, results: Mapping[str, Any]) -> NoReturn:
    """Raises UserError for the first entry of results that is not as it should be."""
    for video, found in results.items():
        if not isinstance(found, list | tuple):
            raise UserError(f"{name}: {video} has {shown(found)} where a list of segments is due")
        for number, entry in enumerate(found, 1):
            where = f"{name}: prediction {number} of {video}"
            if not isinstance(entry, Mapping):
                raise UserError(f'{where} is {shown(entry)}, not {{"label", "score", "segment"}}')
            for key in ("label", "score", "segment"):
                if key not in entry:
                    raise UserError(f"{where} has no {key!r}")
            if not _is_text(entry["label"]):
                raise UserError(f"{where} has the label {shown(entry['label'])}; labels are text")
            if not is_number(entry["score"]):
                raise UserError(f"{where} has the score {shown(entry['score'])}; scores are finite numbers")
            if not is_segment(entry["segment"]):
                raise UserError(f"{where} has the segment {shown(entry['segment'])}; {SEGMENTS}")
    raise UserError(f"{name} is not in ActivityNet's results format")


SEGMENTS = "segments are two finite numbers, start and end in seconds"


def is_segment(value: Any) -> bool:
    """Whether a value is a list of two finite numbers, or of their text."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or the text of one."""
    try:
        return isinstance(value, int | float | str) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def shown(value: Any) -> str:
    """A value for an error message, not at any length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
