"""Windows of untrimmed videos for training a detector, and its targets, by the rule of AFSD (CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Frames [offset, offset + clip) of a video and the actions in it: (start, end, label) in frames of the window."""

    offset: int
    actions: tuple[tuple[float, float, int], ...]


def training_windows(
    frames: int, actions: Sequence[tuple[float, float, int]], *, clip: int = 256, stride: int = 30
) -> list[Window]:
    """Every window of a video that holds at least one whole action, by offset.

    frames: the video's length; actions: (start, end, label) in its frames, counted from 1, start < end. Windows begin
    every `stride` frames, and one ends with the video; a video of at most `clip` frames is one window. A window has
    the actions of which at least half lies in it, cut to it.
    """
    return [
        Window(offset, cut)
        for offset, cut in _cut_windows(frames, actions, clip, stride)
        if any(offset + 1 <= start and end <= offset + clip for start, end, _ in actions)
    ]


def shortest_action(
    frames: int, actions: Sequence[tuple[float, float, int]], *, clip: int = 256, stride: int = 30
) -> int:
    """Frames, rounded up, of a video's shortest action as cut to any window with half of it; at most `clip`."""
    spans = [end - start for _, cut in _cut_windows(frames, actions, clip, stride) for start, end, _ in cut]
    if frames <= clip:
        spans += [end - start for start, end, _ in actions]
    return math.ceil(min([clip, *spans]))


def boundary_targets(actions: Sequence[tuple[float, float, int]], clip: int = 256) -> np.ndarray:
    """Where actions start and where they end: uint8 (2, clip), 1 around each boundary.

    The stretch of ones reaches a twentieth of the action to each side, at least 1 frame, rounded to whole frames.
    """
    targets = np.zeros((2, clip), np.uint8)
    for start, end, _ in actions:
        reach = max((end - start) / 10, 2.0) / 2
        for row, boundary in enumerate((start, end)):
            first, last = (min(max(round(boundary + side), 0), clip - 1) for side in (-reach, reach))
            targets[row, first : last + 1] = 1
    return targets


def _cut_windows(
    frames: int, actions: Sequence[tuple[float, float, int]], clip: int, stride: int
) -> list[tuple[int, tuple[tuple[float, float, int], ...]]]:
    """(offset, actions cut to the window) for every window of a video."""
    last = max(frames - clip, 0)
    offsets = list(range(0, last + 1, stride))
    if offsets[-1] != last:
        offsets.append(last)
    windows = []
    for offset in offsets:
        cut = tuple(
            (max(start - offset, 1), min(end - offset, clip), label)
            for start, end, label in actions
            if min(end, offset + clip) - max(start, offset + 1) >= 0.5 * (end - start)
        )
        windows.append((offset, cut))
    return windows
