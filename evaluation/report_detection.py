"""What a report shows of detectors' runs: curves, and what `genkd detect` found beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..preprocessing.shards import Dataset
from ..trainers.methods import METHODS
from . import charts, detect, detection_charts, recorded
from .detection import (
    AverageRecall,
    DetectionResult,
    ErrorBreakdown,
    average_recall,
    error_breakdown,
    mean_average_precision,
)
from .ground_truth import GroundTruth, read_ground_truth
from .proposals import Proposals, read_proposals
from .report_runs import Run, network_of, series, speed
from .tious import THUMOS14

SAMPLES = 4  # videos whose actions are shown
NUMBERS = (1, 2, 5, 10, 20, 50, 100)  # proposals a video
_LOSSES = {
    "detector/conf": "class loss",
    "detector/loc": "segment loss, by tIoU",
    "detector/background": "background loss",
    "detector/rec": "reconstruction loss",
    "detector/att": "attention distillation loss",
    "cvae/total": "loss of the conditional VAEs",
}


@dataclass(frozen=True)
class Measured:
    """A run's detections beside the ground truth."""

    run: Run
    truth: GroundTruth
    found: Proposals
    result: DetectionResult
    recall: AverageRecall
    errors: ErrorBreakdown


def page(runs: list[Run], truth: Path | None, subset: str | None) -> dict[str, Any]:
    """What the template shows: mAP and losses while training, throughput, and where RUN/evaluation has detections mAP
    by tIoU and class, average recall, DETAD's kinds of errors, and some videos.

    truth, subset: JSON of the ground truth, None for the annotations of the data set that was detected in. Raises
    UserError as read_ground_truth() and read_proposals() do.
    """
    measured, notes = [], []
    for run in runs:
        if run.detections is None:
            notes.append(
                f"{run.name} has no detections of its weights on record: run genkd detect {run.path} DATASET "
                f"{run.path}/evaluation/{recorded.DETECTIONS_FILE}, then report again"
            )
            continue
        own = _truth(run, truth, subset)
        if own is None:
            notes.append(f"{run.name}: the data set of its detections is not here; give --ground-truth")
            continue
        measured.append(_measure(run, own))
    colours = {entry.run.name: charts.COLOURS[n % len(charts.COLOURS)] for n, entry in enumerate(measured)}
    evaluated = [run for run in runs if run.of_kind("eval")]
    return {
        "rows": [_row(run) for run in runs],
        "notes": notes,
        "tious": [f"{tiou:g}" for tiou in THUMOS14],
        "measured": [_numbers(entry) for entry in measured],
        "progress": [
            (title, charts.lines({run.name: series(run, "eval", key) for run in evaluated}, "epoch", label,
                                 percent=True, whole=False))
            for key, title, label in (
                ("map", "mAP while training", "mean of mAP at tIoU 0.1 to 0.5"),
                ("map_0.5", "mAP at tIoU 0.5 while training", "mAP at tIoU 0.5"),
            )
        ] if evaluated else [],
        "losses": list(_losses(runs)),
        **speed(runs),
        "by_tiou": _by_tiou(measured),
        "recall": _recall(measured),
        "by_class": _by_class(measured),
        "counts": _counts(measured),
        "breakdowns": [_breakdown(entry) for entry in measured],
        "samples": _samples(measured, colours),
        "colours": colours,
    }  # fmt: skip


def _truth(run: Run, file: Path | None, subset: str | None) -> GroundTruth | None:
    """The instances to measure a run's detections by; None where its data set is not on this machine."""
    assert run.detections is not None
    split = run.detections["genkd"]["split"]
    if file is not None:
        return read_ground_truth(file, subset or "test")
    if subset is not None:
        raise UserError(f"--subset {subset} is of the file that --ground-truth names; give that too, or leave it out")
    for place in dict.fromkeys((run.detections["genkd"]["dataset"], run.config.data.dataset)):
        try:
            data = Dataset.open(place)
        except UserError:  # moved, or of another machine
            continue
        if tuple(data.classes) == run.card.classes and split in data.info["splits"]:
            return read_ground_truth(detect.ground_truth(data, split), split)
    return None


def _measure(run: Run, truth: GroundTruth) -> Measured:
    found = read_proposals(run.detections or {})
    return Measured(
        run, truth, found,
        mean_average_precision(truth, found, THUMOS14, truth.subset),
        average_recall(truth, found, THUMOS14, NUMBERS, truth.subset),
        error_breakdown(truth, found, THUMOS14, truth.subset),
    )  # fmt: skip


