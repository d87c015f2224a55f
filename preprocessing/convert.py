"""Turns a source list into shards: plan, convert on an engine, write the index. A killed run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, explained
from ..storage import Storage, storage_at
from . import engines, shards, verify
from .decoding import VideoError
from .export import dali_index
from .finished import finished, reencoded_videos, rejections, shard_bytes, strays
from .plan import adopt, planned_fingerprints, read_plan, scan_rejections
from .preview import check, refuse_rejected, shards_of
from .sources import Rejection, SourceList, SourceVideo, printable

DEADLY_TIMES = 3  # a worker dies at a video before it is left out
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", engines.OUTSIDE)  # ends that say nothing against the source
MAX_DEADLY = 10  # videos that kill their workers; more are taken for a fault of the machine
MAX_LOSSES = 100  # videos at which a worker died


@dataclass(frozen=True)
class Progress:
    """What happened since the last report: videos finished, of them rejected, frames written."""

    videos: int = 0
    rejected: int = 0
    frames: int = 0

    def __neg__(self) -> Progress:
        return Progress(-self.videos, -self.rejected, -self.frames)


@dataclass(frozen=True)
class ShardTask:
    """The videos of one shard, in order. settings: how each is encoded, by a method `encode(video, sink, on_frame)`.

    deadly: keys of videos that killed their worker repeatedly, and how.
    """

    name: str
    out: str
    root: str
    classes: tuple[str, ...]
    videos: tuple[SourceVideo, ...]
    settings: Any
    fail_fast: bool
    fingerprint: str
    deadly: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Summary:
    """A finished conversion. info is None for a slice, which leaves the index to merge(). repaired: shards rebuilt.

    late_actions: annotations that begin at or after the end of their video, by its key.
    """

    out: str
    info: dict[str, Any] | None
    rejected: list[Rejection]
    resumed_shards: int
    unused_classes: list[str]
    repaired: tuple[str, ...] = ()
    late_actions: dict[str, int] = field(default_factory=dict)


def convert(
    source: SourceList,
    out: str | Path,
    settings: Any,
    *,
    workers: int | None,
    engine: str = "local",
    address: str | None = None,
    part: tuple[int, int] | None = None,
    refresh: bool = False,
    repair: bool = False,
    retry_rejected: bool = False,
    on_error: str = "skip",
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Writes the data set `out` (a path or fsspec URL; format version 1) from the videos of `source`.

    Which video goes to which shard is fixed before any work, so a killed and resumed run ends with the same bytes as
    an undisturbed one, on any engine ("local" or "ray" at `address`) with any number of workers. part: (k, n) writes
    every n-th shard, from the k-th, and no index. refresh: convert sources again that changed. repair: check every
    finished shard and rebuild damaged ones. retry_rejected: write shards again that have rejected sources.
    on_error: "skip" records a bad source in errors.parquet, "fail" stops at the first one. on_start gets the number
    of videos and how many earlier runs finished.
    Raises UserError if `out` belongs to another conversion or is being written, or if no video can be used.
    """
    storage = storage_at(out)
    run = engines.engine(engine, workers, address)
    check(storage, source, 1 if engine == "ray" else workers, on_error)
    with explained(f"writing {storage}"), storage.locked(f"slice-{part[0]}-of-{part[1]}" if part else ""):
        plan = adopt(storage, source, settings, refresh=refresh, alone=part is None)
        names = shards_of(plan, part)
        if part is None:
            storage.remove_leftovers("")
        storage.remove_leftovers("shards", [f"{name}." for name in names] if part else ("",))
        prints = {name: plan.fingerprint(name) for name in names}
        done = finished(storage, prints)
        damaged = []
        if repair:
            damaged = verify.damaged_shards(storage, sorted(done), source.classes, engines.engine("local", workers))
        again = {*damaged, *(name for name, table in done.items() if retry_rejected and rejections([table]))}
        refuse_rejected(storage, [table for name, table in done.items() if name not in again], on_error)
        for name in again:
            storage.delete(f"shards/{name}.parquet")
        pending = [name for name in names if name not in done or name in again]
        total = sum(len(plan.shards[name]) for name in names)
        on_start(total, total - sum(len(plan.shards[name]) for name in pending))
        # Long shards first, so that the workers end together.
        pending.sort(key=lambda name: -sum(video.size for video in plan.shards[name]))
        tasks = [
            ShardTask(
                name, storage.name, str(source.root), source.classes, plan.shards[name], settings, on_error == "fail",
                prints[name],
            )
            for name in pending
        ]  # fmt: skip
        for _ in run(_convert_shard, tasks, on_progress, _Losses()):
            pass
        storage.remove_leftovers("shards", [f"{name}." for name in pending])
        if part:
            rejected = rejections(finished(storage, prints).values())
            return Summary(storage.name, None, rejected, len(names) - len(pending), [])
        return _finish(storage, plan.info, prints, list(plan.rejected), len(names) - len(pending), tuple(damaged))


