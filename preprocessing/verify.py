"""Checks a data set from end to end: index, tar members, checksums, and that every GOP decodes on its own."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..storage import Storage, refuse_private, storage_at
from . import engines
from .export import dali_index
from .finished import finished, is_planned, rejections, shard_rows, strays
from .index import ERROR_SCHEMA, SCHEMA, Corrupt, arrow_bytes, description, digest_of, read_parquet
from .plan import planned_fingerprints, read_info, read_sources, scan_rejections
from .shards import Dataset, Payload, Video, checksum_of, gop_table, is_shard_name, sidecar_bytes, tar_name
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
    storage = storage_at(path)
    refuse_private(storage, workers)
    info = description(storage)
    prints, problems = _check_plan(storage)
    try:
        table = read_parquet(storage.read("index.parquet"), SCHEMA).replace_schema_metadata(None).combine_chunks()
    except FileNotFoundError:
        return [Problem("index.parquet", "", "is missing"), *problems]
    except Corrupt as error:
        return [Problem("index.parquet", "", str(error)), *problems]
    on_start(table.num_rows)
    problems += [*_check_tables(storage, info, table, prints), *_check_names(storage, table, prints)]
    rows_of = _rows_by_shard(table)
    prints = {f"{stem}.tar": fingerprint for stem, fingerprint in (prints or {}).items()}
    classes, none = tuple(info["classes"]), np.array([], np.int64)
    tasks = [
        (storage.name, name, classes, table.take(rows_of.get(name, none)), prints.get(name))
        for name in sorted({*rows_of, *prints})
    ]
    for result in engines.run_local(_verify_shard, tasks, min(workers, len(tasks)), on_videos):
        problems += result or []
    return sorted(problems, key=lambda problem: (problem.file, problem.key))


def _check_plan(storage: Storage) -> tuple[dict[str, str] | None, list[Problem]]:
    """The planned shards, None if the plan is lost, and what is wrong with the plan's files."""
    read: list[Any] = []
    problems = []
    for name, reader in (("plan.json", read_info), ("sources.parquet", read_sources)):
        try:
            read.append(reader(storage))
        except Corrupt as error:
            problems.append(Problem(name, "", f"{str(error).removeprefix(name).strip()}: no run can continue it"))
    if problems:
        return None, problems
    try:
        return planned_fingerprints(*read), []
    except UserError as error:
        return None, [Problem("plan.json", "", str(error))]


def _check_tables(
    storage: Storage, info: dict[str, Any], table: pa.Table, prints: dict[str, str] | None
) -> list[Problem]:
    """What is wrong with dataset.json, errors.parquet and the two index files."""
    problems = []
    if digest_of(storage.read("index.parquet")) != info["index_digest"]:
        problems.append(Problem("index.parquet", "", "is not the file that dataset.json describes"))
    elif storage.exists("index.arrow") and storage.read("index.arrow") != arrow_bytes(table, info["index_digest"]):
        what = "is not the copy of index.parquet that readers take it for; delete it, and it is made again"
        problems.append(Problem("index.arrow", "", what))
    counted = {split: entry["videos"] for split, entry in info["splits"].items()}
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["split"]).to_pylist()}
    if counted != found:
        problems.append(Problem("dataset.json", "", f"counts {counted} videos by split, the index {found}"))
    try:
        errors = read_parquet(storage.read("errors.parquet"), ERROR_SCHEMA).to_pylist()
        shards_done = finished(storage, prints or {})
        whole = prints is not None and shards_done.keys() == prints.keys()
        expected = [*scan_rejections(read_sources(storage)), *rejections(shards_done.values())] if whole else None
        if len(errors) != info.get("rejected", len(errors)) or (
            expected is not None and sorted(map(vars, expected), key=_by_text) != sorted(errors, key=_by_text)
        ):
            problems.append(Problem("errors.parquet", "", "does not list the sources that were rejected"))
    except FileNotFoundError:
        problems.append(Problem("errors.parquet", "", "is missing"))
    except Corrupt as error:
        problems.append(Problem("errors.parquet", "", str(error)))
    return problems


