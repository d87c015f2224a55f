"""The original's own preparation formats: data sets as sources, folders of JPEG frames with n_frames."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa

from ..errors import UserError, explain_os_error
from ..files import locked, write_atomically, write_json
from ..storage import refuse_inside, storage_at
from . import engines
from .decoding import FRAME_NAME, Frames, VideoError, build_graph, filtered, open_frames, upright_filters
from .lookup import printable
from .shards import ERROR_SCHEMA, Dataset, parquet_bytes
from .sources import Annotation, Rejection, SourceList, SourceVideo, sorted_unique

_PARTIAL = ".partial"
_MAX_TASKS = 1024  # waiting for a future takes longer the more of them there are


def dataset_sources(dataset: Dataset, split: str | None = None) -> SourceList:
    """The stored videos of an opened data set (of one split, or of all) as sources, sorted by key.

    Each is a span of its shard: size is the payload's in bytes, fps the stored rate, mtime_ns its checksum.
    Raises UserError for an unknown or empty split or a data set that is not on a local disk, Corrupt for a row that
    points outside the data set.
    """
    rows = range(dataset.table.num_rows) if split is None else dataset.rows(split).tolist()
    splits, annotations = dataset.table["split"], dataset.table["annotations"]
    videos = []
    for row in rows:
        video = dataset.video(row)
        videos.append(
            SourceVideo(
                key=video.key,
                path=str(dataset.path / "shards" / video.shard),
                split=splits[row].as_py(),
                label=video.label,
                size=video.size,
                # The checksum in the place of a time: a video that was stored again is noticed by it.
                mtime_ns=video.crc32c,
                span=(video.offset, video.size),
                fps=video.fps,
                annotations=tuple(Annotation(**entry) for entry in annotations[row].as_py() or ()),
            )
        )
    return SourceList(dataset.info.get("name", dataset.path.name), dataset.path, tuple(dataset.classes), tuple(videos))


# --- One output a video ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A finished run. keys: the videos that are complete in `out`; resumed: how many of them earlier runs wrote.

    frames: how many this run wrote; rejected: the sources that could not be used, as in notes/errors.parquet;
    changed: those that were done before, and have changed since.
    """

    out: Path
    notes: Path
    keys: tuple[str, ...]
    resumed: int
    frames: int
    rejected: list[Rejection]
    changed: tuple[str, ...]


