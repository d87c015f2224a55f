"""Late fusion: the class scores of several networks, such as the RGB and the flow stream, made into one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import prepare_folder, write_json
from .metrics import RecognitionResult, paired_difference, score, summary, to_json
from .scores import RESULTS_FILE, SCORES_FILE, ScoreFile, read_scores, refuse_other_layout, score_files, write_scores

log = logging.getLogger(__name__)

RULES = ("scores", "logits", "reference")
SEARCHED = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # weights of the second stream


def fuse(streams: Sequence[np.ndarray], weights: Sequence[float], rule: str) -> np.ndarray:
    """Fused class scores (V,K), rows that sum to 1, of two or more streams.

    rule "scores": streams are scores (V,K); the weighted mean of each one's scores divided by their sum.
    rule "logits": streams are logits (V,T',K), T' may differ; softmax of the weighted mean of the time-averaged logits.
    rule "reference": streams are logits (V,T',K) of one T'; the original implementation's rule: logits times weights
    are added, softmax over the classes, sum over time, softmax again. Weights are not normalized there: 1, 1 is the
    original's. It fuses every view by itself, so means over several views of a video are not quite the same.
    Raises UserError for unknown rules, shapes that differ, weights of another number, negative or all 0.
    """
    _refuse_weights(weights, len(streams))
    if rule == "scores":
        _refuse_shapes(streams, 2)
        shares = [stream / stream.sum(1, keepdims=True) for stream in streams]
        return _weighted(shares, np.divide(weights, np.sum(weights)))
    return _from_logits(fuse_logits(streams, weights, rule), rule)


def fuse_logits(streams: Sequence[np.ndarray], weights: Sequence[float], rule: str) -> np.ndarray:
    """What the rules "logits" (V,1,K) and "reference" (V,T',K) take softmax of; see fuse()."""
    _refuse_weights(weights, len(streams))
    if rule == "logits":
        means = [stream.astype(np.float64).mean(1, keepdims=True) for stream in streams]
        _refuse_shapes(means, 3)
        return _weighted(means, np.divide(weights, np.sum(weights)))
    if rule == "reference":
        _refuse_shapes(streams, 3)
        return _weighted(streams, weights)
    raise UserError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")


def fuse_files(
    places: Sequence[Path], weights: Sequence[float] | None = None, rule: str = "scores", out: Path | None = None,
    *, search: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fuses stored scores, a place a stream: a scores.parquet, the folder that holds one, or a folder with several
    splits' 1, 2, ..., of which each is fused by itself. weights: one a stream, all 1 by default.

    Returns, for one split, the fusion's metrics with "streams" (those of each alone), "best_single" and "difference"
    with its paired "standard_error"; for several {"splits": [those], "mean", "std", "streams", "difference"}. search:
    also "search", top-1 by the second stream's weight; that is tuned on the very videos it is measured on. With `out`
    also results.json and scores.parquet there, as of `genkd evaluate recognition`.
    Raises UserError for scores of other videos, labels or classes, and for what fuse() refuses.
    """
    if len(places) < 2:
        raise UserError("fusion takes the scores of two streams or more")
    weights = [1.0] * len(places) if weights is None else list(weights)
    _refuse_weights(weights, len(places))
    if search and len(places) != 2:
        raise UserError(f"a search varies the weight of the second of two streams, not of {len(places)}")
    files = [score_files(place) for place in places]
    if len({len(paths) for paths in files}) > 1:
        counts = ", ".join(f"{place} has {len(paths)}" for place, paths in zip(places, files, strict=True))
        raise UserError(f"the streams have different numbers of splits: {counts}")
    count = len(files[0])
    if out is not None:
        refuse_other_layout(out, count)
        _refuse_own_input(out, files)
    splits = [_Split(places, paths, rule) for paths in zip(*files, strict=True)]
    if out is not None:
        prepare_folder(out)
    found = [split.fuse(weights) for split in splits]
    values = found[0][1] if count == 1 else _together([values for _, values in found])
    if search:
        values["search"] = _search(splits)
    if out is not None:
        for number, (split, (result, split_values)) in enumerate(zip(splits, found, strict=True), 1):
            split.write(_folder(out, number, count), result, split_values)
        if count > 1:
            write_json(out / RESULTS_FILE, values)
    return values


class _Split:
    """The streams of one split, their videos in one order. Raises UserError where they are not of the same videos."""

    def __init__(self, places: Sequence[Path], paths: Sequence[Path], rule: str):
        self.names, self.rule = [str(place) for place in places], rule
        first = read_scores(paths[0])
        self.files = [first, *(_matched(first, read_scores(path)) for path in paths[1:])]
        self.single = [_scored(first, file.scores, file.path) for file in self.files]
        self.arrays = [file.scores if rule == "scores" else _logits(file) for file in self.files]
        if rule == "reference":
            _refuse_steps(self.files)
            views = {file.about.get(name) for file in self.files for name in ("clips", "crops")} - {1}
            if views:
                log.info("%s: the rule 'reference' is exact for one view a video; these scores are means over several",
                         paths[0].parent)  # fmt: skip

    def fuse(self, weights: Sequence[float]) -> tuple[RecognitionResult, dict[str, Any]]:
        """The fusion, and its metrics as JSON values."""
        logits = None if self.rule == "scores" else fuse_logits(self.arrays, weights, self.rule)
        scores = fuse(self.arrays, weights, self.rule) if logits is None else _from_logits(logits, self.rule)
        first = self.files[0]
        scored = _scored(first, scores, first.path, None if logits is None else logits.astype(np.float32))
        streams = [
            {
                "name": name, "modality": file.about.get("modality"), "weight": weight, "top1": alone.top1,
                "top5": alone.top5, "mean_class_accuracy": alone.mean_class, "loss": alone.loss, "ece": alone.ece,
            }
            for name, file, weight, alone in zip(self.names, self.files, weights, self.single, strict=True)
        ]  # fmt: skip
        best = int(np.argmax([alone.top1 for alone in self.single]))
        difference, error = paired_difference(scored.rank == 1, self.single[best].rank == 1)
        abouts = [file.about for file in self.files]
        about = {
            "rule": self.rule, "streams": streams, "best_single": self.names[best], "difference": difference,
            "standard_error": error, "modality": "+".join(str(entry.get("modality")) for entry in abouts),
            **{name: _common(abouts, name) for name in ("split", "clips", "crops", "compat")},
        }  # fmt: skip
        return scored, to_json(scored, first.classes, about)

    def write(self, folder: Path, result: RecognitionResult, values: dict[str, Any]) -> None:
        """scores.parquet and, when that is whole, results.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        about = {
            "classes": self.files[0].classes,
            **{name: values[name] for name in ("modality", "split", "clips", "crops", "compat", "rule")},
            **{name: [file.about.get(name) for file in self.files] for name in ("weights", "dataset", "model")},
            "streams": {stream["name"]: stream["weight"] for stream in values["streams"]},
        }
        write_scores(folder / SCORES_FILE, result, self.files[0].keys, about)
        write_json(folder / RESULTS_FILE, values)


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over splits, of the fusion and of each stream."""
    mean, std = summary(found)
    streams = []
    for number, first in enumerate(found[0]["streams"]):
        own_mean, own_std = summary([values["streams"][number] for values in found])
        streams.append({"name": first["name"], "weight": first["weight"], "mean": own_mean, "std": own_std})
    best = int(np.argmax([stream["mean"]["top1"] for stream in streams]))
    gains = np.array([values["top1"] - values["streams"][best]["top1"] for values in found])
    return {
        "rule": found[0]["rule"], "splits": found, "mean": mean, "std": std, "streams": streams,
        "best_single": streams[best]["name"],
        "difference": {"mean": float(gains.mean()), "std": float(gains.std(ddof=1))},
    }  # fmt: skip


def _search(splits: Sequence[_Split]) -> dict[str, Any]:
    """Top-1, a mean over splits, by the second stream's weight where the first has 1."""
    top1 = [
        float(
            np.mean([_scored(split.files[0], fuse(split.arrays, (1.0, weight), split.rule)).top1 for split in splits])
        )
        for weight in SEARCHED
    ]
    best = int(np.argmax(top1))
    return {
        "weights": list(SEARCHED), "top1": top1, "best_weight": SEARCHED[best], "best_top1": top1[best],
        "note": "best, but tuned on these very videos, so too high",
    }  # fmt: skip


def _matched(first: ScoreFile, other: ScoreFile) -> ScoreFile:
    """`other` in the order of `first`."""
    if first.classes != other.classes:
        same = sorted(first.classes) == sorted(other.classes)
        what = "the same classes in another order" if same else "other classes"
        raise UserError(
            f"{other.path} has {what} than {first.path} ({len(other.classes)} and {len(first.classes)}); fuse scores "
            "of one class list"
        )
    place = {key: number for number, key in enumerate(other.keys)}
    known = set(first.keys)
    for has, lacks, missing in (
        (first, other, [key for key in first.keys if key not in place]),
        (other, first, [key for key in other.keys if key not in known]),
    ):
        if missing:
            raise UserError(
                f"{lacks.path} lacks {len(missing)} of the {len(has.keys)} videos of {has.path}, the first is "
                f"{missing[0]}; evaluate both on the same split"
            )
    matched = other.take(np.array([place[key] for key in first.keys], np.int64))
    differing = np.flatnonzero(matched.labels != first.labels)
    if len(differing):
        number = int(differing[0])
        raise UserError(
            f"{len(differing)} of {len(first.keys)} videos have another label in {other.path} than in {first.path}, "
            f"the first is {first.keys[number]} with {matched.labels[number]} and {first.labels[number]}; make both "
            "data sets from the same lists"
        )
    return matched


def _scored(
    first: ScoreFile, scores: np.ndarray, path: Path | None = None, logits: np.ndarray | None = None
) -> RecognitionResult:
    try:
        found = score(np.arange(len(first.keys)), scores, first.labels, first.keys)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return RecognitionResult(**{**vars(found), "logits": logits})


def _logits(file: ScoreFile) -> np.ndarray:
    if file.logits is None:
        raise UserError(f"{file.path} holds no logits; use --rule scores, or evaluate again with --out")
    bad = np.flatnonzero(~np.isfinite(file.logits).all((1, 2)))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(file.keys)} videos in {file.path} have logits that are nan or infinite, the first is "
            f"{file.keys[int(bad[0])]}; evaluate again, with --precision fp32 if it was a lower one"
        )
    return file.logits


def _refuse_steps(files: Sequence[ScoreFile]) -> None:
    steps = [file.logits.shape[1] for file in files if file.logits is not None]
    for file, own in zip(files, steps, strict=True):
        if own != steps[0]:
            raise UserError(
                f"the rule 'reference' adds logits time step by time step, but {file.path} has {own} of them and "
                f"{files[0].path} {steps[0]}; use --rule logits"
            )


def _refuse_own_input(out: Path, files: Sequence[Sequence[Path]]) -> None:
    count = len(files[0])
    written = {_folder(out, number, count).resolve() for number in range(1, count + 1)}
    for path in (path for paths in files for path in paths):
        if path.resolve().parent in written:
            raise UserError(f"--out {out} would overwrite {path}, which is fused; choose another folder")


def _folder(out: Path, number: int, count: int) -> Path:
    return out / str(number) if count > 1 else out


def _refuse_weights(weights: Sequence[float], streams: int) -> None:
    if len(weights) != streams:
        raise UserError(f"{len(weights)} weights for {streams} streams; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"weights {shown}: they must be 0 or more, and not all 0")


def _refuse_shapes(streams: Sequence[np.ndarray], axes: int) -> None:
    shapes = [stream.shape for stream in streams]
    if len(set(shapes)) != 1 or len(shapes[0]) != axes:
        shown = " and ".join(str(shape) for shape in shapes)
        raise UserError(f"streams of shapes {shown} cannot be fused: {axes} equal axes are due")


def _weighted(streams: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    total = np.zeros(streams[0].shape)
    for stream, weight in zip(streams, weights, strict=True):
        total += weight * stream.astype(np.float64)
    return total


def _from_logits(logits: np.ndarray, rule: str) -> np.ndarray:
    if rule == "logits":
        return _softmax(logits.mean(1))
    return _softmax(_softmax(logits).sum(1))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def _common(abouts: Sequence[dict[str, Any]], name: str) -> Any:
    """What all score files say; None where they differ."""
    values = [about.get(name) for about in abouts]
    return values[0] if all(value == values[0] for value in values) else None
