"""What a conversion will do, fixed and written down before any work: which source goes to which shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..storage import Storage
from . import shards
from .index import Corrupt
from .sources import Rejection, SourceList, SourceVideo, printable

TARGET_SHARD_BYTES = 256 << 20  # of source files
MIN_SHARDS = 64  # a data set, so that a small one still spreads over workers
_SOURCES = "sources.parquet"
_INFO = {
    "format_version": int, "name": str, "classes": list, "modality": str, "video": dict, "sources": dict,
    "shards": list,
}  # fmt: skip
_SCHEMA = pa.schema(
    [("key", pa.string()), ("path", pa.string()), ("split", pa.string()), ("label", pa.int32()), ("size", pa.int64()),
     ("mtime_ns", pa.int64()), ("content", pa.string()), ("shard", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """info: plan.json; shards: the videos of each shard, in order; rejected: what the scan could not use."""

    info: dict[str, Any]
    shards: dict[str, tuple[SourceVideo, ...]]
    rejected: tuple[Rejection, ...]

    def fingerprint(self, name: str) -> str:
        """A digest of all that decides a shard's content, kept with the shard to know whether it is this plan's."""
        videos = [(video.key, video.split, video.label, video.size, _content(video)) for video in self.shards[name]]
        return _fingerprint(self.info, videos)


def make_plan(source: SourceList, settings: Any, kept: Mapping[str, str] | None = None) -> Plan:
    """The plan for a source list. settings: a frozen dataclass with a `modality` and an `encode` method.

    Video i of a split goes to shard i modulo their number: sorted sources have their classes in runs, and a shard
    should hold a mixture of them. kept: shards of videos that an earlier plan placed; the others get new shards.
    """
    kept = kept or {}
    digest = hashlib.sha256()
    placed: dict[str, list[SourceVideo]] = {}
    fresh: dict[str, list[SourceVideo]] = {}
    for video in source.videos:
        digest.update(f"{video.key}\t{video.split}\t{video.label}\t{video.size}\t{_content(video)}\n".encode())
        shard = kept.get(video.key)
        if shard is not None and shard.rpartition("-")[0] == video.split:
            placed.setdefault(shard, []).append(video)
        else:
            fresh.setdefault(video.split, []).append(video)
    total = sum(video.size for video in source.videos)
    target = max(1, min(TARGET_SHARD_BYTES, -(-total // MIN_SHARDS)))
    for split in sorted(fresh):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", split):
            raise UserError(f"a split cannot be named {split!r}; use letters, digits, dots, dashes and underscores")
        videos = fresh[split]
        number = min(len(videos), max(1, -(-sum(video.size for video in videos) // target)))
        first = 1 + max((int(name.rpartition("-")[2]) for name in placed if name.startswith(split + "-")), default=-1)
        for index in range(number):
            placed[f"{split}-{first + index:05d}"] = videos[index::number]
    assignment = {name: tuple(placed[name]) for name in sorted(placed)}
    info = {
        "format_version": shards.FORMAT_VERSION,
        "name": source.name,
        "classes": list(source.classes),
        "modality": settings.modality,
        "video": dataclasses.asdict(settings),
        "sources": {"videos": len(source.videos), "bytes": total, "sha256": digest.hexdigest()},
        "shards": list(assignment),
    }
    return Plan(info, assignment, source.rejected)


@dataclass(frozen=True)
class Outlook:
    """The plan that a run has to follow, and how the folder stands to it.

    noted: plan.json and sources.parquet say so already; complete: no video is new, changed or gone, so that a finished
    data set stays one; stale: finished shards that are to be written again.
    """

    plan: Plan
    noted: bool
    complete: bool
    stale: frozenset[str] = frozenset()


def adopt(storage: Storage, source: SourceList, settings: Any, *, refresh: bool, alone: bool = True) -> Plan:
    """Begins an empty folder with a new plan, or continues a folder that was begun with the same settings and sources.

    Sources that changed since are refused by name; with refresh they are converted again: existing videos keep their
    shards, new ones get new shards, and only the shards concerned are written. alone: whether the run has the folder
    to itself; slices, which have not, change the plan one after the other. Raises UserError.
    """
    while not (outlook := look(storage, source, settings, refresh=refresh)).noted:
        with contextlib.nullcontext(True) if alone else storage.turn() as mine:
            if mine:
                if not alone:
                    outlook = look(storage, source, settings, refresh=refresh)
                _note(storage, source.root, outlook)
                break
    return outlook.plan


def look(storage: Storage, source: SourceList, settings: Any, *, refresh: bool) -> Outlook:
    """What `adopt` would do, without doing it. Raises UserError."""
    if not is_begun(storage):
        return Outlook(make_plan(source, settings), noted=False, complete=True)
    old, table = read_plan(storage)
    _refuse_other_classes(storage, old["classes"], source.classes)
    before = {row["key"]: row for row in table.to_pylist()}
    plan = make_plan(source, settings, {key: row["shard"] for key, row in before.items()})
    changed = _settings_changed(old, plan.info)
    if changed:
        raise UserError(
            f"{storage} was begun with other settings ({'; '.join(changed[:4])}); choose another folder, "
            "delete that one, or use the same settings to continue it"
        )
    differences = _sources_changed(before, source)
    if differences and not refresh:
        named = "; ".join(f"{key} {what}" for key, what in list(differences.items())[:3])
        raise UserError(
            f"{len(differences)} sources changed since {storage} was begun ({named}); add --refresh to bring the data "
            "set up to date, or restore them"
        )
    # Without differences, but with another plan, a refresh was interrupted between its two files.
    complete = not differences and old == plan.info
    stale = frozenset(before[key]["shard"] for key in differences if key in before)
    return Outlook(plan, complete and scan_rejections(table) == list(plan.rejected), complete, stale)


def is_begun(storage: Storage) -> bool:
    """Whether a conversion was begun there. Raises UserError if other things are there instead."""
    names = storage.names()  # before the question for plan.json, as another slice may write it in between
    if storage.exists("plan.json"):
        return True
    strangers = [name for name in names if not name.startswith((".lock", _SOURCES)) and not name.endswith(".tmp")]
    if "dataset.json" in strangers:
        raise UserError(
            f"{storage} has lost its plan.json, without which it cannot be continued; restore it, or choose another "
            "folder"
        )
    if strangers:
        raise UserError(
            f"{storage} is not empty and holds no genkd data set (found {strangers[0]!r}); choose another folder"
        )
    return False


def read_plan(storage: Storage) -> tuple[dict[str, Any], pa.Table]:
    """plan.json and sources.parquet of a folder. Raises UserError if one is missing or damaged."""
    if not storage.exists("plan.json"):
        raise UserError(f"{storage} holds no conversion that was begun: it lacks plan.json")
    try:
        return read_info(storage), read_sources(storage)
    except Corrupt as error:
        raise UserError(f"{error} in {storage}; restore it, or choose another folder") from None


def read_info(storage: Storage) -> dict[str, Any]:
    """plan.json. Raises Corrupt."""
    try:
        info = json.loads(storage.read("plan.json"))
    except FileNotFoundError:
        raise Corrupt("plan.json is missing") from None
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict) or not all(isinstance(info.get(key), kind) for key, kind in _INFO.items()):
        raise Corrupt("plan.json is damaged")
    return info


def read_sources(storage: Storage) -> pa.Table:
    """sources.parquet. Raises Corrupt."""
    try:
        table = shards.read_parquet(storage.read(_SOURCES), _SCHEMA)
        scan_rejections(table)
        if not pc.all(pc.match_substring_regex(table["shard"], r"^\w[\w.-]*-\d{5,}$")).as_py():
            raise Corrupt("names shards that no plan does")
    except FileNotFoundError:
        raise Corrupt(f"{_SOURCES} is missing") from None
    except (Corrupt, KeyError, ValueError, TypeError):
        raise Corrupt(f"{_SOURCES} is damaged") from None
    return table


def planned_fingerprints(info: dict[str, Any], table: pa.Table) -> dict[str, str]:
    """The fingerprint of every shard by what read_plan gives. Raises UserError if the two do not belong together."""
    by_shard: dict[str, list[tuple]] = {}
    for row in table.to_pylist():
        video = (row["key"], row["split"], row["label"], row["size"], row["content"])
        by_shard.setdefault(row["shard"], []).append(video)
    if list(by_shard) != info["shards"]:
        raise UserError("a --refresh was interrupted; run the whole command again before merging")
    return {name: _fingerprint(info, videos) for name, videos in by_shard.items()}


def _fingerprint(info: dict[str, Any], videos: list[tuple]) -> str:
    return hashlib.sha256(json.dumps([info["video"], videos]).encode()).hexdigest()


def scan_rejections(table: pa.Table) -> list[Rejection]:
    """The sources that the scan could not use, as sources.parquet keeps them."""
    return [Rejection(*entry) for entry in json.loads(table.schema.metadata[b"genkd.rejected"])]


def _note(storage: Storage, root: Path, outlook: Outlook) -> None:
    if outlook.noted:  # by another slice, meanwhile
        return
    plan = outlook.plan
    if not outlook.complete:
        # From here on the data set is incomplete: its description goes first, and the new plan is written last.
        storage.delete("dataset.json")
        for name in sorted(outlook.stale):
            storage.delete(f"shards/{name}.parquet")
    rows = [
        {"key": video.key, "path": printable(os.path.relpath(video.path, root)), "split": video.split,
         "label": video.label, "size": video.size, "mtime_ns": video.mtime_ns, "content": _content(video),
         "shard": name}
        for name, videos in plan.shards.items() for video in videos
    ]  # fmt: skip
    rejected = json.dumps([dataclasses.astuple(entry) for entry in plan.rejected], ensure_ascii=False)
    table = pa.Table.from_pylist(rows, _SCHEMA).replace_schema_metadata({"genkd.rejected": rejected})
    storage.write(_SOURCES, shards.parquet_bytes(table))
    storage.write_json("plan.json", plan.info)


def _content(video: SourceVideo) -> str:
    """What besides the file decides a video's content: the part taken, the rate given, the annotations."""
    if video.start_s is None and video.end_s is None and video.fps is None and not video.annotations:
        return ""
    return json.dumps([video.start_s, video.end_s, video.fps, video.annotations])