def _row(run: Run) -> dict[str, Any]:
    what = {"detect-teacher": "detector", "detect-representation": "feature representation"}
    kept = recorded.training(run.path, run.config) or {}
    return {
        "name": run.name, "phase": what.get(run.config.phase, METHODS[run.config.distill.method].title),
        "network": network_of(run), "epochs": run.config.epochs, "window": f"{run.card.clip_length} x {run.card.size}",
        "map": kept.get("map"), "map_0.5": kept.get("map_0.5"), "epoch": kept.get("epoch"),
    }  # fmt: skip


def _numbers(entry: Measured) -> dict[str, Any]:
    streams = "RGB and flow" if "flow_weights_sha256" in (entry.run.detections or {})["genkd"] else None
    return {
        "name": entry.run.name, "subset": entry.truth.subset, "streams": streams,
        "videos": len(entry.truth.videos), "instances": len(entry.truth.segments),
        "actions": entry.result.counts.used, "map": entry.result.map.tolist(), "average": entry.result.average_map,
    }  # fmt: skip


def _losses(runs: Sequence[Run]) -> list[tuple[str, str]]:
    drawn = []
    for key, title in _LOSSES.items():
        having = [run for run in runs if any(key in line for line in run.of_kind("train"))]
        if having:
            drawn.append((title, charts.lines({run.name: series(run, "train", key) for run in having}, "epoch", title)))
    return drawn


def _by_tiou(measured: Sequence[Measured]) -> str | None:
    curves = {entry.run.name: (list(THUMOS14), entry.result.map.tolist()) for entry in measured}
    return charts.lines(curves, "tIoU", "mAP", percent=True, whole=False) if measured else None


def _recall(measured: Sequence[Measured]) -> str | None:
    curves = {entry.run.name: (list(map(float, NUMBERS)), entry.recall.average.tolist()) for entry in measured}
    return charts.lines(curves, "proposals a video", "average recall", percent=True) if measured else None


def _by_class(measured: Sequence[Measured]) -> str | None:
    values = {
        entry.run.name: dict(zip(entry.result.classes, entry.result.ap.mean(0).tolist(), strict=True))
        for entry in measured
    }
    return detection_charts.per_class(values, "average precision, mean over the tIoUs") if measured else None


def _counts(measured: Sequence[Measured]) -> list[tuple[str, list[int]]]:
    """Of each class its instances, then each run's predictions; instances are the first run's."""
    if not measured:
        return []
    predictions = [dict(zip(e.result.classes, e.result.predictions.tolist(), strict=True)) for e in measured]
    first = measured[0].result
    return [
        (name, [instances, *(own.get(name, 0) for own in predictions)])
        for name, instances in sorted(zip(first.classes, first.instances.tolist(), strict=True))
    ]


def _breakdown(entry: Measured) -> dict[str, Any]:
    errors = entry.errors.to_json()
    return {
        "name": entry.run.name, "average_map_n": entry.errors.average_map_n,
        "shares": detection_charts.errors(entry.errors.shares) if not np.isnan(entry.errors.shares).all() else None,
        "gains": detection_charts.gains({kind: errors["gain"][kind] for kind in errors["types"][1:]}),
    }  # fmt: skip


def _samples(measured: Sequence[Measured], colours: dict[str, str]) -> list[dict[str, Any]]:
    """A few annotated videos of the first run's subset: their instances, and of each run as many actions as there are
    instances, those with the best scores."""
    if not measured:
        return []
    truth = measured[0].truth
    videos = np.unique(truth.video)
    picked = videos[np.linspace(0, len(videos) - 1, min(SAMPLES, len(videos))).round().astype(int)]
    shown = []
    for number in picked.tolist():
        key, rows = truth.videos[number], np.flatnonzero(truth.video == number)
        true = [(truth.classes[truth.label[row]], *truth.segments[row].tolist()) for row in rows]
        found = {entry.run.name: _best(entry.found, key, len(true)) for entry in measured}
        ends = [action[2] for actions in (true, *found.values()) for action in actions]
        chart = detection_charts.beside_truth(true, found, colours, max(ends))
        shown.append({"key": key, "instances": len(true), "chart": chart})
    return shown


def _best(found: Proposals, key: str, count: int) -> list[tuple[str, float, float, float]]:
    if key not in found.videos:
        return []
    rows = np.flatnonzero(found.video == found.videos.index(key))
    best = rows[np.argsort(-found.scores[rows], kind="stable")[:count]]
    return [(found.labels[found.label[row]], *found.segments[row].tolist(), float(found.scores[row])) for row in best]
