"""What can be said of a conversion before it begins: what would stop it, and which shards it would write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import UserError, explained
from ..storage import Storage, refuse_inside, refuse_private, storage_at
from . import engines
from .finished import finished, rejections
from .lookup import VIDEO_EXTENSIONS
from .plan import Plan, is_begun, look
from .sources import SourceList, printable


def preview(
    source: SourceList,
    out: str | Path,
    settings: Any,
    *,
    workers: int | None,
    engine: str = "local",
    part: tuple[int, int] | None = None,
    refresh: bool = False,
    retry_rejected: bool = False,
    on_error: str = "skip",
) -> tuple[Plan, list[str], list[str]]:
    """What convert would do: the plan, the shards that it is about, and those of them that it would write.

    Writes nothing, and raises what convert would raise before its work begins. Finished shards are not searched for
    damage.
    """
    storage = storage_at(out)
    engines.engine(engine, workers)
    check(storage, source, 1 if engine == "ray" else workers, on_error)
    with explained(f"reading {storage}"):
        outlook = look(storage, source, settings, refresh=refresh)
        names = shards_of(outlook.plan, part)
        done = finished(storage, {name: outlook.plan.fingerprint(name) for name in names if name not in outlook.stale})
    kept = {name: table for name, table in done.items() if not (retry_rejected and rejections([table]))}
    refuse_rejected(storage, list(kept.values()), on_error)
    return outlook.plan, names, [name for name in names if name not in kept]


def check(storage: Storage, source: SourceList, workers: int | None, on_error: str) -> None:
    """Refuses what is better said before anything is begun."""
    if not source.videos:
        raise UserError(f"{source.root} holds no video to convert")
    refuse_inside(storage, storage_at(source.root))
    refuse_private(storage, workers)
    for video in source.videos:  # frames that lie about one by one have no rate
        loose = not video.fps and os.path.splitext(video.path)[1].lower() not in VIDEO_EXTENSIONS
        if loose and (video.path.endswith(".npy") or os.path.isdir(video.path)):
            raise UserError(f"{printable(video.path)} states no frame rate; give it with --source-fps")
    if on_error == "fail" and source.rejected:
        first = source.rejected[0]
        raise UserError(
            f"{first.path}: {first.stage}: {first.reason} (the first of {len(source.rejected)} such sources in "
            f"{source.root}); mend or remove it, or leave --on-error fail out"
        )
    with explained(f"reading {storage}"):
        is_begun(storage)  # before a lock is put there


def refuse_rejected(storage: Storage, done: list[pa.Table], on_error: str) -> None:
    """With on_error "fail": raises UserError for a source that a finished shard has left out."""
    if on_error == "fail" and (rejected := rejections(done)):
        first = rejected[0]
        raise UserError(
            f"{first.path}: {first.stage}: {first.reason} (the first of {len(rejected)} sources that an earlier run "
            f"left out of {storage}); mend it and add --retry-rejected, or leave --on-error fail out"
        )


def shards_of(plan: Plan, part: tuple[int, int] | None) -> list[str]:
    """The shards that a run writes: all, or for (k, n) every n-th from the k-th."""
    return [name for number, name in enumerate(plan.shards) if not part or number % part[1] == part[0] - 1]
