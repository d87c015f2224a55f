"""What a conversion would do, without doing it: the plan, and size and time extrapolated from a sample."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .containers import open_container, video_stream
from .decoding import VideoError, stream_rate
from .plan import Plan
from .sources import SourceList, SourceVideo

SAMPLE_VIDEOS = 12
SAMPLE_SECONDS = 30.0


class _TooLong(Exception):
    """The sample's time is over in the middle of a video."""


class _Trial:
    """A sink that keeps only the size of what is written, and counts frames until `deadline`."""

    def __init__(self, deadline: float):
        self.size, self.frames, self._deadline = 0, 0, deadline

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def reset(self) -> None:
        self.size = self.frames = 0

    def on_frame(self) -> None:
        self.frames += 1
        if time.monotonic() > self._deadline:
            raise _TooLong


class _Sample:
    """Sums over the converted sources. part: how much of the last one was done, where it was not done whole."""

    def __init__(self):
        self.began = time.monotonic()
        self.videos = self.failed = 0
        self.size_in, self.size_out, self.part = 0.0, 0, 0.0
        self.error: str | None = None

    def take(self, video: SourceVideo, settings: Any) -> None:
        """Converts a source in memory. Raises _TooLong when the time is over; what was done until then counts."""
        trial = _Trial(self.began + 2 * SAMPLE_SECONDS)
        try:
            settings.encode(video, trial, trial.on_frame)
        except VideoError as error:
            self.failed += 1
            self.error = self.error or f"{video.key}: {error.stage}: {error.reason}"
        except _TooLong:
            self.part = _share(video, settings, trial.frames)
            self.size_in += self.part * video.size
            self.size_out += trial.size
            raise
        self.videos += 1
        self.size_in += video.size
        self.size_out += trial.size


def estimate(
    source: SourceList,
    settings: Any,
    plan: Plan,
    names: list[str],
    pending: list[str],
    *,
    workers: int,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_video: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """A preview's numbers, and bytes and seconds expected with `workers` processes as fast as this one.

    plan, names, pending: as preview.preview gives them. Up to SAMPLE_VIDEOS sources, evenly spread over the sorted
    sizes, are converted in memory for SAMPLE_SECONDS, and a last one twice as long at the most; cost and size are
    taken to grow with the sources' bytes. Nothing is written. The result is JSON: videos, source_bytes, splits and
    shards of `names`; finished_shards; classes; rejected (by reason); sample (videos, failed, seconds, part: share of
    one more video where the time was over in it, error: the first one); estimate (bytes, seconds of what is to be
    done; None if no sample could be converted).
    """
    videos = [video for name in names for video in plan.shards[name]]
    todo = [video for name in pending for video in plan.shards[name]]
    ordered = sorted(todo, key=lambda video: (video.size, video.key))
    number = min(SAMPLE_VIDEOS, len(ordered))
    chosen = [ordered[(2 * index + 1) * len(ordered) // (2 * number)] for index in range(number)]
    # From the middle outwards, so that a sample cut short by the clock is still typical.
    chosen = sorted(chosen, key=lambda video: abs(chosen.index(video) - number // 2))
    on_start(number, 0)
    sample = _Sample()
    for video in chosen:
        if sample.videos and time.monotonic() - sample.began > SAMPLE_SECONDS:
            break
        try:
            sample.take(video, settings)
        except _TooLong:
            break
        on_video(1)
    seconds = time.monotonic() - sample.began
    converted = sample.size_in and (sample.failed < sample.videos or sample.part)
    scale = 0.0 if not todo else sum(video.size for video in todo) / sample.size_in if converted else None
    return {
        "videos": len(videos),
        "source_bytes": sum(video.size for video in videos),
        "splits": dict(sorted(Counter(video.split for video in videos).items())),
        "classes": len(source.classes),
        "shards": len(names),
        "finished_shards": len(names) - len(pending),
        "rejected": dict(Counter(entry.reason for entry in source.rejected).most_common()),
        "sample": {"videos": sample.videos, "failed": sample.failed, "seconds": round(seconds, 3),
                   "part": round(sample.part, 4), "error": sample.error},
        "estimate": None if scale is None else {
            "bytes": round(sample.size_out * scale),
            "seconds": round(seconds * scale / max(1, min(workers, len(pending))), 1),
            "workers": workers,
        },
    }  # fmt: skip


def _share(video: SourceVideo, settings: Any, written: int) -> float:
    """How much of a source `written` frames of its conversion are, by counting its packets; 0 if that fails."""
    try:
        if video.path.endswith(".npy"):
            frames, rate = len(np.load(video.path, mmap_mode="r")), video.fps
        else:
            with open_container(video) as container:
                stream = video_stream(container)
                rate = float(stream_rate(stream) or 0)
                start, end = video.start_s or 0.0, video.end_s or float("inf")
                frames = sum(
                    bool(packet.size and (packet.pts is None or start <= packet.pts * packet.time_base < end))
                    for packet in container.demux(stream)
                )
    except (VideoError, OSError, ValueError):
        return 0.0
    fps = getattr(settings, "fps", None)
    expected = frames * fps / rate if fps and rate else frames
    return min(1.0, written / expected) if expected else 0.0
