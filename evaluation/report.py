"""One self-contained HTML page about training runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from .. import __version__
from ..errors import UserError
from ..files import write_atomically
from ..models.checkpoints import ModelCard, load_recognizer
from ..models.recognizer import Recognizer
from ..pipelines.loader import Loader
from ..pipelines.pyav import decode_rgb
from ..pipelines.store import ClipStore
from ..preprocessing.shards import Dataset, Video
from ..trainers.methods import METHODS
from . import charts, recorded, report_detection
from .metrics import paired_difference
from .recognition import data_config
from .report_runs import Run, classes_of, network_of, read_runs, series, speed
from .scores import SCORES_FILE, read_scores

SAMPLES = 4  # videos whose attention is shown
_WINDOWS = 10


def write_report(
    path: Path, runs: list[Path], *, title: str = "genkd report", timings: dict[str, float] | None = None,
    ground_truth: Path | None = None, subset: str | None = None,
) -> None:  # fmt: skip
    """Writes the page. Of recognizers: accuracies, what distillation did, curves, throughput, confusion, calibration,
    attention over time. Of detectors: see report_detection.page.

    runs: finished run folders of one data set; what a folder's `evaluation/` holds is shown too. timings: seconds by
    step. ground_truth, subset: of detections, None for the annotations of each run's data set. Raises UserError for a
    folder that is no finished run.
    """
    found = read_runs(runs)
    detectors = [run for run in found if run.card.task == "detection"]
    if detectors and len(detectors) < len(found):
        other = next(run for run in found if run.card.task != "detection")
        raise UserError(f"{detectors[0].path} is a detector's run, {other.path} a recognizer's; report them one by one")
    if detectors:
        page, template = report_detection.page(detectors, ground_truth, subset), "report_detection.html.j2"
    elif ground_truth is not None or subset is not None:
        raise UserError(f"--ground-truth and --subset are for detectors, {found[0].path} is a recognizer's run")
    else:
        page, template = _page(found), "report.html.j2"
    page |= {"title": title, "version": __version__, "classes": classes_of(found[0]), "timings": timings}
    files = resources.files("genkd.evaluation")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8")),
    )  # fmt: skip
    write_atomically(path, environment.get_template(template).render(page).encode())


def _page(found: list[Run]) -> dict[str, Any]:
    """What the template of recognizers shows."""
    evaluated = {run.name: run.evaluation for run in found if run.evaluation}
    guessing = 1 / len(found[0].card.classes)
    return {
        "rows": [_row(run) for run in found],
        "comparison": _comparison(found),
        "accuracy": charts.lines(
            {run.name: series(run, "eval", "top1") for run in found if run.of_kind("eval")},
            "epoch", "top-1 on held-out videos", percent=True, floor=guessing,
        ),
        "loss": charts.lines(
            {run.name: series(run, "train", "recognizer/class") for run in found}, "epoch", "class loss"
        ),
        **speed(found),
        "confusions": [
            (name, charts.confusion(np.array(values["confusion"]), values["classes"]))
            for name, values in evaluated.items()
        ],
        "calibrations": [
            (name, values["ece"], charts.reliability(values["reliability"]))
            for name, values in evaluated.items()
            if "reliability" in values
        ],
        "samples": _samples(found),
    }  # fmt: skip


def _row(run: Run) -> dict[str, Any]:
    what = {"teacher": "classification", "representation": "feature representation"}
    method = METHODS[run.config.distill.method].title
    result, kept = run.evaluation or {}, recorded.training(run.path, run.config) or {}
    return {
        "name": run.name,
        "phase": what.get(run.config.phase, method),
        "network": network_of(run),
        "parameters": result.get("parameters"),
        "epochs": run.config.epochs,
        "top1": result.get("top1", kept.get("top1")),
        "top5": result.get("top5", kept.get("top5")),
        "mean_class": result.get("mean_class_accuracy"),
        "views": f"{result['clips']} x {result['crops']}" if result else f"{run.config.data.eval_clips} x 1",
        "decoder": result.get("decoder"),
    }


def _comparison(runs: list[Run]) -> dict[str, Any] | None:
    """The distilled student against the plain one on the same videos, with the paired standard error."""
    students = {run.config.distill.method: run for run in runs if run.config.phase == "distill" and run.evaluation}
    if set(students) != {"none", "generative"}:
        return None
    files = {name: read_scores(run.path / "evaluation" / SCORES_FILE) for name, run in students.items()}
    if files["none"].keys != files["generative"].keys:
        return None  # measured on other videos
    right = {name: file.labels == file.scores.argmax(1) for name, file in files.items()}
    difference, error = paired_difference(right["generative"], right["none"])
    if error is None:
        return None
    return {
        "plain": right["none"].mean(), "distilled": right["generative"].mean(), "difference": difference,
        "error": error, "videos": len(right["none"]), "seed": students["generative"].config.seed,
        "significant": abs(difference) > 1.96 * error,
    }  # fmt: skip


def _samples(runs: list[Run]) -> list[dict[str, Any]]:
    """A few held-out videos: frames, and each attending network's mean attention over time."""
    attending = [run for run in runs if run.card.attention]
    if not attending:
        return []
    data = attending[0].config.data
    dataset = Dataset.open(data.dataset)
    rows = dataset.rows(data.eval_split)
    labels = dataset.labels[rows]
    classes = np.unique(labels)
    picked = classes[np.linspace(0, len(classes) - 1, min(SAMPLES, len(classes))).round().astype(int)]
    of_class = [rows[labels == label] for label in picked]
    chosen = [videos[number % len(videos)] for number, videos in enumerate(of_class)]
    models = {run.name: load_recognizer(run.path)[0] for run in attending}
    colours = {run.name: charts.COLOURS[runs.index(run) % len(charts.COLOURS)] for run in attending}
    store = ClipStore(dataset)
    shown = []
    for row in chosen:
        video = dataset.video(int(row))
        curves, predictions = {}, {}
        for run in attending:
            values, scores = _attention_over_time(models[run.name], run.card, dataset, video)
            curves[run.name] = (np.arange(video.num_frames) / video.fps, values)
            predictions[run.name] = run.card.classes[int(scores.argmax())]
        picked = np.linspace(0, video.num_frames - 1, 10).round().astype(int)
        bytes_, _ = store.read(video, 0, video.num_frames - 1)
        relative = curves[attending[-1].name][1] / curves[attending[-1].name][1].mean()
        spread = (relative - relative.min())[picked]
        frames = charts.heat(decode_rgb(bytes_, picked), spread / max(np.ptp(relative), 0.01))
        shown.append(
            {
                "key": video.key, "label": dataset.classes[video.label], "predictions": predictions,
                "frames": charts.strip(frames), "chart": charts.attention(curves, colours, 10.5),
                "bars": attending[-1].name,
            }
        )  # fmt: skip
    return shown


