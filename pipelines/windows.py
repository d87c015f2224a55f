"""Windows of untrimmed videos for a detector: which there are, their targets and their splice, by the rules of AFSD.

Lin et al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", CVPR 2021.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from ..thumos_files import thumos_frames

_T = TypeVar("_T")


class Random(Protocol):
    """Where a splice takes its draws from; Python's random.Random is one."""

    def choice(self, seq: Sequence[_T], /) -> _T: ...


class Window(NamedTuple):
    """Frames [offset, offset + clip) of a video and the actions in it: (start, end, label) in frames of the window."""

    offset: int
    actions: tuple[tuple[float, float, int], ...]


class DetectionWindow(NamedTuple):
    """A training window of a video by name, with its targets.

    annotations: (A,3) float64, start and end in frames of the window, then the label; start, end: (clip,) uint8, 1
    where an action starts or ends.
    """

    video: str
    offset: int
    annotations: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Splice(NamedTuple):
    """A window with a stretch of background moved into an action.

    order: int16 (clip,), the frame of the window that stands at each place; segments: (3,2) float64, the action's
    part before the stretch, its part behind it, and the stretch, (start, end) in frames of the spliced window.
    """

    order: np.ndarray
    segments: np.ndarray


def detection_windows(
    video_info_csv: str | Path, annotation_csv: str | Path, class_index: str | Path, clip_length: int = 256,
    stride: int = 30,
) -> list[DetectionWindow]:  # fmt: skip
    """Every training window of THUMOS14's files, videos in the order of the annotations and windows by offset.

    As the original implementation makes them from its frame counts at 10 a second. Raises UserError for a bad file.
    """
    videos = thumos_frames(Path(video_info_csv), Path(annotation_csv), Path(class_index))
    found = []
    for name, (frames, actions) in videos.items():
        for window in training_windows(frames, actions, clip=clip_length, stride=stride):
            start, end = boundary_targets(window.actions, clip_length)
            found.append(DetectionWindow(name, window.offset, np.array(window.actions, np.float64), start, end))
    return found


def window_offsets(frames: int, *, clip: int = 256, stride: int = 128) -> list[int]:
    """Where the windows that cover a whole video begin: every `stride` frames, and one that ends with the video.

    A video of at most `clip` frames is one window.
    """
    last = max(frames - clip, 0)
    offsets = list(range(0, last + 1, stride))
    return offsets if offsets[-1] == last else [*offsets, last]


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


def actions_inside(frames: int, actions: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The actions of which a video of so many frames shows at least half, cut to it. (start, end, label) in frames.

    Four of THUMOS14's validation set, and 26 of its test set, begin after their video's end.
    """
    return [
        (start, min(end, float(frames)), label)
        for start, end, label in actions
        if min(end, frames) - start >= 0.5 * (end - start)
    ]


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


def splice(
    actions: Sequence[tuple[float, float, int]], threshold: int, random: Random, clip: int = 256, *,
    clean: bool = False,
) -> Splice | None:  # fmt: skip
    """Moves `threshold` frames of background into the middle of an action: what a detector must tell from the action.

    actions: (start, end, label) in frames of the window; threshold: frames, that of the video's shortest action. The
    draws are, in turn: an action longer than twice the threshold, where in it, a stretch without action longer than
    the threshold, where in that. None where there is no such action or stretch. As in the original implementation a
    stretch between two boundaries counts as background also where another action overlaps it, or where an action ends
    with the window, and frames may then be lost; with clean=True only one that no action touches.
    """
    long = [action for action in actions if action[1] - action[0] > 2 * threshold]
    if not long:
        return None
    start, end, _ = random.choice(long)
    cut = random.choice(range(threshold, math.ceil(end - start - threshold))) + math.ceil(start)
    spans = [(action[0], action[1]) for action in actions]
    times = sorted([0, clip - 1, *itertools.chain.from_iterable(spans)])
    free = [
        (first, last)
        for first, last in itertools.pairwise(times)
        if (first, last) not in spans and math.floor(last) - math.ceil(first) > threshold
    ]
    if clean:
        free = [(first, last) for first, last in free if not any(first < span[1] and span[0] < last for span in spans)]
    if not free:
        return None
    first, last = (round_to(time) for round_to, time in zip((math.ceil, math.floor), random.choice(free), strict=True))
    taken = random.choice(range(last - first - threshold)) + first
    order = np.arange(clip, dtype=np.int16)
    stretch = order[taken : taken + threshold].copy()
    if end < taken or (clean and end == taken):  # the stretch is from behind the action: what lies between moves back
        order[cut + threshold : taken + threshold] = np.arange(cut, taken)
        order[cut : cut + threshold] = stretch
        segments = [(start, cut), (cut + threshold, end + threshold), (cut + 1, cut + threshold - 1)]
    else:
        order[taken : cut - threshold] = np.arange(taken + threshold, cut)
        order[cut - threshold : cut] = stretch
        segments = [(start - threshold, cut - threshold), (cut, end), (cut - threshold + 1, cut - 1)]
    return Splice(order, np.array(segments, np.float64))


def _cut_windows(
    frames: int, actions: Sequence[tuple[float, float, int]], clip: int, stride: int
) -> list[tuple[int, tuple[tuple[float, float, int], ...]]]:
    """(offset, actions cut to the window) for every window of a video."""
    windows = []
    for offset in window_offsets(frames, clip=clip, stride=stride):
        cut = tuple(
            (max(start - offset, 1), min(end - offset, clip), label)
            for start, end, label in actions
            if min(end, offset + clip) - max(start, offset + 1) >= 0.5 * (end - start)
        )
        windows.append((offset, cut))
    return windows