def notes_folder(out: Path) -> Path:
    """OUT.genkd, for errors.parquet, sources.json, settings and lock: the original's tools take every entry of OUT for
    a class."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}.genkd")


def write_each(
    source: SourceList,
    out: Path,
    settings: dict[str, Any],
    is_done: Callable[[str], bool],
    output: Callable[[str], Path],
    write: Callable[[SourceVideo, Callable[[], None]], int],
    *,
    workers: int,
    on_start: Callable[[int, int], None],
    on_videos: Callable[[int], None],
) -> Written:
    """Runs `write` for every video of `source` whose key is not done yet, on `workers` processes (0: in this one).

    write(video, beat) puts the video's output at output(key), whole or not at all, and returns its number of frames;
    it calls beat now and then, which may raise to stop, and raises VideoError for a bad source. What was written of a
    source that has another size or time now is written again. settings: what must be
    the same for all runs that write `out`. on_start gets the number of videos and how many are done.
    Raises UserError if `out` holds anything else or is being written, or if no video can be used.
    """
    out = Path(out).absolute()
    notes = notes_folder(out)
    if not source.videos:
        raise UserError(f"{source.root} holds no video")
    refuse_inside(storage_at(out), storage_at(source.root))
    for video in source.videos:
        parts = video.key.split("/")
        if {"", ".", ".."} & set(parts) or parts[0] == _PARTIAL:
            raise UserError(f"{video.path}: a video with the key {video.key!r} cannot be written below {out}")
    try:
        _is_begun(out, notes)  # a folder of other things is refused before a lock is put beside it
        with locked(notes, f"another run is writing {out}; wait for it, or stop it first"):
            _adopt(out, notes, settings)
            shutil.rmtree(out / _PARTIAL, ignore_errors=True)
            changed = _forget_changed(source, notes / "sources.json", is_done, output)
            pending = [video for video in source.videos if not is_done(video.key)]
            on_start(len(source.videos), len(source.videos) - len(pending))
            frames, rejected, bad = _run(source, pending, write, workers, on_videos)
            shutil.rmtree(out / _PARTIAL, ignore_errors=True)
            rows = [dataclasses.asdict(entry) for entry in rejected]
            write_atomically(notes / "errors.parquet", parquet_bytes(pa.Table.from_pylist(rows, ERROR_SCHEMA)))
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {out}")) from None
    keys = tuple(video.key for video in source.videos if video.key not in bad)
    if not keys:
        first = rejected[0]
        raise UserError(
            f"none of the {len(source.videos)} videos could be used (the first, {first.path}: {first.reason}); all "
            f"reasons are in {notes / 'errors.parquet'}"
        )
    return Written(out, notes, keys, len(source.videos) - len(pending), frames, rejected, changed)


@contextlib.contextmanager
def placing(out: Path, name: str) -> Iterator[Path]:
    """A path on the same disk for a new file or folder; if the block ends well, what it made becomes OUT/name.

    Otherwise it is deleted: at once, or, if the process is killed, by the next run.
    """
    partial, target = out / _PARTIAL / uuid.uuid4().hex, out / name
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():  # os.replace takes the place of files only
            shutil.rmtree(target)
        os.replace(partial, target)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _is_begun(out: Path, notes: Path) -> bool:
    """Whether a run has begun `out`, and not only its notes. Raises UserError if other things are there instead."""
    if not out.is_dir() or not any(entry.name != _PARTIAL for entry in out.iterdir()):
        return False
    if not (notes / "settings.json").exists():
        raise UserError(f"{out} is not empty, and not a folder that genkd began; choose another folder")
    return True


def _adopt(out: Path, notes: Path, settings: dict[str, Any]) -> None:
    """Begins an empty folder with these settings, or continues one that has the same."""
    out.mkdir(exist_ok=True)
    path = notes / "settings.json"
    if not _is_begun(out, notes):
        write_json(path, settings)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; delete {out} and run again") from None
    if old != settings:
        raise UserError(f"{out} was begun with other settings ({old} there, {settings} now); choose another folder")


def _forget_changed(
    source: SourceList, path: Path, is_done: Callable[[str], bool], output: Callable[[str], Path]
) -> tuple[str, ...]:
    """Deletes what was written of sources that are others now, then notes at path how all are; returns their keys."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"{path} is damaged; delete the whole output and run again, or that file to keep what is there")
    states = {video.key: [video.size, video.mtime_ns] for video in source.videos}
    changed = tuple(key for key, state in states.items() if known.get(key, state) != state and is_done(key))
    for key in changed:
        if output(key).is_dir():
            shutil.rmtree(output(key))
        else:
            output(key).unlink()
    write_atomically(path, json.dumps({**known, **states}, ensure_ascii=False).encode())
    return changed


