"""Videos into a data set: genkd beside FFmpeg's command line and what people prepare videos with today.

Every contender converts the same sources to the same codec settings, as one command in a process of its own, from the
start of its interpreter to its exit: what its user waits for. A row's `extra`: frames, videos a second, MB written,
processor seconds for 1,000 frames (the fair comparison on a busy machine), and the peak memory of all its processes
(sum of PSS, at the most ten looks a second; see process.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..errors import UserError
from ..preprocessing import sources
from ..preprocessing.sources import SourceList
from ..preprocessing.video import VideoSettings
from . import peers, shard_contenders
from .common import compare, synthetic_videos
from .peers import Entry
from .process import Usage, run_measured
from .shard_contenders import Job

SETTINGS = VideoSettings(crf=23)
FAST = "genkd, preset superfast"
COPY, AGAIN = "genkd, copy of fitting sources", "genkd, transcode of fitting sources"
_PEERS = {
    "OpenCV to JPEG": "jpeg", "webdataset + PyAV": "webdataset", "litData optimize": "litdata", "MosaicML MDS": "mds",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one contender took once."""

    usage: Usage
    frames: int
    megabytes: float


def run(data: Path | None, repeats: int) -> dict[str, Any]:
    """Measures on the folder of class folders `data`, or on synthetic videos of 320x240."""
    if data is not None:
        return _measure(sources.folder(data), repeats)
    with synthetic_videos(8, 320, 240) as videos:
        return _measure(sources.folder(videos / "UCF-101"), repeats)


