"""Scores videos from several views."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import nn

from ..configs.schema import DataConfig
from ..errors import UserError
from ..files import prepare_folder, sha256_of, write_json
from ..models.checkpoints import ModelCard, find_weights, load_recognizer, read_card
from ..pipelines.loader import Loader
from ..pipelines.streams import is_flow
from ..preprocessing.shards import Dataset
from ..trainers import distributed
from ..trainers.distributed import Ranks
from .metrics import RecognitionResult, score, to_json
from .scores import RESULTS_FILE, SCORES_FILE, refuse_other_layout, write_scores

_NAMES = {"rgb": "RGB", "flow": "optical flow"}


@dataclass(frozen=True)
class Settings:
    """How videos are scored: the mean of clips x crops views each, batch_size of them at a time over all ranks."""

    split: str = "test"
    clips: int = 10
    crops: int = 1
    batch_size: int = 16
    precision: str = "auto"


class Unwritten(UserError):
    """Metrics were measured but could not be written. values: those metrics as JSON values."""

    def __init__(self, text: str, values: dict[str, Any]):
        super().__init__(text)
        self.values = values


class Progress(Protocol):
    """What is told of the clips that there are, and then of those that are done."""

    def start(self, total: int) -> None: ...

    def add(self, items: int) -> None: ...


def evaluate(
    model: nn.Module,
    loader: Loader,
    place: Ranks,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda clips: None,
    *,
    keep_logits: bool = False,
) -> RecognitionResult:
    """Runs every view of every video of an evaluation loader, averages the scores of a video's views.

    Each video counts once whatever the number of ranks; the result is the same on all of them. keep_logits: average
    the logits (V,T',K) too. Raises UserError for scores that are not finite.
    """
    number_of = {int(row): number for number, row in enumerate(loader.rows)}
    sums = torch.zeros(len(loader.rows), len(loader.dataset.classes), dtype=torch.float64, device=place.device)
    logits = None
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in loader:
            place.alive()
            with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                clips = batch.clips.float() if dtype == torch.float32 else batch.clips
                output = model(clips)
            where = torch.tensor([number_of[int(row)] for row in batch.ids[: batch.count]], device=place.device).long()
            sums.index_add_(0, where, output.scores[: batch.count].double())
            if keep_logits:
                own = output.logits[: batch.count].float().transpose(1, 2)
                if logits is None:
                    logits = torch.zeros(len(sums), *own.shape[1:], device=place.device)
                logits.index_add_(0, where, own)
            on_batch(batch.count)
    model.train(training)
    place.waits("waits for the others' scores")
    views = loader.views[0] * loader.views[1]
    data, rows = loader.dataset, loader.rows
    result = score(rows, (place.sum(sums) / views).cpu().numpy(), data.labels[rows], data.table["key"].take(rows))
    if logits is None:
        return result
    return replace(result, logits=(place.sum(logits) / views).cpu().numpy())


def evaluate_weights(
    weights: Path,
    dataset: str | Path,
    out: Path | None = None,
    *,
    split: str = "test",
    clips: int = 10,
    crops: int = 1,
    batch_size: int = 16,
    precision: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of stored weights on a split, as JSON values; with `out` also results.json and scores.parquet there.

    Clips are made as in the run that the weights come from; each video is scored as the mean of clips x crops views.
    Raises UserError, before the first clip, for a data set of other classes or another modality, an unknown split,
    videos without one of the classes, an `out` that cannot be written; Unwritten, which holds the metrics, where
    writing fails all the same.
    """
    if out is not None:
        refuse_other_layout(out, 1)
    settings = Settings(split, clips, crops, batch_size, precision)
    with distributed.ranks(device) as place, contextlib.closing(Task(weights, dataset, settings, place)) as task:
        if out is not None:
            place.on_main(lambda: prepare_folder(out))
        return task.run(out, progress)


class Task:
    """Weights, a data set and how to score it, found to fit each other. Close it.

    Raises UserError for what does not fit.
    """

    def __init__(self, weights: Path, dataset: str | Path, settings: Settings, place: Ranks):
        self.weights, self.settings, self.place = weights, settings, place
        self.card = read_card(weights)
        self.data = Dataset.open(dataset)
        config = data_config(self.card)
        _refuse_unsuitable(weights, self.card, self.data, settings.split)
        self.dtype = distributed.precision(settings.precision, place.device)
        self.loader = Loader(
            self.data, settings.split, config, batch_size=settings.batch_size, training=False, rank=place.rank,
            world_size=place.world_size, device=place.device, views=(settings.clips, settings.crops),
        )  # fmt: skip
        self.about = {
            "weights": str(weights), "weights_sha256": sha256_of(find_weights(weights)), "dataset": str(dataset),
            "index_digest": self.data.info["index_digest"], "modality": self.card.modality, "split": settings.split,
            "clips": settings.clips, "crops": settings.crops, "batch_size": settings.batch_size,
            "compat": self.card.compat, "decoder": self.loader.decoder,
            "precision": str(self.dtype).removeprefix("torch."), "device": place.device.type,
        }  # fmt: skip

    def run(self, out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """The metrics as JSON values. Writes scores.parquet and, when that is whole, results.json into `out`; raises
        Unwritten where that fails."""
        model, _ = load_recognizer(self.weights)
        model.to(self.place.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if progress:
            progress.start(self.loader.count)
        started = time.perf_counter()
        result = evaluate(
            model, self.loader, self.place, self.dtype, progress.add if progress else lambda clips: None,
            keep_logits=out is not None,
        )  # fmt: skip
        elapsed = time.perf_counter() - started
        about = {
            **self.about,
            "clips_per_s": round(self.loader.count / elapsed, 2),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        values = to_json(result, self.card.classes, about)
        if out is not None:
            write_results(self.place, lambda: self._write(out, result, values), values)
        return values

    def close(self) -> None:
        """Ends the loader's threads."""
        self.loader.close()

    def _write(self, out: Path, result: RecognitionResult, values: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        # results.json says that the scores beside it are its own.
        (out / RESULTS_FILE).unlink(missing_ok=True)
        kept = ("modality", "split", "clips", "crops", "weights", "weights_sha256", "dataset", "index_digest", "compat")
        about = {
            "classes": list(self.card.classes), **{name: self.about[name] for name in kept},
            "model": self.card.model.model_dump(mode="json"),
        }  # fmt: skip
        write_scores(out / SCORES_FILE, result, self.data.table["key"].take(result.rows), about)
        write_json(out / RESULTS_FILE, values)


def write_results(place: Ranks, write: Callable[[], None], values: dict[str, Any]) -> None:
    """Runs `write` on the main rank; what it cannot do is raised on all as Unwritten, with the values."""
    try:
        place.on_main(write)
    except UserError as error:
        raise Unwritten(str(error), values) from None


def data_config(card: ModelCard) -> DataConfig:
    """How clips are made for stored weights: as their data settings say, but of the card's own frames and size, which
    the network is built for; the decoder is this machine's choice. Raises UserError for settings that
    this version does not know."""
    own = {"clip_length": card.clip_length, "size": card.size, "decoder": "auto"}
    try:
        return DataConfig.model_validate_json(json.dumps({**card.data, **own}), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("data", *first["loc"])))
        raise UserError(
            f"the weights' own settings do not fit this version of genkd: {where}: {first['msg']}"
        ) from None


def _refuse_unsuitable(weights: Path, card: ModelCard, data: Dataset, split: str) -> None:
    """Raises UserError where weights cannot be evaluated on a split."""
    place, classes = data.storage, tuple(data.classes)
    if classes != card.classes:
        if sorted(classes) == sorted(card.classes):
            label = next(n for n, pair in enumerate(zip(card.classes, classes, strict=True)) if len(set(pair)) > 1)
            raise UserError(
                f"{place} has the classes of {weights} in another order (label {label} is {classes[label]!r}, not "
                f"{card.classes[label]!r}); make the data set again with the weights' own class list"
            )
        strange = [name for name in classes if name not in set(card.classes)]
        example = f", e.g. {strange[0]!r}" if strange else ""
        raise UserError(
            f"{weights} knows {len(card.classes)} classes, {place} has {len(classes)} others{example}; use its own data"
        )
    held = "flow" if is_flow(data) else "rgb"
    if held != card.modality:
        other = f"`genkd flow {place} OUT` makes one" if held == "rgb" else "give it the RGB data set"
        raise UserError(f"{weights} takes {_NAMES[card.modality]}, but {place} holds {_NAMES[held]}; {other}")
    require_classes(data, split)


def require_classes(data: Dataset, split: str) -> None:
    """Raises UserError for an unknown or empty split, and for videos in it that have none of the data set's classes."""
    rows = data.rows(split)
    labels, count = data.labels[rows], len(data.classes)
    bad = rows[(labels < 0) | (labels >= count)]
    if len(bad):
        label, key = data.labels[bad[0]], data.table["key"][int(bad[0])].as_py()
        what = "without a class" if (data.labels[bad] < 0).all() else f"with labels outside 0..{count - 1}"
        raise UserError(
            f"{len(bad)} of the {len(rows)} videos in split {split!r} of {data.storage} are {what}, e.g. {key} with "
            f"label {label}; recognition needs one class each, so make the split without them"
        )