def merge(out: str | Path) -> Summary:
    """Writes the index of a data set whose slices are all finished. Raises UserError naming shards that are missing."""
    storage = storage_at(out)
    with explained(f"writing {storage}"):
        read_plan(storage)  # refused before a lock makes the folder
        with storage.locked():
            for name in storage.names():
                if name.startswith(".lock-"):  # of slices, none of which can be at work now
                    storage.delete(name)
            info, sources = read_plan(storage)
            return _finish(storage, info, planned_fingerprints(info, sources), scan_rejections(sources), 0, ())


class _Losses:
    """Decides what becomes of a shard whose worker died: another try, but without a video that it always dies of."""

    def __init__(self):
        self._times: Counter[str] = Counter()

    def __call__(self, task: ShardTask, key: str, reason: str) -> ShardTask:
        self._times[key] += 1
        if reason in _FROM_OUTSIDE and self._times[key] >= DEADLY_TIMES:
            raise UserError(
                f"{reason} ended the process that converted {key} {DEADLY_TIMES} times, most often by the system for "
                "lack of memory; what is finished is kept: run the same command again with fewer --workers, or take "
                "that source away"
            )
        deadly = sum(times >= DEADLY_TIMES for times in self._times.values())
        if deadly > MAX_DEADLY or len(self._times) > MAX_LOSSES:
            raise UserError(
                f"worker processes are killed again and again (the last by {reason} at {key}), often by the system for "
                "lack of memory; what is finished is kept: run the same command again, perhaps with fewer --workers"
            )
        if self._times[key] < DEADLY_TIMES:
            return task
        return dataclasses.replace(task, deadly=(*task.deadly, (key, reason)))


def _convert_shard(task: ShardTask, report: engines.Report) -> None:
    """Writes one shard, its DALI index and then its Parquet file, which says that the others are complete."""
    storage = storage_at(task.out)
    rows: list[dict[str, Any]] = []
    errors: list[list[str]] = []
    reencoded: Counter[str] = Counter()
    with storage.uploading(f"shards/{task.name}.tar") as path:
        with contextlib.closing(shards.ShardWriter(path)) as writer:
            deadly = dict(task.deadly)
            for video in task.videos:
                report(engines.Note(video.key))
                try:
                    if video.key in deadly:
                        raise VideoError(
                            "decode",
                            f"the process that converted it died of it {DEADLY_TIMES} times ({deadly[video.key]})",
                        )
                    row, why = _add_video(writer, task, video, report)
                except VideoError as error:
                    if task.fail_fast:
                        raise UserError(f"{printable(video.path)}: {error.stage}: {error.reason}") from None
                    if not os.path.exists(task.root):
                        raise UserError(f"the source {task.root} is gone; bring it back, then run again") from None
                    errors.append([_source_name(video, task.root), error.stage, error.reason])
                    report(Progress(videos=1, rejected=1))
                    continue
                rows.append(row)
                reencoded.update([why] if why else [])
                report(Progress(videos=1))
            report(engines.Note(""))
            writer.finish()
        index = dali_index(path)
    storage.write(f"shards/{task.name}.idx", index)
    # Last, as it says that the others are complete.
    storage.write(f"shards/{task.name}.parquet", shard_bytes(rows, task.fingerprint, errors, reencoded))


def _source_name(video: SourceVideo, root: str) -> str:
    """What names a source in messages: its file, or its key where a file holds several."""
    whole = video.span is None and video.start_s is None and video.end_s is None
    return printable(os.path.relpath(video.path, root)) if whole else video.key


