"""What is in a data set, in numbers: splits, classes, durations, sizes, codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..errors import UserError
from .index import ERROR_SCHEMA, Corrupt, read_parquet
from .shards import Dataset


def inspect(path: str | Path) -> dict[str, Any]:
    """Counts and distributions as JSON values. Raises UserError if `path` is no finished data set.

    splits: videos, frames, seconds and bytes of each; classes: videos a split of each; actions: the same of the actions
    in untrimmed videos, empty without any; duration_s, fps, width, height
    and gop_frames: minimum, median, maximum; rejected: number of rejected sources by reason.
    """
    dataset = Dataset.open(path, checked=True)
    table = dataset.table
    frames, fps = dataset.num_frames, dataset.column("fps")
    splits = table["split"].to_numpy(zero_copy_only=False)
    offsets = table["gop_frames"].combine_chunks()
    lengths = np.diff(offsets.values.to_numpy())
    lengths = lengths[lengths > 0]  # each list ends above where the next begins
    storage = dataset.storage
    try:
        errors = read_parquet(storage.read("errors.parquet"), ERROR_SCHEMA)
    except FileNotFoundError:
        raise UserError(f"{storage} has lost its errors.parquet; run the same `genkd shard` command again") from None
    except Corrupt as error:
        raise UserError(f"errors.parquet in {storage} {error}; run the same `genkd shard` command again") from None
    return {
        "name": dataset.info["name"],
        "format_version": dataset.info["format_version"],
        "modality": dataset.info.get("modality", "rgb"),
        "video": dataset.info["video"],
        "splits": dataset.info["splits"],
        "shards": len(set(table["shard"].to_pylist())),
        "classes": {
            name: {
                split: int(((dataset.labels == label) & (splits == split)).sum()) for split in dataset.info["splits"]
            }
            for label, name in enumerate(dataset.classes)
        },
        "actions": _actions(dataset, splits),
        "codecs": {entry["values"]: entry["counts"] for entry in pc.value_counts(table["codec"]).to_pylist()},
        "duration_s": _spread(frames / fps),
        "fps": _spread(fps),
        "width": _spread(dataset.column("width")),
        "height": _spread(dataset.column("height")),
        "gop_frames": _spread(lengths),
        "bytes_per_video": _spread(dataset.column("size")),
        "rejected": {entry["values"]: entry["counts"] for entry in pc.value_counts(errors["stage"]).to_pylist()},
    }


def _actions(dataset: Dataset, splits: np.ndarray) -> dict[str, dict[str, int]]:
    annotations = dataset.table["annotations"].combine_chunks()
    labels = pc.struct_field(pc.list_flatten(annotations), "label").to_numpy()
    of_action = splits[pc.list_parent_indices(annotations).to_numpy()]
    return {
        name: {split: int(((labels == label) & (of_action == split)).sum()) for split in dataset.info["splits"]}
        for label, name in enumerate(dataset.classes)
        if len(labels)
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return {"min": round(float(low), 3), "median": round(float(middle), 3), "max": round(float(high), 3)}
