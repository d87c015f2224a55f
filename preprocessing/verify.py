"""Checks a data set from end to end: index, tar members, checksums, and that every GOP decodes on its own."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..storage import Storage, storage_at
from . import engines
from .export import dali_index
from .shards import (
    Corrupt,
    Dataset,
    Payload,
    Video,
    checksum_of,
    digest_of,
    gop_table,
    is_shard_name,
    read_parquet,
    sidecar_bytes,
    tar_name,
)
from .sources import printable
from .video import decode_frames


@dataclass(frozen=True)
class Problem:
    """Something that is not as the index says. key is empty where a whole file is concerned."""

    file: str
    key: str
    what: str


def verify(
    path: str | Path, *, workers: int, on_start: Callable[[int], None] = lambda videos: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> list[Problem]:  # fmt: skip
    """Every problem of the data set, sorted; an empty list means that all of it is sound.

    Reads every byte and decodes every GOP by itself. Raises UserError if `path` is no finished data set.
    """
    dataset = Dataset.open(path)
    storage = dataset.storage
    on_start(dataset.table.num_rows)
    problems: list[Problem] = []
    index = storage.read("index.parquet") if storage.exists("index.parquet") else b""
    if digest_of(index) != dataset.info["index_digest"]:
        problems.append(Problem("index.parquet", "", "is missing, or not the file that dataset.json describes"))
    counted = {split: entry["videos"] for split, entry in dataset.info["splits"].items()}
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(dataset.table["split"]).to_pylist()}
    if counted != found:
        problems.append(Problem("dataset.json", "", f"counts {counted} videos by split, the index {found}"))
    there = set(storage.names("shards"))
    names = sorted(set(dataset.table["shard"].to_pylist()))
    for name in filter(is_shard_name, names):
        stem = name.removesuffix(".tar")
        problems += [
            Problem(f"{stem}.{suffix}", "", "is missing")
            for suffix in ("parquet", "idx")
            if f"{stem}.{suffix}" not in there
        ]
    tasks = [(storage.name, name) for name in names]
    for result in engines.run_local(_verify_shard, tasks, min(workers, len(tasks)), on_videos):
        problems += result or []
    return sorted(problems, key=lambda problem: (problem.file, problem.key))


def damaged_shards(storage: Storage, names: list[str], classes: Sequence[str], run: engines.Run) -> list[str]:
    """Which of the finished shards are not as their own Parquet files say."""
    return sorted(
        name
        for name, problems in run(_check_finished, [(storage.name, name, tuple(classes)) for name in names], _ignore)
        if problems
    )


def _ignore(event: object) -> None:
    pass


def _check_finished(task: tuple[str, str, tuple[str, ...]], report: engines.Report) -> tuple[str, list[Problem]]:
    folder, name, classes = task
    storage = storage_at(folder)
    table = read_parquet(storage.read(f"shards/{name}.parquet")).replace_schema_metadata(None)
    return name, _check_shard(
        Dataset(storage, {"classes": list(classes)}, table), f"{name}.tar", list(range(table.num_rows)), report
    )


def _verify_shard(task: tuple[str, str], report: engines.Report) -> list[Problem]:
    folder, name = task
    dataset = Dataset.open(folder)
    rows = pc.indices_nonzero(pc.equal(dataset.table["shard"], name))
    problems = _check_shard(dataset, name, rows.to_pylist(), report)
    own = f"{name.removesuffix('.tar')}.parquet"
    if is_shard_name(name) and dataset.storage.exists(f"shards/{own}"):
        try:
            table = read_parquet(dataset.storage.read(f"shards/{own}"))
            if (
                not table.replace_schema_metadata(None)
                .sort_by("offset")
                .equals(dataset.table.take(rows).replace_schema_metadata(None).sort_by("offset"))
            ):
                problems.append(Problem(own, "", "holds other rows than the index"))
        except (OSError, pa.ArrowInvalid) as error:
            problems.append(Problem(own, "", f"cannot be read ({error})"))
    return problems


def _check_shard(dataset: Dataset, name: str, rows: list[int], report: engines.Report) -> list[Problem]:
    if not is_shard_name(name):
        keys = [dataset.table["key"][row].as_py() for row in rows]
        return [Problem(printable(name), key, "the index points outside the data set") for key in keys]
    problems = []
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(dataset.storage.downloaded(f"shards/{name}"))
        except FileNotFoundError:
            return [Problem(name, "", "is missing")]
        try:
            with tarfile.open(path, "r:") as tar:
                members = {member.offset_data: member for member in tar}
            index = dali_index(path)
        except (OSError, UserError, tarfile.TarError) as error:
            return [Problem(name, "", f"cannot be read as a tar file ({error})")]
        stem = name.removesuffix(".tar")
        if dataset.storage.exists(f"shards/{stem}.idx") and dataset.storage.read(f"shards/{stem}.idx") != index:
            problems.append(Problem(f"{stem}.idx", "", "is not the index of its tar file"))
        file = stack.enter_context(open(path, "rb"))
        sound = True
        known, named = set(), {member.name: member for member in members.values()}
        for row in rows:
            values = {column: dataset.table[column][row].as_py() for column in dataset.table.column_names}
            try:
                video = dataset.video(row)
                found = members.get(video.offset)
                if found is None or (found.name, found.size) != (f"{tar_name(video.key)}.mp4", video.size):
                    raise Corrupt("the tar has no such member where the index says")
                known.add(found.name)
                file.seek(video.offset)
                _check_payload(video, file.read(video.size))
                sidecar = f"{tar_name(video.key)}.json"
                known.add(sidecar)
                _check_sidecar(file, named.get(sidecar), sidecar_bytes(values, dataset.classes))
            except Corrupt as problem:
                problems.append(Problem(name, values["key"], str(problem)))
                sound = False
            report(1)
        if sound:
            strangers = sorted({member.name for member in members.values()} - known)
            problems += [
                Problem(name, printable(stranger), "is in the tar, but not in the index") for stranger in strangers
            ]
    return problems


def _check_sidecar(file: BinaryIO, member: tarfile.TarInfo | None, expected: bytes) -> None:
    if member is None:
        raise Corrupt("the tar has no .json for it")
    file.seek(member.offset_data)
    if file.read(member.size) != expected:
        raise Corrupt("its .json does not say what the index says")


def _check_payload(video: Video, data: bytes) -> None:
    if checksum_of(data) != video.crc32c:
        raise Corrupt("its checksum does not match the index")
    payload = Payload(io.BytesIO(data), 0)
    payload.size = len(data)
    header, offsets = gop_table(payload.boxes(), len(data))
    if header != video.header_size or offsets != video.gop_offsets.tolist():
        raise Corrupt("its GOP table does not match the payload's fragments")
    if payload.checksums(offsets) != video.gop_crc32c.tolist():
        raise Corrupt("the checksums of its header and GOPs do not match the index")
    starts = video.gop_frames.tolist()
    if len(starts) != len(offsets) or starts[0] != 0 or starts[-1] != video.num_frames:
        raise Corrupt("its GOP frame numbers do not match its frames")
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        piece = data[:header] + data[offsets[number] : offsets[number + 1]]
        try:
            frames = [(frame.width, frame.height) for frame in decode_frames(io.BytesIO(piece))]
        except av.FFmpegError as error:
            raise Corrupt(f"GOP {number} does not decode ({error.strerror})") from None
        if len(frames) != last - first:
            raise Corrupt(f"GOP {number} holds {len(frames)} frames, the index says {last - first}")
        if set(frames) != {(video.width, video.height)}:
            raise Corrupt(f"GOP {number} is not {video.width}x{video.height}")
