"""Temporal detection beside the original implementation: soft-NMS, mean average precision, and its loops over windows.

Contenders of soft-NMS and mAP get the same values in memory and must come to the same result, or there is none. Each
runs in this process, on one core. The workloads inference and training are in detect_windows.py.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..evaluation.detection import mean_average_precision
from ..evaluation.ground_truth import read_ground_truth
from ..evaluation.soft_nms import soft_nms_classes
from ..evaluation.tious import THUMOS14
from ..files import read_json
from . import detect_reference, detect_windows
from .common import compare, named

log = logging.getLogger(__name__)

ORIGINAL, GENKD = "original algorithm", "genkd"
SUBSET = "test"
SECONDS = 0.3  # of a turn at the least, as a single call of some milliseconds says little
# Of softnms_v2 by default, and of the original's test on THUMOS14: sigma, top_k, score threshold.
SETTINGS = {"sigma 0.5": (0.5, 1000, 0.001), "sigma 0.1": (0.1, 5000, 0.001)}
WORKLOADS = ("soft-nms", "map", "inference", "training")
GOALS = {"soft-NMS": 100.0, "mAP": 20.0, "inference": 3.0}


def run(
    data: Path | None, repeats: int, names: Sequence[str] = (), *, classes: int = 20, segments: int = 2000,
    predictions: int = 200_000, size: detect_windows.Size | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures soft-NMS of so many segments of each class, mAP of so many predictions, and windows a second.

    data: a ground-truth JSON file with the subset `test`, such as THUMOS14's; None generates one of its size.
    names: texts in the names of WORKLOADS; none for all. size: of detect_windows; None for this machine's.
    The original's mAP takes a millisecond a prediction, so three minutes of every turn are its.
    Raises UserError for a file that is none, and for a text in no name.
    """
    chosen = named(WORKLOADS, names, "workload")
    if data and "map" not in chosen:
        raise UserError(f"--data {data} is the ground truth of the workload map, which --workload leaves out")
    about: dict[str, Any] = {"skipped": {}}
    results: dict[str, dict[str, Any]] = {}
    if "soft-nms" in chosen or "map" in chosen:
        results |= _algorithms(data, repeats, chosen, (classes, segments, predictions), about)
    if "inference" in chosen or "training" in chosen:
        with detect_windows.setting(size) as place:
            for name, measure in (("inference", detect_windows.inference), ("training", detect_windows.training)):
                if name in chosen:
                    log.info("%s", name)
                    results[name] = measure(place, repeats)
                    about[name] = results[name]["about"]
    result = next(iter(results.values()))
    result["about"] = about
    result["rows"] = [
        {"workload": name, "unit": found["unit"], **row} for name, found in results.items() for row in found["rows"]
    ]
    result["targets"] = [
        {"name": row["workload"] + (" beside the original's loop" if row["workload"] in WORKLOADS else
                                    " beside the original algorithm"),
         "measured": row["ratio"], "at_least": goal, "at_most": None, "met": row["ratio"] >= goal}
        for row in result["rows"]
        for start, goal in GOALS.items()
        if row["name"] == GENKD and row["workload"].startswith(start) and len(results[row["workload"]]["rows"]) > 1
    ]  # fmt: skip
    return result