def _measure(source: SourceList, repeats: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    skipped: dict[str, str] = {}
    packages: dict[str, str] = {}
    turns: dict[str, list[Turn]] = {}

    def measured(label: str, entry: Entry) -> Callable[[], tuple[float, dict]]:
        def measure() -> tuple[float, dict]:
            turn = take_turn(*entry)
            turns.setdefault(label, []).append(turn)
            return turn.frames / turn.usage.seconds, {}

        return measure

    with _fitting(source, cores, skipped) as fitting:
        entries = {
            **_genkd_entries(source, fitting, cores),
            **_ffmpeg_entries(source, cores, skipped, packages),
            **_peer_entries(source, cores, skipped, packages),
        }
        about = {
            "videos": len(source.videos), "codec": SETTINGS.codec, "crf": SETTINGS.crf, "preset": SETTINGS.preset,
            "gop": SETTINGS.gop, "short_side": SETTINGS.short_side, "skipped": skipped, "packages": packages,
            "load_before": round(os.getloadavg()[0], 2),
        }  # fmt: skip
        contenders = {label: measured(label, entry) for label, entry in entries.items()}
        result = compare("shard", "frames/s", contenders, repeats, about)
    for row in result["rows"]:
        row["extra"] = _extra(row["median"], turns[row["name"]], len(source.videos))
    result["targets"] = targets({row["name"]: row for row in result["rows"]}, cores)
    return result


def _genkd_entries(source: SourceList, fitting: SourceList | None, cores: int) -> dict[str, Entry]:
    entries = {genkd_label(workers): Entry("genkd", _job(source, workers)) for workers in (1, cores)}
    entries[FAST] = Entry("genkd", _job(source, cores, replace(SETTINGS, preset="superfast")))
    if fitting:
        own_size = replace(SETTINGS, short_side=0)
        entries[COPY] = Entry("genkd", _job(fitting, cores, replace(own_size, codec="copy", gop=300)))
        entries[AGAIN] = Entry("genkd", _job(fitting, cores, own_size))
    return entries


def _ffmpeg_entries(source: SourceList, cores: int, skipped: dict, packages: dict) -> dict[str, Entry]:
    if not shutil.which("ffmpeg"):
        skipped["ffmpeg"] = "no ffmpeg on the PATH"
        return {}
    done = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    packages["ffmpeg"] = done.stdout.split()[2]
    return {ffmpeg_label(processes): Entry("ffmpeg", _job(source, processes)) for processes in (1, cores)}


def _peer_entries(source: SourceList, cores: int, skipped: dict, packages: dict) -> dict[str, Entry]:
    entries = {}
    for label, contender in _PEERS.items():
        found = find_peer(contender)
        if isinstance(found, str):
            skipped[label] = found
            continue
        python, versions = found
        packages.update({f"{label}: {name}": version for name, version in versions.items()})
        entries[f"{label}, {_count(cores, 'worker')}"] = Entry(contender, _job(source, cores), python)
    return entries


def genkd_label(workers: int) -> str:
    """The row of genkd with so many workers."""
    return f"genkd, {_count(workers, 'worker')}"


def ffmpeg_label(processes: int) -> str:
    """The row of the command line with so many processes at a time."""
    return f"ffmpeg, {_count(processes, 'process', 'es')}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number > 1 else ''}"


def targets(rows: Mapping[str, Mapping[str, Any]], cores: int) -> list[dict[str, Any]]:
    """The ratios that genkd is held to, from the rows' medians; those whose rows are missing are left out."""

    def rate(name: str) -> float:
        return rows[name]["median"]

    def videos(name: str) -> float:
        return rows[name]["extra"]["videos/s"]

    def size(name: str) -> float:
        return rows[name]["extra"]["MB"]

    one, all_cores, limit = genkd_label(1), genkd_label(cores), ffmpeg_label(cores)
    jpeg = f"OpenCV to JPEG, {_count(cores, 'worker')}"
    # What is measured, the rows divided, how, the least, the most.
    wanted = [
        ("frames/s against the ffmpeg limit", all_cores, limit, rate, 0.95, None),
        ("videos/s of the copy against the transcode", COPY, AGAIN, videos, 20.0, None),
        ("videos/s against the JPEG loop", all_cores, jpeg, videos, 1.0, None),
        ("bytes against the JPEG loop", all_cores, jpeg, size, None, 0.2),
        ("videos/s against the JPEG loop, preset superfast", FAST, jpeg, videos, 1.0, None),
        ("bytes against the JPEG loop, preset superfast", FAST, jpeg, size, None, 0.2),
        (f"scaling from 1 worker to {cores}", all_cores, one, rate, 0.95 * cores, None),
        (f"for comparison, ffmpeg's scaling from 1 process to {cores}", limit, ffmpeg_label(1), rate, None, None),
    ]
    found = []
    for name, above, below, value, least, most in wanted:
        if above == below or not {above, below} <= rows.keys():
            continue
        ratio = value(above) / value(below)
        met = None if least is most is None else ratio >= (least or 0.0) and ratio <= (most or float("inf"))
        found.append({"name": name, "measured": round(ratio, 3), "at_least": least, "at_most": most, "met": met})
    return found


def take_turn(contender: str, job: Job, python: str = sys.executable) -> Turn:
    """Runs one contender once in a temporary folder. Raises UserError with its last words when it fails."""
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        out, temporary = Path(folder, "out"), Path(folder, "tmp")
        out.mkdir()
        temporary.mkdir()
        usage, frames = _run(contender, job, python, out, temporary)
        paths = [path for path in out.rglob("*") if path.is_file()]
        if not frames:
            frames = sum(_frames(path) for path in paths)
        return Turn(usage, frames, sum(path.stat().st_size for path in paths) / 1e6)


def find_peer(contender: str) -> tuple[str, dict[str, str]] | str:
    """The interpreter that has a peer's packages, and their versions; or why no interpreter has them."""
    return peers.find_peer(shard_contenders.__file__, contender, _environment(None))


@contextmanager
def _fitting(source: SourceList, cores: int, skipped: dict[str, str]) -> Iterator[SourceList | None]:
    """The same videos in the format asked for, as plain MP4 files; None where genkd cannot copy."""
    try:
        replace(SETTINGS, codec="copy")
    except UserError as error:
        skipped[COPY] = str(error)
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        videos, temporary = Path(folder, "videos"), Path(folder, "tmp")
        videos.mkdir()
        temporary.mkdir()
        _run("files", _job(source, cores), sys.executable, videos, temporary)
        yield sources.folder(videos)


def _job(source: SourceList, workers: int, settings: VideoSettings = SETTINGS) -> Job:
    """A job without its folders, which every turn has anew."""
    assert settings.crf is not None
    videos = [(video.key, video.path, video.label) for video in source.videos]
    return Job(
        str(source.root), videos, "", "", workers, settings.codec, settings.short_side, settings.gop, settings.crf,
        settings.preset,
    )  # fmt: skip


def _run(contender: str, job: Job, python: str, out: Path, temporary: Path) -> tuple[Usage, int]:
    """What a contender took and how many frames it logged, its data in `out`, everything else in `temporary`."""
    frames_log = temporary / "frames.log"
    path = temporary / "job.json"
    job = replace(job, out=str(out), frames_log=str(frames_log))
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [python, shard_contenders.__file__, contender, str(path)]
    usage = run_measured(command, _environment(temporary), temporary / "output.log")
    return usage, sum(map(int, frames_log.read_text(encoding="ascii").split())) if frames_log.exists() else 0


def _environment(temporary: Path | None) -> dict[str, str]:
    environment = {**os.environ, "LITDATA_DISABLE_VERSION_CHECK": "1"}  # no request to PyPI inside a measurement
    return {**environment, "TMPDIR": str(temporary)} if temporary else environment


def _extra(rate: float, turns: list[Turn], videos: int) -> dict[str, Any]:
    frames = turns[-1].frames
    peaks = [turn.usage.peak_mb for turn in turns if turn.usage.peak_mb is not None]
    cpu = float(np.median([turn.usage.cpu_seconds for turn in turns]))
    return {
        "frames": frames, "videos/s": round(rate * videos / frames, 2), "MB": round(turns[-1].megabytes, 2),
        "CPU s/1000 frames": round(1000 * cpu / frames, 2), "peak MB": round(max(peaks)) if peaks else None,
    }  # fmt: skip


def _frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)