def _attention_over_time(
    model: Recognizer, card: ModelCard, dataset: Dataset, video: Video
) -> tuple[np.ndarray, np.ndarray]:
    """Attention averaged over channels and over all windows that cover a frame (num_frames,), and mean scores (K,)."""
    config = data_config(card)
    sums, counts, scores = np.zeros(video.num_frames), np.zeros(video.num_frames), []
    with (
        Loader(
            dataset, "", config, batch_size=_WINDOWS, training=False, views=(_WINDOWS, 1), rows=np.array([video.row])
        ) as loader,
        torch.inference_mode(),
    ):
        for batch in loader:
            output = model(batch.clips.float())
            scores.append(output.scores.mean(0).numpy())
            weights = output.attention.mean(1).numpy()  # (N,T')
            steps = np.arange(config.clip_length) * weights.shape[1] // config.clip_length
            for number in range(batch.count):
                frames = loader.sample(0, number).frames
                # A clip frame stands for the source frames up to the next one.
                for offset in range(config.stride):
                    covered = np.minimum(frames + offset, video.num_frames - 1)
                    np.add.at(sums, covered, weights[number, steps])
                    np.add.at(counts, covered, 1)
    # The windows leave out a video's first and last frames; those take the nearest value.
    covered = np.flatnonzero(counts)
    return np.interp(np.arange(video.num_frames), covered, sums[covered] / counts[covered]), np.mean(scores, 0)