def _add_video(
    writer: shards.ShardWriter, task: ShardTask, video: SourceVideo, report: engines.Report
) -> tuple[dict[str, Any], str | None]:
    waiting = 0

    def on_frame() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 64:
            report(Progress(frames=waiting))
            waiting = 0

    stem = shards.tar_name(video.key)
    with writer.member(f"{stem}.mp4") as payload:
        try:
            encoded = task.settings.encode(video, payload, on_frame)
        finally:
            if payload.error is not None:  # the disk's fault is not the source's
                raise payload.error
        if payload.size >= shards.MAX_PAYLOAD:
            raise VideoError("encode", "8 GiB or more do not fit a tar member; use a lower --short-side or cut it")
        try:
            header_size, offsets = shards.gop_table(payload.boxes(), payload.size)
        except shards.Corrupt as error:
            raise VideoError("encode", str(error)) from None
        if len(offsets) != len(encoded.gop_frames):
            raise VideoError("encode", f"{len(offsets) - 1} fragments for {len(encoded.gop_frames) - 1} GOPs")
    report(Progress(frames=waiting))
    row = {
        "key": video.key, "split": video.split, "label": video.label,
        "annotations": [entry._asdict() for entry in video.annotations],
        "shard": f"{task.name}.tar", "offset": payload.offset, "size": payload.size, "header_size": header_size,
        "gop_offsets": offsets, "gop_frames": list(encoded.gop_frames),
        "gop_crc32c": payload.checksums(offsets), "num_frames": encoded.num_frames, "fps": encoded.fps,
        "width": encoded.width, "height": encoded.height, "codec": encoded.codec,
        "crc32c": payload.crc32c, "source": printable(os.path.relpath(video.path, task.root)),
        "source_fps": encoded.source_fps, "source_frames": encoded.source_frames,
    }  # fmt: skip
    with writer.member(f"{stem}.json") as sidecar:
        sidecar.write(shards.sidecar_bytes(row, task.classes))
    return row, encoded.reencoded


def _finish(
    storage: Storage, plan: dict[str, Any], prints: dict[str, str], rejected: list[Rejection], resumed: int,
    repaired: tuple[str, ...],
) -> Summary:  # fmt: skip
    """Writes errors.parquet, the index and, last of all, dataset.json. rejected: what the scan could not use."""
    done = finished(storage, prints)
    missing = [name for name in plan["shards"] if name not in done]
    if missing:
        raise UserError(
            f"{storage} lacks {len(missing)} of {len(plan['shards'])} shards, e.g. {missing[0]}: run their slices (or "
            "the whole command) again, then merge"
        )
    for file in strays(storage.names("shards"), prints):  # what a refresh that was interrupted left behind
        storage.delete(f"shards/{file}")
    tables = [done[name] for name in plan["shards"]]
    rejected = sorted([*rejected, *rejections(tables)], key=lambda entry: entry.path)
    rows = [dataclasses.asdict(entry) for entry in rejected]
    storage.write("errors.parquet", shards.parquet_bytes(pa.Table.from_pylist(rows, shards.ERROR_SCHEMA)))
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    if not table.num_rows:
        first, total = rejected[0], plan["sources"]["videos"]
        raise UserError(
            f"none of the {total} videos could be converted (the first, {first.path}: {first.reason}); "
            f"all reasons are in {storage}/errors.parquet"
        )
    table = table.take(pc.sort_indices(table["key"])).combine_chunks()
    data = shards.parquet_bytes(table)
    storage.write("index.parquet", data)
    digest = shards.digest_of(data)
    storage.write("index.arrow", shards.arrow_bytes(table, digest))
    info = {
        "name": plan["name"],
        "format_version": shards.FORMAT_VERSION,
        "classes": plan["classes"],
        "modality": plan["modality"],
        "video": plan["video"],
        "splits": _split_counts(table),
        "rejected": len(rejected),
        "reencoded": dict(sorted(reencoded_videos(tables).items())),
        "index_digest": digest,
    }
    storage.write_json("dataset.json", info)
    used = set(pc.unique(table["label"]).to_pylist())
    used.update(pc.unique(pc.struct_field(pc.list_flatten(table["annotations"]), "label")).to_pylist())
    background = {0} if plan["classes"][:1] == ["Background"] else set()
    unused = [name for label, name in enumerate(plan["classes"]) if label not in used | background]
    return Summary(storage.name, info, rejected, resumed, unused, repaired, _late_actions(table))


def _late_actions(table: pa.Table) -> dict[str, int]:
    annotations = table["annotations"].combine_chunks()
    rows = pc.list_parent_indices(annotations)
    seconds = pc.divide(pc.cast(table["num_frames"], pa.float64()), table["fps"]).take(rows)
    late = pc.greater_equal(pc.struct_field(pc.list_flatten(annotations), "start_s"), seconds)
    return dict(Counter(table["key"].take(rows).filter(late).to_pylist()))


def _split_counts(table: pa.Table) -> dict[str, Any]:
    seconds = pc.divide(pc.cast(table["num_frames"], pa.float64()), table["fps"])
    table = table.append_column("seconds", seconds)
    grouped = table.group_by("split").aggregate(
        [("key", "count"), ("num_frames", "sum"), ("seconds", "sum"), ("size", "sum")]
    )
    rows = sorted(grouped.to_pylist(), key=lambda row: row["split"])
    return {
        row["split"]: {
            "videos": row["key_count"], "frames": row["num_frames_sum"],
            "seconds": round(row["seconds_sum"], 3), "bytes": row["size_sum"],
        }
        for row in rows
    }  # fmt: skip
