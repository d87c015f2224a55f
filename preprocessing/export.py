"""Shards for other software: the index files of DALI's WebDataset reader, and a Parquet data set of encoded videos."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError, explain_os_error
from ..storage import LocalStorage, Storage, refuse_inside, refuse_private, storage_at
from . import engines
from .shards import Corrupt, Dataset

ROW_GROUP_BYTES = 32 << 20  # of payload: what a reader must hold to get at one video, and a worker to write it
MAX_VALUE_BYTES = (1 << 31) - (1 << 20)  # Arrow's binary type and Parquet's page sizes count in int32

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("label", pa.int64()),  # Hugging Face stores class labels in 64 bits
        ("class", pa.string()),
        (
            "annotations",
            pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("label", pa.int64())])),
        ),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("video", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)
_FROM_INDEX = ["key", "split", "label", "annotations", "num_frames", "fps", "width", "height", "codec"]
_REPAIR = "`genkd verify` names all that is damaged, `genkd shard ... --repair` makes it anew"
_PLAN = "_export.json"  # readers of a folder of Parquet files pass over names that begin with an underscore


# --- DALI ------------------------------------------------------------------------------------------------------------


def dali_index(tar_path: Path) -> bytes:
    """The index of a shard for `fn.readers.webdataset(paths=[SHARD.tar], index_paths=[SHARD.idx])`.

    The format is v1.2 of DALI's own tool wds2idx: "v1.2 SAMPLES", then a line a sample of "EXTENSION OFFSET SIZE NAME"
    for each of its members. Only the tar's headers are read. DALI splits the lines at white space and uses NAME in
    messages alone, so white space in it is written as %20 (wds2idx leaves it, and DALI refuses the file).

    Without an index DALI walks the whole chain of headers at every start. A shard without samples has an index that
    says 0; DALI refuses such a shard with or without an index, so leave it out of its lists.

    Raises UserError if the file is no tar file.
    """
    lines: list[list[str]] = []
    last = None
    try:
        with tarfile.open(tar_path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isreg() or not stem:
                    continue
                if (folder, stem) != last:
                    lines.append([])
                    last = folder, stem
                shown = re.sub(r"[ \t\n\v\f\r]", lambda space: f"%{ord(space[0]):02X}", member.name)
                lines[-1].append(f"{extension} {member.offset_data} {member.size} {shown}")
    except tarfile.TarError as error:
        raise UserError(f"{tar_path} cannot be read as a tar file ({error}); make the data set again") from None
    text = "".join(" ".join(line) + "\n" for line in lines)
    return f"v1.2 {len(lines)}\n{text}".encode("utf-8", "surrogateescape")


# --- Parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportSummary:
    """A finished export. payload_bytes: of the encoded videos; resumed_files: found finished by an earlier run."""

    out: str
    files: int
    videos: int
    payload_bytes: int
    resumed_files: int


@dataclass(frozen=True)
class _FileTask:
    """One Parquet file: the videos of one shard, in the shard's order."""

    dataset: str
    index_digest: str
    split: str
    shard: str
    out: str
    name: str
    row_group_bytes: int


