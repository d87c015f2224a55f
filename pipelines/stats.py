"""What a loader has delivered, and what that took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counts from several threads. started: when the first batch was asked for; wait_s: seconds that the consumer
    waited for batches; decoded: frames that were decoded for the `used` ones, for both data sets of a pair; read:
    bytes."""

    started: float | None = None
    batches: int = 0
    clips: int = 0
    frames: int = 0
    wait_s: float = 0.0
    first_batch_s: float | None = None
    decoded: int = 0
    used: int = 0
    read: int = 0
    replaced: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """A batch is asked for."""
        if self.started is None:
            self.started = time.perf_counter()

    def media(self, read: int, decoded: int, used: int) -> None:
        """A clip's bytes are there, and its frames decoded or about to be."""
        with self._lock:
            self.read += read
            self.decoded += decoded
            self.used += used

    def batch(self, clips: int, frames: int, waited: float) -> None:
        """A batch was handed over."""
        if self.first_batch_s is None and self.started is not None:
            self.first_batch_s = time.perf_counter() - self.started
        self.batches += 1
        self.clips += clips
        self.frames += frames
        self.wait_s += waited

    def read_out(self) -> dict[str, float]:
        """Counts, and rates since the first batch was asked for, of this rank. decoded_per_used: frames decoded for one
        that a clip has; wait_share: of that time, how much the consumer waited (0..1)."""
        seconds = max(0.0 if self.started is None else time.perf_counter() - self.started, 1e-9)
        return {
            "batches": self.batches,
            "clips": self.clips,
            "seconds": seconds,
            "clips_per_s": self.clips / seconds,
            "frames_per_s": self.frames / seconds,
            "decoded_frames": self.decoded,
            "used_frames": self.used,
            "decoded_per_used": self.decoded / self.used if self.used else 0.0,
            "read_mb_per_s": self.read / 1e6 / seconds,
            "read_mb": self.read / 1e6,
            "wait_s": self.wait_s,
            "wait_share": min(1.0, self.wait_s / seconds),
            "first_batch_s": self.first_batch_s or 0.0,
            "replaced": self.replaced,
        }
