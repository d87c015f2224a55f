"""What a training run has on record about its weights: their evaluation, and their numbers while training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import read_json, sha256_of
from ..trainers import metrics
from .scores import RESULTS_FILE

log = logging.getLogger(__name__)

_BEST = "best"
_SHOWN = ("epoch", "step", "top1", "top5", "loss")
_SHOWN_DETECTOR = ("epoch", "step", "map", "map_0.5")
DETECTIONS_FILE = "detections.json"


def run_folder(weights: Path) -> Path | None:
    """The training run that a weights file belongs to: RUN/weights/FILE or RUN/best/FILE beside RUN/config.yaml; None
    for others."""
    folder = weights.resolve().parent
    return folder.parent if folder.name in ("weights", _BEST) and (folder.parent / "config.yaml").is_file() else None


def evaluation(run: Path, weights: Path) -> dict[str, Any] | None:
    """RUN/evaluation/results.json if it is of these weights, by their SHA-256; None, and a warning, if it is of others.

    Raises UserError for a file that is damaged, or that is of several splits.
    """
    path = run / "evaluation" / RESULTS_FILE
    if not path.is_file():
        return None
    again = f"evaluate {weights} into {path.parent} again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged; remove it, or {again}")
    if "splits" in values:
        raise UserError(f"{path} is of several runs' splits; evaluate this run alone into {path.parent}")
    if values.get("weights_sha256") != sha256_of(weights):
        log.warning("%s is of other weights than %s, so its metrics are left out; %s", path, weights, again)
        return None
    return values


def detections(run: Path, weights: Path) -> dict[str, Any] | None:
    """RUN/evaluation/detections.json, what `genkd detect` found with these weights, by their SHA-256; None, and a
    warning, if it is of others or does not tell. Raises UserError for a damaged file."""
    path = run / "evaluation" / DETECTIONS_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    about = values.get("genkd") if isinstance(values, dict) else None
    if not isinstance(about, dict) or about.get("weights_sha256") != sha256_of(weights):
        log.warning("%s is of other weights than %s, or does not tell, so it is left out; run genkd detect into it "
                    "again", path, weights)  # fmt: skip
        return None
    return values


def lines(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, none where there is no such file. Raises UserError for a damaged one."""
    try:
        found = metrics.read(run)
    except ValueError:
        found = [{}]
    if not all(isinstance(line, dict) and {"kind", "step"} <= line.keys() for line in found):
        raise UserError(f"{run / 'metrics.jsonl'} is damaged; remove it, or let the run finish")
    return found


def training(run: Path, config: TrainConfig, weights: Path | None = None) -> dict[str, Any] | None:
    """What training measured of the weights it kept: {"epoch", "step", "top1", "top5", "loss"}, of a detector {"epoch",
    "step", "map", "map_0.5"}; None if nothing.

    That is the best evaluation for weights from RUN/best and those of a run with keep=best, else the last. weights: a
    file of the run, its finished weights by default. Raises UserError for damaged files.
    """
    found = [line for line in lines(run) if line["kind"] == "eval"]
    if config.keep == "best" or (weights is not None and weights.resolve().parent.name == _BEST):
        epoch = _best_epoch(run)
        found = [line for line in found if line.get("epoch") == epoch]
    if not found:
        return None
    shown = _SHOWN_DETECTOR if config.detects else _SHOWN
    if not set(shown) <= found[-1].keys():
        raise UserError(f"{run / 'metrics.jsonl'} is damaged; remove it, or let the run finish")
    return {key: found[-1][key] for key in shown}


def _best_epoch(run: Path) -> int | None:
    path = run / _BEST / "best.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["epoch"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or let the run finish") from None