def _sources_changed(before: dict[str, dict[str, Any]], source: SourceList) -> dict[str, str]:
    """What differs, by key."""
    found: dict[str, str] = {}
    for video in source.videos:
        old = before.get(video.key)
        if old is None:
            found[video.key] = "is new"
        elif old["size"] != video.size:
            found[video.key] = f"had {old['size']} bytes and now has {video.size}"
        elif old["mtime_ns"] and video.mtime_ns and old["mtime_ns"] != video.mtime_ns:
            found[video.key] = "was written again"
        elif (old["split"], old["label"], old["content"]) != (video.split, video.label, _content(video)):
            found[video.key] = "has another split, label, part or annotation"
    keys = {video.key for video in source.videos}
    found.update({key: "is gone" for key in before if key not in keys})
    return found


def _refuse_other_classes(storage: Storage, old: list[str], new: tuple[str, ...]) -> None:
    if old == list(new):
        return
    named = [*(f"{name!r} is new" for name in new if name not in old),
             *(f"{name!r} is gone" for name in old if name not in new)]  # fmt: skip
    raise UserError(
        f"the classes are not those that {storage} was begun with ({', '.join(named[:4]) or 'their order differs'}), "
        "which renumbers the labels of all videos; convert into a new folder"
    )


def _settings_changed(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted((old.keys() | new.keys()) - ({"sources", "shards"} if not name else set()))
        return [
            line
            for key in keys
            for line in _settings_changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    if old == new:
        return []
    return [f"{name}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
