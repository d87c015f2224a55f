"""What detections go through in the original implementation: soft-NMS and mean average precision, step by step.

Their algorithms, for comparing results and speed: softnms_v2 of segment_utils.py, and the evaluation of
eval_detection.py, which is ActivityNet's. The latter evaluates the classes in parallel processes; here, as in genkd,
one process evaluates all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def soft_nms(segments: Tensor, sigma: float, top_k: int, score_threshold: float) -> Tensor:
    """Kept segments (n,3) of one class's (N,3) start, end, score, in input order."""
    start, end, score = segments[:, 0], segments[:, 1], segments[:, 2].clone()
    done = torch.zeros(len(score), dtype=torch.bool)
    left = score >= score_threshold
    while left.sum() > 1 and done.sum() < top_k:
        best = int(left.nonzero()[score[left].argmax()])
        left[best], done[best] = False, True
        others = (start[left], end[left])
        shared = (torch.clamp(others[1], max=end[best]) - torch.clamp(others[0], min=start[best])).clamp(min=0)
        width = torch.clamp(end[best] - start[best], min=1e-5)
        tiou = shared / (width + (others[1] - others[0]) - shared)
        score[left] *= torch.exp(-(tiou**2) / sigma)
        left[score < score_threshold] = False
    return torch.stack([start[done], end[done], score[done]], 1)


def average_precision(
    ground_truth: Mapping[str, Any], predictions: Mapping[str, Any], tious: np.ndarray, subset: str
) -> np.ndarray:
    """AP (T,K), by the values of both JSON files; needs pandas."""
    import pandas as pd

    classes: dict[str, int] = {}
    truth_rows = []
    for video, entry in ground_truth["database"].items():
        if entry["subset"] == subset:
            for action in entry["annotations"]:
                label = classes.setdefault(action["label"], len(classes))
                truth_rows.append((video, *map(float, action["segment"]), label))
    known = {row[0] for row in truth_rows}
    rows = [
        (video, *map(float, entry["segment"]), classes[entry["label"]], entry["score"])
        for video, entries in predictions["results"].items()
        if video in known
        for entry in entries
        if entry["label"] in classes
    ]
    truth = pd.DataFrame(truth_rows, columns=["video", "start", "end", "label"])
    found = pd.DataFrame(rows, columns=["video", "start", "end", "label", "score"])
    ap = np.zeros((len(tious), len(classes)))
    for label in classes.values():
        own = found[found["label"] == label].reset_index(drop=True)
        if len(own):
            ap[:, label] = _class_precision(truth[truth["label"] == label].reset_index(drop=True), own, tious)
    return ap


def _class_precision(truth: Any, found: Any, tious: np.ndarray) -> np.ndarray:
    """AP (T,) of one class's data frames: a row of the frame at a time, which looks its video's instances up."""
    found = found.loc[found["score"].values.argsort()[::-1]].reset_index(drop=True)
    taken = np.zeros((len(tious), len(truth)), bool)
    hits = np.zeros((len(tious), len(found)))
    by_video = truth.groupby("video")
    for row, prediction in found.iterrows():
        try:
            instances = by_video.get_group(prediction["video"]).reset_index()
        except KeyError:
            continue
        overlaps = _tiou(prediction[["start", "end"]].values, instances[["start", "end"]].values)
        best_first = overlaps.argsort()[::-1]
        for level, tiou in enumerate(tious):
            for number in best_first:
                if overlaps[number] < tiou:
                    break
                instance = instances.loc[number]["index"]
                if not taken[level, instance]:
                    taken[level, instance] = True
                    hits[level, row] = 1
                    break
    true = hits.cumsum(1)
    precision = true / np.arange(1, len(found) + 1)
    return np.array([_interpolated(*rows) for rows in zip(precision, true / len(truth), strict=True)])


def _tiou(segment: np.ndarray, others: np.ndarray) -> np.ndarray:
    shared = (np.minimum(segment[1], others[:, 1]) - np.maximum(segment[0], others[:, 0])).clip(0)
    union = (others[:, 1] - others[:, 0]) + (segment[1] - segment[0]) - shared
    return (shared / union).astype(float)


def _interpolated(precision: np.ndarray, recall: np.ndarray) -> float:
    """The area under a curve whose precision never falls towards lower recall."""
    precision = np.concatenate([[0], precision, [0]])
    recall = np.concatenate([[0], recall, [1]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())
