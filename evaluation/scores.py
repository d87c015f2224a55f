"""scores.parquet: the class scores of every video of an evaluation, in files that describe themselves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import replacing
from .metrics import RecognitionResult

SCORES_FILE, RESULTS_FILE = "scores.parquet", "results.json"
_METADATA = b"genkd"


@dataclass(frozen=True)
class ScoreFile:
    """Scores (V,K) and labels (V,) of V videos by key, logits (V,T',K) where the file has them, and its metadata."""

    path: Path
    keys: list[str]
    labels: np.ndarray
    scores: np.ndarray
    logits: np.ndarray | None
    about: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return self.about["classes"]

    def take(self, order: np.ndarray) -> ScoreFile:
        """The same videos in another order."""
        logits = None if self.logits is None else self.logits[order]
        keys = [self.keys[number] for number in order]
        return ScoreFile(self.path, keys, self.labels[order], self.scores[order], logits, self.about)


def write_scores(
    path: Path, result: RecognitionResult, keys: pa.ChunkedArray | list[str], about: dict[str, Any]
) -> None:
    """Per-video scores as Parquet: key, label, prediction, scores list<double> in class order, and, where the result
    has logits, logits list<list<float>> of T' x K. about: JSON values, kept as the file's metadata `genkd`."""
    columns = {
        "key": keys,
        "label": pa.array(result.labels, pa.int32()),
        "prediction": pa.array(result.scores.argmax(1), pa.int32()),
        "scores": _lists(pa.array(result.scores.ravel(), pa.float64()), result.scores.shape[1]),
    }
    if result.logits is not None:
        _, steps, classes = result.logits.shape
        columns["logits"] = _lists(_lists(pa.array(result.logits.ravel(), pa.float32()), classes), steps)
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about).encode()})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_scores(path: Path) -> ScoreFile:
    """What write_scores wrote. Raises UserError for anything else, and for a key that is there twice."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no readable Parquet file ({error}); evaluate again with --out") from None
    missing = [name for name in ("key", "label", "scores") if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; give it a scores.parquet of `genkd evaluate` or `fuse`")
    metadata = (table.schema.metadata or {}).get(_METADATA)
    if metadata is None:
        raise UserError(f"{path} does not say which classes its scores are of; evaluate again with --out")
    try:
        about = json.loads(metadata)
        classes = len(about["classes"])
        keys, labels = table["key"].to_pylist(), table["label"].to_numpy().astype(np.int64)
        scores = _array(table["scores"], (classes,))
        logits = _array(table["logits"], (-1, classes)) if "logits" in table.column_names else None
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} contradicts itself ({error}); evaluate again with --out") from None
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise UserError(f"{path} has the video {twice} twice; evaluate again with --out")
    return ScoreFile(path, keys, labels, scores, logits, about)


def holds_videos(path: Path, count: int | None) -> bool:
    """Whether a file is Parquet with this many rows, as far as its footer, which is written last, tells."""
    try:
        return pq.read_metadata(path).num_rows == count
    except (OSError, pa.ArrowException):
        return False


def score_files(place: Path) -> list[Path]:
    """The score files of a place: a file, a folder that holds one, or one with 1, 2, ... of an evaluation of several
    splits, which has to be finished. Raises UserError."""
    if place.is_file():
        return [place]
    if (place / SCORES_FILE).is_file():
        return [place / SCORES_FILE]
    splits = split_folders(place)
    if not splits:
        raise UserError(f"{place} holds no {SCORES_FILE}; `genkd evaluate recognition WEIGHTS --out {place}` makes one")
    results = read_results(place)
    if results is None or len(results.get("splits", ())) != len(splits):
        raise UserError(f"{place} holds an evaluation that has not finished; run its command again")
    return [folder / SCORES_FILE for folder in splits]


def split_folders(place: Path) -> list[Path]:
    """The folders 1, 2, ... that hold the splits' scores."""
    found: list[Path] = []
    while ((folder := place / str(len(found) + 1)) / SCORES_FILE).is_file():
        found.append(folder)
    return found


def read_results(folder: Path) -> dict[str, Any] | None:
    """A folder's results.json; None where there is none that can be read."""
    try:
        values = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def refuse_other_layout(out: Path, splits: int) -> None:
    """Raises UserError where `out` holds results of another number of splits, which would stay beside these."""
    if splits == 1:
        if split_folders(out):
            raise UserError(f"{out} holds the results of several splits; choose another --out, or remove it")
    elif (out / SCORES_FILE).exists():
        raise UserError(f"{out} holds the results of one evaluation; choose another --out, or remove it")
    elif len(split_folders(out)) > splits:
        raise UserError(f"{out} holds results of more splits than these {splits}; choose another --out, or remove it")


def _lists(values: pa.Array, length: int) -> pa.ListArray:
    """values as lists of one length."""
    offsets = np.arange(0, len(values) + 1, length, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values)


def _array(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """A column of nested lists, all of one shape, as an array (V, *shape); -1 takes any length that all share."""
    values, sizes = column.combine_chunks(), [len(column)]
    for wanted in shape:
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1 or None in lengths or (wanted >= 0 and lengths not in ([], [wanted])):
            raise ValueError(f"lists of {lengths} values where {wanted if wanted >= 0 else 'one length'} is due")
        sizes.append(lengths[0] if lengths else max(wanted, 0))
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(sizes)
