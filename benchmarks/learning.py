"""Does it learn? Trains teachers and students, alone and by every method, and measures them on held-out videos.

    python -m genkd.benchmarks.learning OUT [--fights FOLDER] [--jobs 2]

A row is written to OUT/learning.json after every run. Started again, the same command goes on where it stopped:
finished rows are kept, an unfinished run continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ..configs.load import load
from ..evaluation.recognition import evaluate_weights
from ..files import write_json
from ..models.checkpoints import read_card
from ..preprocessing import interop, sources
from ..preprocessing.convert import convert
from ..preprocessing.flow import FlowSettings
from ..preprocessing.shards import Dataset
from ..preprocessing.synthetic import SynthSettings, synthesize
from ..preprocessing.video import VideoSettings
from ..trainers.loop import train
from .common import machine, versions

MAIN = ("teacher", "representation", "none", "generative")
OTHERS = ("generative-only", "attention-only", "logits", "features", "attention-transfer")
# What the original implementation does otherwise, one thing at a time; the ways for the stem; and remedies.
VARIANTS = {
    "none, strided stem": ("none", ["model.stem=strided"]),
    "none, paired stem": ("none", ["model.stem=paired"]),
    "none, softmax twice and batch sums": ("none", ["compat=reference", "model.stem=mean"]),
    "none, started from the teacher": ("none", ["init={teacher}"]),
    "generative, started from the teacher": ("generative", ["init={teacher}"]),
    "generative, attention weight 10": ("generative", ["loss.attention=10"]),
    "generative, compat=reference": ("generative", ["compat=reference"]),
}


@dataclass(frozen=True)
class Job:
    """One run: of a data set's fold, with a seed. name: the row's; needs: the run whose weights it starts from."""

    data: str
    fold: int
    seed: int
    name: str

    @property
    def folder(self) -> str:
        return f"{self.data}/fold{self.fold}-seed{self.seed}/{self.name.replace(', ', '-').replace(' ', '-')}"

    @property
    def needs(self) -> Job | None:
        method, overrides = VARIANTS.get(self.name, (self.name, []))
        if self.data in PRETRAINED and self.name in ("teacher", "representation")[: 1 + (self.data == "synth")]:
            return PRETRAINED[self.data]
        if self.name == "teacher" or (method == "none" and "init={teacher}" not in overrides):
            return None
        before = "teacher" if self.name == "representation" else "representation"
        return Job(self.data, self.fold, self.seed, before)

    def train(self, root: Path) -> dict[str, Any]:
        """Trains and measures; the row."""
        torch.set_num_threads(1)  # jobs share the cores by running side by side
        run, data = root / "runs" / self.folder, root / f"{self.data}-{self.fold}"
        method, overrides = VARIANTS.get(self.name, (self.name, []))
        phase = self.name if self.name in ("teacher", "representation") else "distill"
        options = [f"data.dataset={data}", f"seed={self.seed}", "data.decoder_threads=1", *overrides]
        if phase == "distill":
            options.append(f"distill.method={method}")
        if self.needs is not None:
            before = root / "runs" / self.needs.folder
            key = "teacher" if phase == "distill" else "init"
            options = [*(option.format(teacher=before) for option in options), f"{key}={before}"]
        started = time.perf_counter()
        train(load(str(root / f"{self.data}.yaml"), phase, options), run, say=lambda text: None)
        seconds = time.perf_counter() - started
        clips = 3 if self.data == "fights-flow" else 4
        found = evaluate_weights(run, data, run / "evaluation", clips=clips, device="cpu")
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = next(entry for line in reversed(lines) if (entry := json.loads(line))["kind"] == "train")
        card = read_card(run)
        return {
            "data": self.data, "fold": self.fold, "seed": self.seed, "run": self.name, "top1": found["top1"],
            "loss": found["loss"], "videos": found["videos"], "train_class_loss": last["recognizer/class"],
            "parameters": found["parameters"], "temporal": card.model.temporal,
            "seconds": round(seconds), "clips_per_s": found["clips_per_s"],
        }  # fmt: skip


# 120 or 160 videos are too few for a teacher from random weights: it starts from more synthetic motion, as the
# original's starts from Kinetics. Students start from random weights, like the original's.
PRETRAINED = {"synth": Job("synth-large", 1, 0, "representation"), "fights-flow": Job("synth-flow", 1, 0, "teacher")}


def jobs(with_fights: bool) -> Iterator[Job]:
    """Every run, in the order in which it is wanted: the main comparison first."""
    sets = ["synth", "fights-flow"] if with_fights else ["synth"]
    for data in sets:
        if data == "synth":
            yield Job("synth-large", 1, 0, "teacher")
        yield PRETRAINED[data]
    for seed in range(3):
        for data, name in itertools.product(sets, MAIN):
            yield Job(data, 1, seed, name)
        for fold in range(2, 6) if with_fights and seed == 0 else ():
            for name in MAIN:
                yield Job("fights-flow", fold, 0, name)
    for seed in range(3):
        for name, data in itertools.product(OTHERS, sets):
            yield Job(data, 1, seed, name)
        for name in VARIANTS:
            yield Job("synth", 1, seed, name)


def prepare(root: Path, fights: Path | None) -> None:
    """Data sets of small pictures, and a configuration for each."""
    root.mkdir(parents=True, exist_ok=True)
    video = VideoSettings(codec="h264", short_side=72)
    for name, settings, text in (
        ("synth-large", SynthSettings(videos_per_class=64, test_share=0.375), LARGE),
        ("synth", SynthSettings(videos_per_class=36, test_share=2 / 3, seed=1), SYNTH),
    ):
        synthesize(root / f"{name}-source" / "videos", settings, workers=2)
        convert(sources.ucf101(root / f"{name}-source" / "videos"), root / f"{name}-1", video, workers=2)
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    if fights is None:
        return
    rgb = interop.dataset_sources(Dataset.open(root / "synth-large-1"))
    convert(rgb, root / "synth-flow-1", FlowSettings("dis"), workers=2)
    (root / "synth-flow.yaml").write_text(LARGE, encoding="utf-8")
    video = VideoSettings(codec="h264", short_side=80, fps=10.0, gop=8)
    for fold in range(1, 6):
        found = sources.folder(fights, test_fold=f"{fold}/5", group_by=r"(\d+)\d$")
        convert(found, root / f"fights-{fold}", video, workers=2)
        rgb = interop.dataset_sources(Dataset.open(root / f"fights-{fold}"))
        convert(rgb, root / f"fights-flow-{fold}", FlowSettings("dis", gop=8), workers=2)
    (root / "fights-flow.yaml").write_text(FIGHTS, encoding="utf-8")


LARGE = """\
base: demo
tensorboard: false
eval_every: 10
epochs: 20
phases:
  teacher: {epochs: 24, optimizer: {lr: 0.002}}
  representation: {epochs: 16, optimizer: {lr: 0.001}}
