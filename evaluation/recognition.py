"""Scores videos from several views, and the metrics of recognition."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from ..configs.schema import DataConfig
from ..errors import UserError
from ..files import write_json
from ..models.checkpoints import ModelCard, load_recognizer
from ..pipelines.loader import Loader
from ..preprocessing.shards import Dataset
from ..trainers import distributed
from ..trainers.distributed import Ranks


@dataclass(frozen=True)
class RecognitionResult:
    """Scores (V,K) and labels (V,) of V videos with their index rows, and what follows from them. Shares are 0..1."""

    rows: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    top1: float
    top5: float
    mean_class: float
    loss: float
    confusion: np.ndarray

    def per_class(self) -> np.ndarray:
        """Top-1 accuracy of each class (K,); nan for a class without a video."""
        with np.errstate(invalid="ignore"):
            return self.confusion.diagonal() / self.confusion.sum(1)


def evaluate(
    model: nn.Module,
    loader: Loader,
    place: Ranks,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda clips: None,
) -> RecognitionResult:
    """Runs every view of every video of an evaluation loader, averages the scores of a video's views.

    Each video counts once whatever the number of ranks; the result is the same on all of them.
    """
    number_of = {int(row): number for number, row in enumerate(loader.rows)}
    sums = torch.zeros(len(loader.rows), len(loader.dataset.classes), dtype=torch.float64, device=place.device)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in loader:
            with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                clips = batch.clips.float() if dtype == torch.float32 else batch.clips
                scores = model(clips).scores[: batch.count].double()
            where = torch.tensor([number_of[int(row)] for row in batch.ids[: batch.count]], device=place.device)
            sums.index_add_(0, where.long(), scores)
            on_batch(batch.count)
    model.train(training)
    sums = place.sum(sums)
    return score(
        loader.rows, (sums / (loader.views[0] * loader.views[1])).cpu().numpy(), loader.dataset.labels[loader.rows]
    )


def score(rows: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> RecognitionResult:
    """Metrics of scores (V,K) against labels (V,). Ties count against the video: a rank is the worst it could be."""
    own = scores[np.arange(len(labels)), labels]
    rank = (scores >= own[:, None]).sum(1)  # 1 is best
    classes = scores.shape[1]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[rank == 1], minlength=classes)
    normalized = np.clip(own / scores.sum(1), 1e-12, None)
    return RecognitionResult(
        rows, scores, labels,
        top1=float((rank == 1).mean()), top5=float((rank <= min(5, classes)).mean()),
        mean_class=float((hits[counts > 0] / counts[counts > 0]).mean()),
        loss=float(-np.log(normalized).mean()), confusion=confusion,
    )  # fmt: skip


def evaluate_weights(
    weights: Path,
    dataset: Path,
    out: Path | None = None,
    *,
    split: str = "test",
    clips: int = 10,
    crops: int = 1,
    batch_size: int = 16,
    precision: str = "auto",
    device: str = "auto",
    on_start: Callable[[int], None] = lambda clips: None,
    on_batch: Callable[[int], None] = lambda clips: None,
) -> dict[str, Any]:
    """Metrics of stored weights on a split, as JSON values; with `out` also results.json and scores.parquet there.

    Clips are made as in the run that the weights come from; each video is scored as the mean of clips x crops views.
    Raises UserError for a data set with other classes or an unknown split.
    """
    model, card = load_recognizer(weights)
    data = Dataset.open(dataset)
    if tuple(data.classes) != card.classes:
        raise UserError(
            f"{weights} knows {len(card.classes)} classes, {dataset} has {len(data.classes)} others; use its own data"
        )
    config = data_config(card)
    with distributed.ranks(device) as place:
        model.to(place.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        dtype = distributed.precision(precision, place.device)
        with Loader(
            data, split, config, batch_size=batch_size, training=False, rank=place.rank, world_size=place.world_size,
            device=place.device, views=(clips, crops),
        ) as loader:  # fmt: skip
            on_start(loader.count)
            started = time.perf_counter()
            result = evaluate(model, loader, place, dtype, on_batch)
            elapsed = time.perf_counter() - started
            about = {
                "weights": str(weights), "dataset": str(dataset), "split": split, "clips": clips, "crops": crops,
                "decoder": loader.decoder, "precision": str(dtype).removeprefix("torch."), "device": place.device.type,
                "clips_per_s": round(loader.count / elapsed, 2),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }  # fmt: skip
        values = to_json(result, card, about)
        if out is not None and place.is_main:
            out.mkdir(parents=True, exist_ok=True)
            write_scores(out / "scores.parquet", result, data)
            write_json(out / "results.json", values)
    return values


def data_config(card: ModelCard) -> DataConfig:
    """How clips are made for stored weights; the decoder is this machine's choice."""
    return DataConfig.model_validate_json(json.dumps({**card.data, "decoder": "auto"}), strict=False)


def to_json(result: RecognitionResult, card: ModelCard, about: dict[str, Any]) -> dict[str, Any]:
    """The metrics as JSON values, with the classes' names."""
    per_class = {
        name: {"videos": int(total), "top1": None if np.isnan(value) else round(float(value), 6)}
        for name, total, value in zip(card.classes, result.confusion.sum(1), result.per_class(), strict=True)
    }
    return {
        **about,
        "videos": len(result.rows), "top1": result.top1, "top5": result.top5,
        "mean_class_accuracy": result.mean_class, "loss": result.loss, "per_class": per_class,
        "classes": list(card.classes), "confusion": result.confusion.tolist(),
    }  # fmt: skip


def write_scores(path: Path, result: RecognitionResult, dataset: Dataset) -> None:
    """Per-video scores as Parquet: key, label, prediction, scores list<double> in class order."""
    table = pa.table(
        {
            "key": dataset.table["key"].take(result.rows),
            "label": pa.array(result.labels, pa.int32()),
            "prediction": pa.array(result.scores.argmax(1), pa.int32()),
            "scores": pa.array(list(result.scores), pa.list_(pa.float64())),
        }
    )
    pq.write_table(table, path, compression="zstd")