def _by_text(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row.values())


def _check_names(storage: Storage, table: pa.Table, prints: dict[str, str] | None) -> list[Problem]:
    """Files of the shards folder that are missing, or belong to no shard."""
    there = storage.names("shards")
    indexed = {name.removesuffix(".tar") for name in pc.unique(table["shard"]).to_pylist() if is_shard_name(name)}
    planned = indexed | set(prints or ())
    missing = [f"{name}.{suffix}" for name in planned for suffix in ("parquet", "idx")]
    # Shards of which every video was rejected are in no index: without the plan they cannot be told from strays.
    foreign = strays(there, planned) if prints is not None else []
    return [Problem(name, "", "is missing") for name in missing if name not in there] + [
        Problem(printable(name), "", "is of no shard of the data set") for name in foreign
    ]


def _rows_by_shard(table: pa.Table) -> dict[str, np.ndarray]:
    """Name of each shard -> its rows."""
    names = table["shard"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(names.dictionary)))[:-1])
    return dict(zip(names.dictionary.to_pylist(), parts, strict=True))


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
    try:
        table = shard_rows(storage.read(f"shards/{name}.parquet"))
    except (OSError, Corrupt) as error:
        return name, [Problem(f"{name}.parquet", "", str(error))]
    return name, _check_shard(Dataset(storage, {"classes": list(classes)}, table), f"{name}.tar", report)


def _verify_shard(
    task: tuple[str, str, tuple[str, ...], pa.Table, str | None], report: engines.Report
) -> list[Problem]:
    folder, name, classes, rows, fingerprint = task
    if not is_shard_name(name):
        return [
            Problem(printable(name), key, "the index points outside the data set") for key in rows["key"].to_pylist()
        ]
    storage, stem = storage_at(folder), name.removesuffix(".tar")
    problems = _check_shard(Dataset(storage, {"classes": list(classes)}, rows), name, report)
    try:
        own = shard_rows(storage.read(f"shards/{stem}.parquet"))
        if not own.replace_schema_metadata(None).sort_by("offset").equals(rows.sort_by("offset")):
            problems.append(Problem(f"{stem}.parquet", "", "holds other rows than the index"))
        if fingerprint is not None and not is_planned(own, fingerprint):
            problems.append(Problem(f"{stem}.parquet", "", "was made of other sources or settings than the plan's"))
    except FileNotFoundError:
        pass  # _check_names says so
    except Corrupt as error:
        problems.append(Problem(f"{stem}.parquet", "", str(error)))
    return problems


def _check_shard(dataset: Dataset, name: str, report: engines.Report) -> list[Problem]:
    """The tar file and index of one shard against the rows of `dataset`, which are that shard's alone."""
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
        if not _ends_well(file, members):
            problems.append(Problem(name, "", "has other bytes behind its last member than a tar's end"))
        sound = True
        known, named = set(), {member.name: member for member in members.values()}
        for row in range(dataset.table.num_rows):
            values = {column: dataset.table[column][row].as_py() for column in dataset.table.column_names}
            try:
                video = dataset.video(row)
                found = members.get(video.offset)
                if found is None or (found.name, found.size) != (f"{tar_name(video.key)}.mp4", video.size):
                    raise Corrupt("the tar has no such member where the index says")
                known.add(found.name)
                file.seek(video.offset)
                _check_payload(video, file.read(video.size))
                if video.label >= len(dataset.classes):
                    raise Corrupt(f"its label {video.label} is none of the {len(dataset.classes)} classes")
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


def _ends_well(file: BinaryIO, members: dict[int, tarfile.TarInfo]) -> bool:
    """Whether two zero blocks follow the last member, and nothing else."""
    ends = (at + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for at, member in members.items())
    file.seek(max(ends, default=0))
    return file.read(2 * tarfile.BLOCKSIZE + 1) == bytes(2 * tarfile.BLOCKSIZE)


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