def export_parquet(
    dataset_path: str | Path,
    out: str | Path,
    *,
    workers: int,
    split: str | None = None,
    row_group_bytes: int = ROW_GROUP_BYTES,
    on_start: Callable[[int, int], None] = lambda videos, done: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> ExportSummary:
    """Writes a data set, or one split of it, as Parquet files with the encoded videos and their labels.

    Both places are paths or fsspec URLs.

    OUT/data/SPLIT-00000-of-00016.parquet, one file a shard, is the layout that Hugging Face datasets takes splits
    from, whatever their names; and because the split is a column and not a folder `split=...`, a single file is
    complete, and pyarrow, DuckDB and Ray Data need no partitioning options (a column that is also such a folder is
    an error to pyarrow). The columns are COLUMNS; `label` is -1 and `class` null where a video has none. The schema's
    metadata makes `label` a ClassLabel and `video` a Video for Hugging Face; others ignore it. The bytes are stored
    as they are, uncompressed, in row groups of at most row_group_bytes (or one video); a worker needs about three
    times the memory of the largest.

    Every checksum is verified on the way. A killed run continues where it stopped; the same data set gives the same
    bytes for any number of workers. on_start gets the number of videos and how many earlier runs finished.

    Raises Corrupt for a payload that is not what the index says, UserError if `dataset_path` is no finished data set,
    or `out` holds something else or is being written.
    """
    if not 0 < row_group_bytes <= 1 << 30:
        raise ValueError(f"row_group_bytes {row_group_bytes} is not between 1 and {1 << 30}")
    dataset, target = Dataset.open(dataset_path), storage_at(out)
    source = dataset.storage
    refuse_inside(target, source)
    for place in (source, target):
        refuse_private(place, workers)
    rows = dataset.rows(split) if split is not None else np.arange(dataset.table.num_rows)
    _check_rows(dataset, rows)
    files = _files(dataset, rows)
    digest = dataset.info["index_digest"]
    try:
        _is_begun(target)
        with target.locked():
            _adopt(target, _plan(dataset, split, row_group_bytes, len(files)))
            target.remove_leftovers("")
            target.remove_leftovers("data")
            done = {name for name in target.names("data") if name in files and _is_whole(target, name, files[name][2])}
            on_start(len(rows), sum(files[name][2] for name in done))
            tasks = [
                _FileTask(source.name, digest, *files[name][:2], target.name, name, row_group_bytes)
                for name in files
                if name not in done
            ]
            for _ in engines.run_local(_export_shard, tasks, min(workers, len(tasks)), on_videos):
                pass
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {target}")) from None
    payload_bytes = int(dataset.column("size")[rows].sum())
    return ExportSummary(target.name, len(files), len(rows), payload_bytes, len(done))


def hugging_face_features(classes: list[str]) -> dict[str, Any]:
    """COLUMNS as the features of Hugging Face datasets, in the form that it keeps in a schema's metadata."""
    features: dict[str, Any] = {
        field.name: {"dtype": {"double": "float64"}.get(str(field.type), str(field.type)), "_type": "Value"}
        for field in COLUMNS
    }
    seconds, number = {"dtype": "float64", "_type": "Value"}, {"dtype": "int64", "_type": "Value"}
    label = {"names": classes, "_type": "ClassLabel"} if classes else number
    features["label"] = label
    # A list of one feature, unlike {"_type": "List"}, is read by every version.
    features["annotations"] = [{"start_s": seconds, "end_s": seconds, "label": label}]
    features["video"] = {"_type": "Video"}
    return features


def _check_rows(dataset: Dataset, rows: np.ndarray) -> None:
    """Finds before anything is written what could not be written."""
    sizes, labels = dataset.column("size")[rows], dataset.labels[rows]
    if len(too_large := rows[sizes > MAX_VALUE_BYTES]):
        key = dataset.table["key"][too_large[0]].as_py()
        raise UserError(
            f"{key} of {dataset.storage} has {sizes.max()} bytes, and a Parquet value at most 2 GiB; "
            "make the data set with a lower --short-side"
        )
    if len(unknown := rows[(labels >= len(dataset.classes))]):
        key = dataset.table["key"][unknown[0]].as_py()
        raise Corrupt(
            f"{key} of {dataset.storage} has label {labels.max()}, and dataset.json names only "
            f"{len(dataset.classes)} classes; make the data set again"
        )


def _files(dataset: Dataset, rows: np.ndarray) -> dict[str, tuple[str, str, int]]:
    """File name -> (split, shard, number of their videos)."""
    columns = dataset.table.select(["split", "shard"]).take(rows)
    counted = columns.group_by(["split", "shard"]).aggregate([([], "count_all")])
    by_split: dict[str, list[tuple[str, str, int]]] = {}
    for split in counted["split"].to_pylist():
        if "/" in split or "\\" in split or split.startswith("."):
            raise Corrupt(f"{dataset.storage} has a split {split!r}, whose file would lie outside the export")
    for entry in sorted((row["split"], row["shard"], row["count_all"]) for row in counted.to_pylist()):
        by_split.setdefault(entry[0], []).append(entry)
    return {
        f"{split}-{number:05d}-of-{len(entries):05d}.parquet": entry
        for split, entries in by_split.items()
        for number, entry in enumerate(entries)
    }


def _plan(dataset: Dataset, split: str | None, row_group_bytes: int, files: int) -> dict[str, Any]:
    return {
        "genkd_export": 1,
        "name": dataset.info["name"],
        "index_digest": dataset.info["index_digest"],
        "classes": dataset.classes,
        "split": split,
        "row_group_bytes": row_group_bytes,
        "files": files,
    }


def _is_begun(target: Storage) -> bool:
    """Whether an export was begun there. Raises UserError if other things are there instead."""
    if target.exists(_PLAN):
        return True
    strangers = [name for name in target.names() if not name.startswith(".lock") and not name.endswith(".tmp")]
    if strangers:
        raise UserError(f"{target} is not empty and holds no export (found {strangers[0]!r}); choose another folder")
    return False


def _adopt(target: Storage, plan: dict[str, Any]) -> None:
    """Begins an empty folder with this plan, or continues a folder that has the same one."""
    if not _is_begun(target):
        target.write_json(_PLAN, plan)
        return
    try:
        old = json.loads(target.read(_PLAN))
    except (json.JSONDecodeError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{target}/{_PLAN} is damaged; delete {target} and run again")
    changed = sorted(name for name in old.keys() | plan.keys() if old.get(name) != plan.get(name))
    if changed:
        raise UserError(
            f"{target} holds another export (its {', '.join(changed)} differ); choose another folder, "
            "delete that one, or use the same settings to continue it"
        )


def _is_whole(target: Storage, name: str, videos: int) -> bool:
    """Files are whole or absent; on a local disk, where anybody may have cut one, its end is looked at too."""
    if not isinstance(target, LocalStorage):
        return True
    try:
        return pq.read_metadata(target.path / "data" / name).num_rows == videos
    except pa.ArrowInvalid:
        return False


@functools.lru_cache(maxsize=1)
def _opened(place: str, index_digest: str) -> Dataset:
    """The data set with this index; a worker reads that once, for it may come from afar."""
    return Dataset.open(place)


def _export_shard(task: _FileTask, report: engines.Report) -> None:
    """Writes one Parquet file."""
    dataset = _opened(task.dataset, task.index_digest)
    in_file = pc.and_(pc.equal(dataset.table["shard"], task.shard), pc.equal(dataset.table["split"], task.split))
    rows = pc.indices_nonzero(in_file).to_numpy()
    rows = rows[np.argsort(dataset.column("offset")[rows], kind="stable")]
    dataset.video(int(rows[0]))  # raises Corrupt for a shard that lies outside the data set
    features = {"info": {"features": hugging_face_features(dataset.classes)}}
    schema = COLUMNS.with_metadata({"huggingface": json.dumps(features)})
    leaves = [name for name in _FROM_INDEX if name != "annotations"] + ["class", "video.path"]
    leaves += [f"annotations.list.element.{name}" for name in ("start_s", "end_s", "label")]
    with (
        _shard(dataset, task.shard) as shard,
        storage_at(task.out).uploading(f"data/{task.name}") as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression={"video.bytes": "none", **dict.fromkeys(leaves, "zstd")},
            use_dictionary=["split", "class", "codec"],
            write_statistics=leaves,  # the least and the greatest video would tell nobody anything
            write_page_index=True,
            write_batch_size=1,  # so that a page ends after the first video that fills it
        ) as writer,
    ):
        for group in _row_groups(dataset.column("size")[rows], task.row_group_bytes):
            writer.write_table(_table(dataset, shard, rows[group], schema, report))


@contextlib.contextmanager
def _shard(dataset: Dataset, name: str) -> Iterator[BinaryIO]:
    """A shard, opened. Raises Corrupt if it is missing."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(stack.enter_context(dataset.storage.downloaded(f"shards/{name}")), "rb"))
        except FileNotFoundError:
            raise Corrupt(f"shard {name} of {dataset.storage} is missing; {_REPAIR}") from None
        yield file


def _row_groups(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Consecutive runs whose sizes sum up to at most `most`, or that are a single one."""
    start = total = 0
    for at, size in enumerate(sizes.tolist()):
        if at > start and total + size > most:
            yield slice(start, at)
            start, total = at, 0
        total += size
    yield slice(start, len(sizes))


def _table(dataset: Dataset, shard: BinaryIO, rows: np.ndarray, schema: pa.Schema, report: engines.Report) -> pa.Table:
    known = dataset.table.select(_FROM_INDEX).take(rows).combine_chunks()
    label = known["label"].cast(pa.int64())
    names = pa.array(dataset.classes, pa.string())
    columns = {name: known[name] for name in _FROM_INDEX} | {
        "label": label,
        "class": names.take(pc.if_else(pc.less(label, 0), None, label)),
        "video": pa.StructArray.from_arrays(
            [
                _payloads(dataset, shard, rows, report),
                pc.binary_join_element_wise(known["key"].combine_chunks(), ".mp4", ""),
            ],
            fields=list(schema.field("video").type),
        ),
    }
    return pa.table({field.name: _as_type(columns[field.name], field.type) for field in schema}, schema=schema)


def _as_type(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return column if column.type == kind else column.cast(kind)


def _payloads(dataset: Dataset, shard: BinaryIO, rows: np.ndarray, report: engines.Report) -> pa.Array:
    """The encoded videos of these rows, read into one buffer that the array then uses. Raises Corrupt."""
    keys = dataset.table["key"].take(rows).to_pylist()
    starts, sizes, sums = (dataset.column(name)[rows].tolist() for name in ("offset", "size", "crc32c"))
    where = f"shard {dataset.table['shard'][int(rows[0])]} of {dataset.storage}"
    there = shard.seek(0, io.SEEK_END)
    # Asked first: a damaged size must not ask for memory.
    for key, start, size in zip(keys, starts, sizes, strict=True):
        if start < 0 or size < 0 or start + size > there:
            raise Corrupt(f"{key}: the index points past the end of {where}; {_REPAIR}")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    data = np.empty(ends[-1], np.uint8)
    for number, key in enumerate(keys):
        shard.seek(starts[number])
        piece = shard.read(sizes[number])
        if google_crc32c.value(piece) != sums[number]:
            raise Corrupt(f"{key}: its bytes in {where} do not match the checksum of the index; {_REPAIR}")
        data[ends[number] : ends[number + 1]] = np.frombuffer(piece, np.uint8)
        report(1)
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(pa.binary(), len(rows), [None, offsets, pa.py_buffer(data)])
