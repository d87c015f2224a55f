"""What sliding windows say about the time that they cover: segments of one class, scores and attention at a moment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SAMPLES = 20  # of the attention, in a second


class Segment(NamedTuple):
    """A stretch of video whose windows agree on their top class: seconds, class number, mean score, windows."""

    start_s: float
    end_s: float
    label: int
    score: float
    windows: int


class Action(NamedTuple):
    """What a detector found: seconds, class number, score."""

    start_s: float
    end_s: float
    label: int
    score: float


@dataclass(frozen=True)
class ActionTimeline:
    """The actions of one video in order of time, of so many windows.

    left_out: how many more were found that are not among them, and best_left_out the one of these with the highest
    score.
    """

    actions: tuple[Action, ...]
    duration_s: float
    windows: int
    left_out: int = 0
    best_left_out: Action | None = None

    def segments(self) -> tuple[Action, ...]:
        """The actions; unlike a Timeline's segments they may overlap and leave gaps."""
        return self.actions

    def at(self, seconds: float) -> list[Action]:
        """The actions that go on at a time, of each class the one with the highest score, the best first."""
        best: dict[int, Action] = {}
        for action in self.actions:
            if action.start_s <= seconds < action.end_s:
                known = best.get(action.label)
                best[action.label] = action if known is None or action.score > known.score else known
        return sorted(best.values(), key=lambda action: (-action.score, action.label))

    def classes(self) -> list[int]:
        """The numbers of the classes that it has, that with the highest score first."""
        best: dict[int, float] = {}
        for action in self.actions:
            best[action.label] = max(best.get(action.label, 0.0), action.score)
        return sorted(best, key=lambda label: (-best[label], label))


@dataclass(frozen=True)
class Timeline:
    """The windows of one video in order of time.

    starts: (W,) seconds; length_s: how long a window is, which may reach beyond the video; duration_s: of the video;
    scores: (W,K), each row adds up to 1; attention: (W,T') averages over channels, None for networks without a head.
    """

    starts: np.ndarray
    length_s: float
    duration_s: float
    scores: np.ndarray
    attention: np.ndarray | None = None

    @property
    def ends(self) -> np.ndarray:
        """Where each window ends, within the video: (W,) seconds."""
        return np.minimum(self.starts + self.length_s, self.duration_s)

    @property
    def middles(self) -> np.ndarray:
        """The middle of each window's part of the video: (W,) seconds."""
        return (self.starts + self.ends) / 2

    @property
    def mean_scores(self) -> np.ndarray:
        """Scores of the whole video (K,): the mean over its windows, as the views of a video are averaged."""
        return self.scores.mean(0)

    def segments(self) -> list[Segment]:
        """Windows next to each other with the same top class, joined; they cover the video without overlap.

        Where the class changes, the border lies midway between the middles of both windows.
        """
        top = self.scores.argmax(1)
        changes = np.flatnonzero(np.diff(top)) + 1
        bounds = [0, *changes.tolist(), len(top)]
        middles = self.middles
        borders = [0.0, *((middles[at - 1] + middles[at]) / 2 for at in changes), self.duration_s]
        return [
            Segment(float(borders[n]), float(borders[n + 1]), int(top[first]),
                    float(self.scores[first:last, top[first]].mean()), last - first)
            for n, (first, last) in enumerate(itertools.pairwise(bounds))
        ]  # fmt: skip

    def scores_at(self, times: np.ndarray) -> np.ndarray:
        """Scores (N,K) at times in seconds (N,): between the middles of two windows, a mix of both."""
        middles = self.middles
        place = np.interp(times, middles, np.arange(len(middles)))
        before = np.floor(place).astype(int)
        after = np.minimum(before + 1, len(middles) - 1)
        share = (place - before)[:, None]
        return self.scores[before] * (1 - share) + self.scores[after] * share

    def attention_at(self, times: np.ndarray) -> np.ndarray:
        """Attention (N,) at times in seconds (N,), averaged over all windows that cover each.

        A window's T' values stand for T' equal parts of it. A moment that no window covers, as where windows are
        further apart than they are long, gets the nearest value. Raises ValueError without attention.
        """
        if self.attention is None:
            raise ValueError("the network has no attention head")
        times = np.asarray(times, float)
        sums, counts = np.zeros(len(times)), np.zeros(len(times))
        order = np.argsort(times, kind="stable")
        steps, ends = self.attention.shape[1], self.ends
        for start, end, values in zip(self.starts, ends, self.attention, strict=True):
            # The video's last moment belongs to its last window.
            first = np.searchsorted(times, start, sorter=order)
            last = np.searchsorted(times, end, "right" if end >= self.duration_s else "left", sorter=order)
            inside = order[first:last]
            part = ((times[inside] - start) / self.length_s * steps + 1e-9).astype(int)
            sums[inside] += values[np.minimum(part, steps - 1)]
            counts[inside] += 1
        gaps = np.flatnonzero(counts == 0)
        before = np.clip(np.searchsorted(self.starts, times[gaps], "right") - 1, 0, None)
        after = np.minimum(before + 1, len(ends) - 1)
        is_before = times[gaps] - ends[before] <= np.abs(self.starts[after] - times[gaps])
        sums[gaps] = np.where(is_before, self.attention[before, -1], self.attention[after, 0])
        return sums / np.maximum(1, counts)

    def attention_by_second(self) -> list[float] | None:
        """The mean attention of each second of the video, the last one being what is left; None without attention."""
        if self.attention is None:
            return None
        first = np.arange(max(1.0, np.ceil(self.duration_s - 1e-9)))
        parts = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
        times = first[:, None] + np.minimum(1, self.duration_s - first)[:, None] * parts
        return self.attention_at(times.ravel()).reshape(times.shape).mean(1).tolist()


def clock(seconds: float) -> str:
    """Seconds as mm:ss.s; minutes go on beyond 59."""
    tenths = round(seconds * 10)
    return f"{tenths // 600:02d}:{tenths % 600 // 10:02d}.{tenths % 10}"
