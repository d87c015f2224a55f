"""Turns a source list into shards: plan, convert on an engine, write the index. A killed run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError, explain_os_error
from ..files import locked, remove_leftovers, replacing, write_atomically, write_json
from . import engines, shards
from .sources import Rejection, SourceList, SourceVideo, printable
from .video import VideoError, VideoSettings

TARGET_SHARD_BYTES = 256 << 20  # of source files
MIN_SHARDS = 16  # a data set, so that a small one still spreads over workers
_ERRORS = b"genkd.errors"


@dataclass(frozen=True)
class Progress:
    """What happened since the last report: videos finished, of them rejected, frames written."""

    videos: int = 0
    rejected: int = 0
    frames: int = 0


@dataclass(frozen=True)
class ShardTask:
    """The videos of one shard, in order."""

    name: str
    out: str
    root: str
    classes: tuple[str, ...]
    videos: tuple[SourceVideo, ...]
    settings: VideoSettings
    fail_fast: bool


@dataclass(frozen=True)
class Summary:
    """A finished conversion."""

    out: Path
    info: dict[str, Any]
    rejected: list[Rejection]
    resumed_shards: int
    unused_classes: list[str]


def convert(
    source: SourceList,
    out: Path,
    settings: VideoSettings,
    *,
    workers: int,
    on_error: str = "skip",
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Writes the data set `out` (format version 1) from the videos of `source`.

    Which video goes to which shard is fixed before any work, so a killed and resumed run ends with the same bytes as
    an undisturbed one, for any number of workers. on_error: "skip" records a bad source in errors.parquet, "fail"
    stops at the first one. on_start gets the number of videos and how many earlier runs finished.
    Raises UserError if `out` belongs to another conversion or is being written, or if no video can be used.
    """
    out = Path(out).absolute()
    if not source.videos:
        raise UserError(f"{source.root} holds no video to convert")
    if out == source.root or source.root in out.parents:
        raise UserError(f"{out} lies inside the source {source.root}; choose a folder outside it")
    with locked(out, f"another run is writing {out}; wait for it, or stop it first"):
        plan, assignment = _plan(source, settings)
        _adopt(out, plan)
        (out / "shards").mkdir(exist_ok=True)
        for folder in (out, out / "shards"):
            remove_leftovers(folder)
        pending = {name: videos for name, videos in assignment.items() if not _is_done(out, name)}
        finished = len(assignment) - len(pending)
        on_start(len(source.videos), len(source.videos) - sum(map(len, pending.values())))
        tasks = [
            ShardTask(name, str(out), str(source.root), source.classes, videos, settings, on_error == "fail")
            for name, videos in pending.items()
        ]
        try:
            for _ in engines.run_local(_convert_shard, tasks, min(workers, len(tasks)), on_progress):
                pass
            info, rejected = _write_index(out, source, plan, list(assignment))
        except OSError as error:
            raise UserError(explain_os_error(error, f"writing {out}")) from None
    unused = _unused_classes(out, source.classes)
    return Summary(out, info, rejected, finished, unused)


