"""One self-contained HTML page about training runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from .. import __version__
from ..configs.load import read_run
from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import write_atomically
from ..models.checkpoints import ModelCard, find_weights, load_recognizer, read_card
from ..models.recognizer import Recognizer
from ..pipelines.loader import Loader
from ..pipelines.pyav import decode_rgb
from ..pipelines.store import ClipStore
from ..preprocessing.shards import Dataset, Video
from ..trainers.methods import METHODS
from . import charts, recorded
from .metrics import paired_difference
from .recognition import data_config
from .scores import SCORES_FILE, read_scores

SAMPLES = 4  # videos whose attention is shown
_WINDOWS = 10


@dataclass(frozen=True)
class _Run:
    """What a run folder holds."""

    name: str
    path: Path
    config: TrainConfig
    card: ModelCard
    lines: list[dict[str, Any]]
    evaluation: dict[str, Any] | None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def write_report(
    path: Path, runs: list[Path], *, title: str = "genkd report", timings: dict[str, float] | None = None
) -> None:
    """Writes the page: accuracies, what distillation did, curves, throughput, confusion, calibration, attention
    over time.

    runs: finished run folders of one data set; what a folder's `evaluation/` holds is shown too. timings: seconds by
    step. Raises UserError for a folder that is no finished run.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [str(run) for run in runs]
    found = [_read(name, run) for name, run in zip(names, runs, strict=True)]
    evaluated = {run.name: run.evaluation for run in found if run.evaluation}
    guessing = 1 / len(found[0].card.classes)
    page = {
        "title": title,
        "version": __version__,
        "classes": found[0].card.classes,
        "rows": [_row(run) for run in found],
        "comparison": _comparison(found),
        "accuracy": charts.lines(
            {run.name: _series(run, "eval", "top1") for run in found if run.of_kind("eval")},
            "epoch", "top-1 on held-out videos", percent=True, floor=guessing,
        ),
        "loss": charts.lines(
            {run.name: _series(run, "train", "recognizer/class") for run in found}, "epoch", "class loss"
        ),
        "throughput": charts.bars({run.name: _median(run, "clips_per_s") for run in found}, "training clips/s, median"),
        "waiting": charts.bars(
            {run.name: 100 * _median(run, "data_wait") for run in found}, "% of the time waiting for data"
        ),
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
        "timings": timings,
    }  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = (resources.files("genkd.evaluation") / "report.html.j2").read_text(encoding="utf-8")
    write_atomically(path, environment.from_string(template).render(page).encode())


def _read(name: str, path: Path) -> _Run:
    config, card = read_run(path), read_card(path)
    if card.task != "recognition":
        raise UserError(
            f"{path} is the run of a detector, and reports are of recognizers; its curves are in metrics.jsonl and "
            "TensorBoard"
        )
    evaluation = recorded.evaluation(path, find_weights(path))
    lines = recorded.lines(path)
    if not lines:
        raise UserError(f"{path} has no metrics.jsonl; is it a finished run?")
    return _Run(name, path, config, card, lines, evaluation)


def _row(run: _Run) -> dict[str, Any]:
    what = {"teacher": "classification", "representation": "feature representation"}
    method = METHODS[run.config.distill.method].title
    result, kept = run.evaluation or {}, recorded.training(run.path, run.config) or {}
    return {
        "name": run.name,
        "phase": what.get(run.config.phase, method),
        "network": f"{'flow' if run.card.modality == 'flow' else 'RGB'}, I3D "
        f"{run.card.model.temporal.replace('_', '-')}, width {run.card.model.width:g}",
        "parameters": result.get("parameters"),
        "epochs": run.config.epochs,
        "top1": result.get("top1", kept.get("top1")),
        "top5": result.get("top5", kept.get("top5")),
        "mean_class": result.get("mean_class_accuracy"),
        "views": f"{result['clips']} x {result['crops']}" if result else f"{run.config.data.eval_clips} x 1",
        "decoder": result.get("decoder"),
    }


def _comparison(runs: list[_Run]) -> dict[str, Any] | None:
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


def _series(run: _Run, kind: str, key: str) -> tuple[list[float], list[float]]:
    lines = [line for line in run.of_kind(kind) if key in line]
    steps = max(line["step"] for line in run.lines)
    return [line["step"] / steps * run.config.epochs for line in lines], [line[key] for line in lines]


def _median(run: _Run, key: str) -> float:
    return float(np.median([line[key] for line in run.of_kind("train")]))


def _samples(runs: list[_Run]) -> list[dict[str, Any]]:
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