def _run(
    source: SourceList, pending: list[SourceVideo], write: Callable, workers: int, on_videos: Callable[[int], None]
) -> tuple[int, list[Rejection], set[str]]:
    """Frames written, all rejections, and the keys of the videos that were rejected."""
    size = max(1, -(-len(pending) // _MAX_TASKS))
    tasks = [(write, str(source.root), pending[at : at + size]) for at in range(0, len(pending), size)]
    frames, rejected, bad = 0, list(source.rejected), set()

    def on_report(videos: int) -> None:
        if videos:  # 0 is a worker's question whether to go on
            on_videos(videos)

    for result in engines.run_local(_write_some, tasks, min(workers, len(tasks)), on_report):
        if result:
            frames += result[0]
            bad |= result[1].keys()
            rejected += result[1].values()
    return frames, sorted(rejected, key=lambda entry: entry.path), bad


def _write_some(
    task: tuple[Callable, str, list[SourceVideo]], report: engines.Report
) -> tuple[int, dict[str, Rejection]]:
    write, root, videos = task
    frames, rejected = 0, {}
    for video in videos:
        try:
            frames += write(video, functools.partial(report, 0))
        except VideoError as error:
            name = video.key if video.span else printable(os.path.relpath(video.path, root))
            rejected[video.key] = Rejection(name, error.stage, error.reason)
        report(1)
    return frames, rejected


# --- Folders of JPEG frames ------------------------------------------------------------------------------------------


def write_frames(
    source: SourceList,
    out: Path,
    *,
    height: int = 240,
    quality: int = 95,
    flat: bool = False,
    workers: int,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes OUT/KEY/image_00001.jpg and on, and OUT/KEY/n_frames with their number, for every video.

    All frames of the source, upright; scaled (bicubic) to `height` pixels and the width that FFmpeg's scale=-1:height
    gives, with height 0 not scaled. quality: libjpeg's, 1 to 100. flat: OUT/NAME with the key's last part only, as
    lists of names without classes want it. A folder appears once it is complete, so a killed run is continued by the
    next; a bad source is recorded in OUT.genkd/errors.parquet and the run goes on. on_start gets the number of videos
    and how many earlier runs finished. Raises UserError for values out of range or two videos in one folder, and as
    write_each does.
    """
    if height and not 16 <= height <= 4096:
        raise UserError(f"height {height} is not between 16 and 4096 pixels (0 keeps the source's)")
    if not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality} is not between 1 and 100")
    out = Path(out).absolute()
    if flat:
        named = (dataclasses.replace(video, key=video.key.rpartition("/")[2]) for video in source.videos)
        source = dataclasses.replace(source, videos=sorted_unique(named))
    keys = {video.key for video in source.videos}
    for key in sorted(keys):
        if any(key[: slash.start()] in keys for slash in re.finditer("/", key)):
            raise UserError(f"the frames of {key!r} would lie in the folder of another video's; rename one of them")
    return write_each(
        source,
        out,
        {"format": "frames", "height": height, "quality": quality, "flat": flat},
        lambda key: (out / key / "n_frames").is_file(),
        lambda key: out / key,
        functools.partial(_write_folder, out=out, height=height, quality=quality),
        workers=workers,
        on_start=on_start,
        on_videos=on_videos,
    )


def _write_folder(video: SourceVideo, beat: Callable[[], None], *, out: Path, height: int, quality: int) -> int:
    with open_frames(video) as frames, placing(out, video.key) as folder:
        if height and frames.codec == "npy" and frames.first.format.name == "gray":
            raise VideoError("open", "flow cannot be scaled once it is computed; use height 0")
        folder.mkdir()
        scaling = [("scale", f"-1:{height}:flags=bicubic+accurate_rnd")] if height else []
        count = 0
        for count, image in enumerate(images(frames, "bgr24", scaling), 1):
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            (folder / (FRAME_NAME % count)).write_bytes(data.tobytes())
            if count % 64 == 0:
                beat()
        frames.refuse_damaged()
        (folder / "n_frames").write_text(str(count))
    return count


def images(frames: Frames, pixel_format: str, filters: Iterable[tuple[str, str]] = ()) -> Iterator[np.ndarray]:
    """The opened frames upright and filtered, as uint8 (H,W,3) of an FFmpeg pixel format. Raises VideoError."""
    try:
        graph = build_graph(frames, [*upright_filters(frames), *filters, ("format", pixel_format)])
        for frame in filtered(graph, frames):
            yield frame.to_ndarray()
    except av.FFmpegError as error:
        raise VideoError("decode", f"the frames cannot be scaled ({error.strerror})") from None