"""
SYNTH = """\
base: demo
tensorboard: false
eval_every: 10
epochs: 50
batch_size: 6
phases:
  distill: {model: {stem: mean}}
  teacher: {epochs: 8, optimizer: {lr: 0.0003}}
  representation: {epochs: 8, optimizer: {lr: 0.0003}}
"""
FIGHTS = """\
base: demo
tensorboard: false
eval_every: 10
epochs: 20
data: {stride: 1, scales: [1.0, 0.875, 0.75], eval_clips: 3}
loss: {label_smoothing: 0.1}
phases:
  distill: {model: {stem: mean}}
  teacher: {epochs: 10, optimizer: {lr: 0.0003}}
  representation: {epochs: 10, optimizer: {lr: 0.0003}}
"""


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of top-1 over folds (seed 0) and over seeds (fold 1), by data set and run."""
    found = []
    for data, name in dict.fromkeys((row["data"], row["run"]) for row in rows):
        own = [row for row in rows if (row["data"], row["run"]) == (data, name)]
        entry: dict[str, Any] = {"data": data, "run": name, "parameters": own[0]["parameters"]}
        for over, chosen in (
            ("folds", [row["top1"] for row in own if row["seed"] == 0]),
            ("seeds", [row["top1"] for row in own if row["fold"] == 1]),
        ):
            if len(chosen) > 1:
                entry[over] = {
                    "runs": len(chosen), "mean": statistics.mean(chosen), "std": statistics.stdev(chosen),
                    "error": statistics.stdev(chosen) / math.sqrt(len(chosen)),
                }  # fmt: skip
        found.append(entry)
    return found


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--fights", type=click.Path(path_type=Path, exists=True), help="Folder with fight/ and noFight/.")
@click.option("--jobs", "workers", default=2, show_default=True, help="Runs side by side, a thread each.")
@click.option("--only", multiple=True, help="Only rows of this data set; may be repeated.")
def main(out: Path, fights: Path | None, workers: int, only: tuple[str, ...]) -> None:
    """Train and measure everything that is not yet in OUT/learning.json."""
    prepare(out, fights)
    path = out / "learning.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    wanted = [job for job in jobs(fights is not None) if not only or job.data in only]
    done = {Job(row["data"], row["fold"], row["seed"], row["run"]) for row in rows}
    left = [job for job in wanted if job not in done]
    running: dict[Any, Job] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while left or running:
            for job in [job for job in left if job.needs is None or job.needs in done][: workers - len(running)]:
                running[pool.submit(job.train, out)] = job
                left.remove(job)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job, row = running.pop(future), future.result()
                rows.append(row)
                done.add(job)
                shutil.rmtree(out / "runs" / job.folder / "checkpoints", ignore_errors=True)
                write_json(
                    path, {"benchmark": "learning", "machine": machine(), "versions": versions(), "rows": rows,
                           "summary": summary(rows)},
                )  # fmt: skip
                click.echo(f"{job.folder}: top-1 {100 * row['top1']:.1f} % of {row['videos']}, {row['seconds']} s")


if __name__ == "__main__":
    main()
