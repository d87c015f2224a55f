"""What a conversion would do, without doing it: the plan, and size and time extrapolated from a sample."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from .decoding import VideoError
from .plan import make_plan
from .sources import SourceList

SAMPLE_VIDEOS = 12
SAMPLE_SECONDS = 30.0


class _TooLong(Exception):
    """The sample's time is over in the middle of a video."""


class _Counting:
    """A sink that keeps only the size of what is written."""

    def __init__(self):
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def reset(self) -> None:
        self.size = 0


def estimate(
    source: SourceList,
    settings: Any,
    *,
    workers: int,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_video: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """The plan's numbers, and bytes and seconds expected with `workers` processes as fast as this one.

    Up to SAMPLE_VIDEOS sources, evenly spread over the sorted sizes, are converted in memory for SAMPLE_SECONDS at
    the most; cost and size are taken to grow with the sources' bytes. Nothing is written. The result is
    JSON: videos, source_bytes, splits, classes, shards, rejected (by reason), sample (videos, failed, seconds),
    estimate (bytes, seconds; None if no sample could be converted).
    """
    plan = make_plan(source, settings)
    ordered = sorted(source.videos, key=lambda video: (video.size, video.key))
    number = min(SAMPLE_VIDEOS, len(ordered))
    chosen = [ordered[(2 * index + 1) * len(ordered) // (2 * number)] for index in range(number)]
    # From the middle outwards, so that a sample cut short by the clock is still typical.
    chosen = sorted(chosen, key=lambda video: abs(chosen.index(video) - number // 2))
    on_start(number, 0)
    began = time.monotonic()
    taken = failed = size_in = size_out = 0
    for video in chosen:
        if taken and time.monotonic() - began > SAMPLE_SECONDS:
            break
        sink = _Counting()

        def on_frame() -> None:
            if time.monotonic() - began > 2 * SAMPLE_SECONDS:
                raise _TooLong

        try:
            settings.encode(video, sink, on_frame)
        except VideoError:
            failed += 1
        except _TooLong:
            break
        taken += 1
        size_in += video.size
        size_out += sink.size
        on_video(1)
    seconds = time.monotonic() - began
    total = sum(video.size for video in source.videos)
    scale = total / size_in if size_in else None
    return {
        "videos": len(source.videos),
        "source_bytes": total,
        "splits": dict(sorted(Counter(video.split for video in source.videos).items())),
        "classes": len(source.classes),
        "shards": len(plan.shards),
        "rejected": dict(Counter(entry.reason for entry in source.rejected).most_common()),
        "sample": {"videos": taken, "failed": failed, "seconds": round(seconds, 3)},
        "estimate": {
            "bytes": round(size_out * scale),
            "seconds": round(seconds * scale / max(1, min(workers, len(plan.shards))), 1),
            "workers": workers,
        }
        if scale and failed < taken
        else None,
    }