def _algorithms(
    data: Path | None, repeats: int, chosen: Sequence[str], sizes: tuple[int, int, int], about: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    classes, segments, predictions = sizes
    about["threads"] = 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results: dict[str, dict[str, Any]] = {}
        if "map" in chosen:
            truth = read_json(data) if data else synthetic_truth()
            read_ground_truth(data or truth, SUBSET)
            about |= {"predictions": predictions, "ground_truth": data.name if data else "synthetic"}
        if "soft-nms" in chosen:
            about |= {"classes": classes, "segments": segments}
            results |= _soft_nms(classes, segments, repeats, about)
        if "map" in chosen:
            results |= _map(truth, predictions, repeats, about)
    finally:
        torch.set_num_threads(threads)
    return results


def _soft_nms(classes: int, segments: int, repeats: int, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    array = detector_segments(classes, segments)
    tensor = torch.from_numpy(array)
    results = {}
    for label, settings in SETTINGS.items():
        work: dict[str, Callable[[], Any]] = {
            ORIGINAL: partial(_original_soft_nms, tensor, settings),
            GENKD: partial(soft_nms_classes, array, *settings, compat="reference"),
        }
        name = f"soft-NMS, {label}"
        results[name] = _compared(name, "segments/s", work, classes * segments, repeats, about, _same_segments)
    return results


def _original_soft_nms(segments: torch.Tensor, settings: tuple[float, int, float]) -> list[torch.Tensor]:
    return [detect_reference.soft_nms(own, *settings) for own in segments]


def _map(truth: dict[str, Any], count: int, repeats: int, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    predictions = synthetic_predictions(truth, count)
    tious = np.array(THUMOS14)
    work: dict[str, Callable[[], Any]] = {GENKD: lambda: mean_average_precision(truth, predictions, tious, SUBSET).ap}
    if importlib.util.find_spec("pandas") is None:
        about["skipped"][f"mAP, {ORIGINAL}"] = "needs pandas, which is not installed"
    else:
        about["pandas"] = metadata.version("pandas")
        work = {ORIGINAL: lambda: detect_reference.average_precision(truth, predictions, tious, SUBSET), **work}
    return {"mAP": _compared("mAP", "predictions/s", work, count, repeats, about, _same_ap)}


def _compared(
    name: str, unit: str, work: dict[str, Callable[[], Any]], items: int, repeats: int, about: dict[str, Any],
    refuse: Callable[[Any, Any], None],
) -> dict[str, Any]:  # fmt: skip
    """Turns of all contenders, each at least one call and SECONDS long, and their last results compared."""
    log.info("%s", name)
    work[GENKD]()  # compiles its loops
    found: dict[str, Any] = {}

    def timed(label: str) -> Callable[[], tuple[float, dict]]:
        def measure() -> tuple[float, dict]:
            calls, started = 0, time.perf_counter()
            while (seconds := time.perf_counter() - started) < SECONDS:
                found[label] = work[label]()
                calls += 1
            return items * calls / seconds, {}

        return measure

    result = compare("detect", unit, {label: timed(label) for label in work}, repeats, about)
    if ORIGINAL in found:
        refuse(found[ORIGINAL], found[GENKD])
    return result


def _same_segments(wanted: list[torch.Tensor], found: list[np.ndarray]) -> None:
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one.numpy(), atol=1e-6)


def _same_ap(wanted: np.ndarray, found: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def detector_segments(classes: int, count: int, seed: int = 0, actions: int = 16) -> np.ndarray:
    """Segments (K,N,3) in seconds with scores, as the detector's 126 anchors give in windows of 256 frames at 10 a
    second, 128 apart: 2,000 are 3.6 minutes.

    An anchor inside one of the `actions` of a class reaches its ends, give or take 15 % of its length, with a score of
    0.01 to 1; any other reaches as far as its stride, more or less, with a score a little above 0.01.
    """
    generator = np.random.default_rng(seed)
    strides = np.repeat([4.0, 8.0, 16.0, 32.0, 64.0, 128.0], [64, 32, 16, 8, 4, 2])  # frames
    anchors = np.concatenate([stride * (np.arange(256 // stride) + 0.5) for stride in np.unique(strides)])
    windows = -(-count // len(anchors))
    centres = (128 * np.arange(windows)[:, None] + anchors).ravel()[:count]
    strides = np.tile(strides, windows)[:count]
    found = np.empty((classes, count, 3), np.float32)
    for own in found:
        middle = generator.uniform(0, 128 * (windows + 1), actions)
        length = 10 * generator.lognormal(1.3, 0.6, actions)
        distance = np.abs(centres[:, None] - middle) / length
        action, inside = distance.argmin(1), distance.min(1) < 0.4
        reach = strides[:, None] * generator.lognormal(0, 0.5, (count, 2))
        reach = np.where(inside[:, None], length[action, None] * generator.normal(0.5, 0.15, (count, 2)), reach)
        centre = np.where(inside, middle[action], centres)
        start, end = centre - reach[:, 0], centre + reach[:, 1]
        high, low = 0.99 * generator.beta(1, 2, count), 0.05 * generator.beta(1, 4, count)
        own[:] = np.stack([start / 10, np.maximum(end, start + 1) / 10, 0.01 + np.where(inside, high, low)], 1)
    return found


def synthetic_truth(seed: int = 0) -> dict[str, Any]:
    """As many videos, classes and instances as THUMOS14's test set has: 210, 20 and 3,311."""
    generator = np.random.default_rng(seed)
    database: dict[str, Any] = {
        f"video_{number}": {"subset": SUBSET, "annotations": [], "duration": generator.uniform(30, 600)}
        for number in range(210)
    }
    videos = list(database.values())
    own = generator.integers(0, 20, len(videos))  # most of a video's instances are of one class
    for number in np.concatenate([np.arange(210), generator.integers(0, 210, 3311 - 210)]):
        start = generator.uniform(0, videos[number]["duration"])
        label = own[number] if generator.random() < 0.9 else generator.integers(0, 20)
        videos[number]["annotations"].append(
            {"segment": [start, start + generator.lognormal(1.2, 0.7)], "label": f"class {label}"}
        )
    return {"database": database}


def synthetic_predictions(truth: dict[str, Any], count: int, seed: int = 0) -> dict[str, Any]:
    """Predictions in ActivityNet's format: instances of a ground truth with ends moved by 30 % of their length, a
    fifth of them with any label."""
    generator = np.random.default_rng(seed)
    known = read_ground_truth(truth, SUBSET)
    instance = generator.integers(0, len(known.video), count)
    segments = known.segments[instance]
    length = segments[:, 1:] - segments[:, :1]
    segments = np.sort(segments + 0.3 * length * generator.normal(size=(count, 2)), 1)
    other = generator.integers(0, len(known.classes), count)
    label = np.where(generator.random(count) < 0.8, known.label[instance], other)
    results: dict[str, list[dict[str, Any]]] = {video: [] for video in known.videos}
    columns = (known.video[instance], label, generator.random(count), segments)
    for video, number, score, segment in zip(*(column.tolist() for column in columns), strict=True):
        results[known.videos[video]].append({"label": known.classes[number], "score": score, "segment": segment})
    return {"version": "genkd", "results": results, "external_data": {}}