def _plan(source: SourceList, settings: VideoSettings) -> tuple[dict[str, Any], dict[str, tuple[SourceVideo, ...]]]:
    """plan.json's content, and the videos of each shard.

    Video i of a split goes to shard i modulo their number: sorted sources have their classes in runs, and a shard
    should hold a mixture of them.
    """
    digest = hashlib.sha256()
    by_split: dict[str, list[SourceVideo]] = {}
    for video in source.videos:
        digest.update(f"{video.key}\t{video.split}\t{video.label}\t{video.size}\n".encode())
        by_split.setdefault(video.split, []).append(video)
    total = sum(video.size for video in source.videos)
    target = max(1, min(TARGET_SHARD_BYTES, -(-total // MIN_SHARDS)))
    assignment: dict[str, tuple[SourceVideo, ...]] = {}
    for split in sorted(by_split):
        videos = by_split[split]
        number = min(len(videos), max(1, -(-sum(video.size for video in videos) // target)))
        for index in range(number):
            assignment[f"{split}-{index:05d}"] = tuple(videos[index::number])
    plan = {
        "format_version": shards.FORMAT_VERSION,
        "name": source.name,
        "classes": list(source.classes),
        "video": dataclasses.asdict(settings),
        "sources": {"videos": len(source.videos), "bytes": total, "sha256": digest.hexdigest()},
        "shards": {split: sum(name.startswith(split + "-") for name in assignment) for split in sorted(by_split)},
    }
    return plan, assignment


def _adopt(out: Path, plan: dict[str, Any]) -> None:
    """Begins an empty folder with this plan, or continues a folder that has the same one."""
    path = out / "plan.json"
    if not path.exists():
        strangers = sorted(
            entry.name for entry in out.iterdir() if entry.name != ".lock" and not entry.name.endswith(".tmp")
        )
        if strangers:
            raise UserError(
                f"{out} is not empty and holds no genkd data set (found {strangers[0]!r}); choose another folder"
            )
        write_json(path, plan)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; delete {out} and run again") from None
    changed = _changed(old, plan)
    if changed:
        raise UserError(
            f"{out} was begun with other settings ({'; '.join(changed[:4])}); choose another folder, "
            "delete that one, or use the same settings to continue it"
        )


def _changed(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    if old == new:
        return []
    return [f"{name}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_done(out: Path, name: str) -> bool:
    return (out / "shards" / f"{name}.parquet").is_file() and (out / "shards" / f"{name}.tar").is_file()


def _convert_shard(task: ShardTask, report: engines.Report) -> None:
    """Writes one shard and then its Parquet file, each under a temporary name first."""
    folder = Path(task.out) / "shards"
    rows: list[dict[str, Any]] = []
    errors: list[list[str]] = []
    with (
        replacing(folder / f"{task.name}.tar") as temporary,
        contextlib.closing(shards.ShardWriter(temporary)) as writer,
    ):
        for video in task.videos:
            try:
                row = _add_video(writer, task, video, report)
            except VideoError as error:
                if task.fail_fast:
                    raise UserError(f"{video.path}: {error.stage}: {error.reason}") from None
                errors.append([printable(os.path.relpath(video.path, task.root)), error.stage, error.reason])
                report(Progress(videos=1, rejected=1))
                continue
            rows.append(row)
            report(Progress(videos=1))
        writer.finish()
    table = pa.Table.from_pylist(rows, shards.SCHEMA).replace_schema_metadata({_ERRORS: json.dumps(errors)})
    write_atomically(folder / f"{task.name}.parquet", shards.parquet_bytes(table))


def _add_video(
    writer: shards.ShardWriter, task: ShardTask, video: SourceVideo, report: engines.Report
) -> dict[str, Any]:
    waiting = 0

    def on_frame() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 64:
            report(Progress(frames=waiting))
            waiting = 0

    stem = shards.tar_name(video.key)
    with writer.member(f"{stem}.mp4") as payload:
        encoded = task.settings.encode(video, payload, on_frame)
        try:
            header_size, offsets = shards.gop_table(payload.boxes(), payload.size)
        except shards.Corrupt as error:
            raise VideoError("encode", str(error)) from None
        if len(offsets) != len(encoded.gop_frames):
            raise VideoError("encode", f"{len(offsets) - 1} fragments for {len(encoded.gop_frames) - 1} GOPs")
    report(Progress(frames=waiting))
    row = {
        "key": video.key, "split": video.split, "label": video.label, "annotations": [],
        "shard": f"{task.name}.tar", "offset": payload.offset, "size": payload.size, "header_size": header_size,
        "gop_offsets": offsets, "gop_frames": list(encoded.gop_frames), "num_frames": encoded.num_frames,
        "fps": encoded.fps, "width": encoded.width, "height": encoded.height, "codec": encoded.codec,
        "crc32c": payload.crc32c, "source": printable(os.path.relpath(video.path, task.root)),
        "source_fps": encoded.source_fps, "source_frames": encoded.source_frames,
    }  # fmt: skip
    with writer.member(f"{stem}.json") as sidecar:
        names = ("key", "split", "label", "num_frames", "fps", "width", "height", "codec", "source")
        about = {name: row[name] for name in names}
        about["class"] = task.classes[video.label] if video.label >= 0 else None
        sidecar.write(json.dumps(about, ensure_ascii=False).encode())
    return row


def _write_index(
    out: Path, source: SourceList, plan: dict[str, Any], names: list[str]
) -> tuple[dict[str, Any], list[Rejection]]:
    tables, rejected = [], list(source.rejected)
    for name in names:
        table = pq.read_table(out / "shards" / f"{name}.parquet")
        rejected += [Rejection(*entry) for entry in json.loads(table.schema.metadata[_ERRORS])]
        tables.append(table.replace_schema_metadata(None))
    table = pa.concat_tables(tables)
    rejected.sort(key=lambda entry: entry.path)
    rows = [dataclasses.asdict(entry) for entry in rejected]
    write_atomically(out / "errors.parquet", shards.parquet_bytes(pa.Table.from_pylist(rows, shards.ERROR_SCHEMA)))
    if not table.num_rows:
        first = rejected[0]
        raise UserError(
            f"none of the {len(source.videos)} videos could be converted (the first, {first.path}: {first.reason}); "
            f"all reasons are in {out / 'errors.parquet'}"
        )
    table = table.take(pc.sort_indices(table["key"])).combine_chunks()
    data = shards.parquet_bytes(table)
    write_atomically(out / "index.parquet", data)
    digest = shards.digest_of(data)
    shards.write_arrow(out / "index.arrow", table, digest)
    info = {
        "name": plan["name"],
        "format_version": shards.FORMAT_VERSION,
        "classes": plan["classes"],
        "video": plan["video"],
        "splits": _split_counts(table),
        "rejected": len(rejected),
        "index_digest": digest,
    }
    write_json(out / "dataset.json", info)
    return info, rejected


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


def _unused_classes(out: Path, classes: tuple[str, ...]) -> list[str]:
    used = set(pc.unique(pq.read_table(out / "index.parquet", columns=["label"])["label"]).to_pylist())
    return [name for label, name in enumerate(classes) if label not in used]
