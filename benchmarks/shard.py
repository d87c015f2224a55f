"""Frames a second of the conversion: one worker, all cores, and FFmpeg's own command line at the same settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av

from ..preprocessing import sources
from ..preprocessing.convert import convert
from ..preprocessing.sources import SourceList
from ..preprocessing.video import VideoSettings
from .common import compare, synthetic_videos

SETTINGS = VideoSettings()


def run(data: Path | None, repeats: int) -> dict[str, Any]:
    """Measures on the folder of class folders `data`, or on synthetic videos of 320x240."""
    if data is not None:
        return _measure(sources.folder(data), repeats)
    with synthetic_videos(8, 320, 240) as videos:
        return _measure(sources.folder(videos / "UCF-101"), repeats)


def _measure(source: SourceList, repeats: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    contenders = {
        "genkd, 1 worker": lambda: _genkd(source, 1),
        f"genkd, {cores} workers": lambda: _genkd(source, cores),
    }
    if shutil.which("ffmpeg"):
        contenders[f"ffmpeg, {cores} processes"] = lambda: _ffmpeg(source, cores)
    about = {
        "videos": len(source.videos),
        "codec": SETTINGS.codec,
        "short_side": SETTINGS.short_side,
        "gop": SETTINGS.gop,
    }
    return compare("shard", "frames/s", contenders, repeats, about)


def _genkd(source: SourceList, workers: int) -> tuple[float, dict]:
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        started = time.perf_counter()
        summary = convert(source, Path(folder, "data"), SETTINGS, workers=workers)
        elapsed = time.perf_counter() - started
    splits = summary.info["splits"].values()
    frames, size = sum(entry["frames"] for entry in splits), sum(entry["bytes"] for entry in splits)
    return frames / elapsed, {"frames": frames, "MB": round(size / 1e6, 2)}


def _ffmpeg(source: SourceList, processes: int) -> tuple[float, dict]:
    params = f"keyint={SETTINGS.gop}:min-keyint={SETTINGS.gop}:scenecut=0:bframes=0:open-gop=0:threads=1"
    side = SETTINGS.short_side
    scale = f"scale=w='if(gt(iw,ih),-2,{side})':h='if(gt(iw,ih),{side},-2)':flags=bicubic"

    def one(job: tuple[int, str]) -> int:
        number, path = job
        command = [
            "ffmpeg", "-v", "error", "-threads", "1", "-i", path, "-an", "-vf", scale, "-c:v", "libx264", "-preset",
            SETTINGS.preset, "-tune", "fastdecode", "-crf", "23", "-pix_fmt", "yuv420p", "-x264-params", params,
            "-movflags", "frag_keyframe+empty_moov+default_base_moof", f"{folder}/{number}.mp4",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return os.path.getsize(f"{folder}/{number}.mp4")

    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        started = time.perf_counter()
        with ThreadPoolExecutor(processes) as pool:
            size = sum(pool.map(one, enumerate(video.path for video in source.videos)))
        elapsed = time.perf_counter() - started
        frames = sum(_frames(f"{folder}/{number}.mp4") for number in range(len(source.videos)))
    return frames / elapsed, {"frames": frames, "MB": round(size / 1e6, 2)}


def _frames(path: str) -> int:
    with av.open(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)
