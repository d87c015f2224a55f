"""What a report reads of training runs, whatever they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..configs.load import read_run
from ..configs.schema import TrainConfig
from ..errors import UserError
from ..models.checkpoints import ModelCard, find_weights, read_card
from . import charts, recorded


@dataclass(frozen=True)
class Run:
    """What a run folder holds. evaluation: of a recognizer, detections: of a detector; None for others' weights."""

    name: str
    path: Path
    config: TrainConfig
    card: ModelCard
    lines: list[dict[str, Any]]
    evaluation: dict[str, Any] | None = None
    detections: dict[str, Any] | None = None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of a kind."""
        return [line for line in self.lines if line["kind"] == kind]


def read_runs(runs: Sequence[Path]) -> list[Run]:
    """The runs by names that differ. Raises UserError for a folder that is no finished run."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [str(run) for run in runs]
    return [_read(name, run) for name, run in zip(names, runs, strict=True)]


def _read(name: str, path: Path) -> Run:
    config, card = read_run(path), read_card(path)
    lines = recorded.lines(path)
    if not lines:
        raise UserError(f"{path} has no metrics.jsonl; is it a finished run?")
    weights = find_weights(path)
    if card.task == "detection":
        return Run(name, path, config, card, lines, detections=recorded.detections(path, weights))
    return Run(name, path, config, card, lines, evaluation=recorded.evaluation(path, weights))


def classes_of(run: Run) -> tuple[str, ...]:
    """Its classes, without a detector's background."""
    return run.card.classes[1:] if run.card.task == "detection" else run.card.classes


def network_of(run: Run) -> str:
    """Modality, form and width of its network."""
    stream = "flow" if run.card.modality == "flow" else "RGB"
    return f"{stream}, I3D {run.card.model.temporal.replace('_', '-')}, width {run.card.model.width:g}"


def series(run: Run, kind: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs, and the values of a key at them."""
    lines = [line for line in run.of_kind(kind) if key in line]
    steps = max(line["step"] for line in run.lines)
    return [line["step"] / steps * run.config.epochs for line in lines], [line[key] for line in lines]


def speed(runs: Sequence[Run]) -> dict[str, str]:
    """The charts of throughput and of the time that training waited for data."""
    return {
        "throughput": charts.bars({run.name: _median(run, "clips_per_s") for run in runs}, "training clips/s, median"),
        "waiting": charts.bars(
            {run.name: 100 * _median(run, "data_wait") for run in runs}, "% of the time waiting for data"
        ),
    }


def _median(run: Run, key: str) -> float:
    return float(np.median([line[key] for line in run.of_kind("train")]))
