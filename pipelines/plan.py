"""Which sample, which frames, which crop: pure functions of (seed, epoch, position), the same for any number of ranks.

Every draw comes from a counter-based generator (numpy's Philox) keyed by seed, epoch and item, so it does not depend on
ranks, workers, restarts or the order in which samples are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ..configs.schema import DataConfig
from . import windows
from .windows import Splice, Window
from .windows import detection_windows as detection_windows

# Separate streams of one key. Several noises use every fourth number from _NOISE on.
_ORDER, _SAMPLE, _NOISE, _SPLICE, _DROPOUT = 0, 1, 2, 3, 4


class Colour(NamedTuple):
    """Colour jitter of a clip: factors, and hue in turns of the colour wheel; (1, 1, 1, 0) changes nothing."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class Sample:
    """One clip of one video.

    frames: source frame of each clip frame (T,), fewer where the video ends before a clip that is padded; crop: top,
    left, bottom, right in pixels; window: for detection, where it begins and its actions; splice: how its frames are
    put together again for the triplet branch, where that is possible.
    """

    row: int
    frames: np.ndarray
    crop: tuple[int, int, int, int]
    flip: bool
    colour: Colour | None = None
    window: Window | None = None
    splice: Splice | None = None


class Shapes(NamedTuple):
    """Of every row of the index: frames, and width and height of the pictures that clips are cut from."""

    num_frames: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def of(self, row: int) -> tuple[int, int, int]:
        return int(self.num_frames[row]), int(self.width[row]), int(self.height[row])


class Plan(Protocol):
    """What a loader goes through: `count` positions an epoch. rows: the videos it is about, in key order."""

    rows: np.ndarray

    @property
    def count(self) -> int: ...

    def sample(self, epoch: int, position: int, skip: int = 0) -> Sample:
        """The clip at a position of an epoch. skip: of the item so many places later, for one that cannot be used."""
        ...


class TrainingClips:
    """A random clip of every video, each once an epoch. shards: of every row, where epochs shuffle by shard.

    With config.fixed_views = K the clips of epoch e + K are those of epoch e, in another order.
    """

    def __init__(self, config: DataConfig, seed: int, rows: np.ndarray, shapes: Shapes, shards: np.ndarray | None):
        self.rows, self.count = rows, len(rows)
        self._config, self._seed, self._shapes = config, seed, shapes
        self._order = _orders(config, seed, self.count, None if shards is None else shards[rows])

    def sample(self, epoch: int, position: int, skip: int = 0) -> Sample:
        row = int(self.rows[self._order(epoch)[(position + skip) % self.count]])
        draw = epoch % self._config.fixed_views if self._config.fixed_views else epoch
        return train_sample(self._config, self._seed, draw, row, *self._shapes.of(row))


class EvaluationClips:
    """views = (clips, crops) of every video, in key order; the views of a video stand next to each other."""

    def __init__(self, config: DataConfig, rows: np.ndarray, shapes: Shapes, views: tuple[int, int]):
        self.rows, self._views = rows, views
        self._each = views[0] * views[1]
        self.count = len(rows) * self._each
        self._config, self._shapes = config, shapes

    def sample(self, epoch: int, position: int, skip: int = 0) -> Sample:
        row = int(self.rows[position // self._each])
        return eval_samples(self._config, row, *self._shapes.of(row), *self._views)[position % self._each]


class TrainingWindows:
    """Every window of untrimmed videos that holds a whole action, each once an epoch, cropped and flipped at random.

    actions: of each of `rows`, (start, end, label) in frames of the video counted from 1.
    """

    def __init__(
        self, config: DataConfig, seed: int, rows: np.ndarray, shapes: Shapes, shards: np.ndarray | None,
        actions: Sequence[Sequence[tuple[float, float, int]]],
    ):  # fmt: skip
        self.rows = rows
        self._config, self._seed, self._shapes = config, seed, shapes
        options = {"clip": config.clip_length, "stride": config.window_stride}
        self._items: list[tuple[int, Window]] = []
        self._thresholds: dict[int, int] = {}
        for row, own in zip(rows.tolist(), actions, strict=True):
            frames = int(shapes.num_frames[row])
            self._items += [(row, window) for window in windows.training_windows(frames, own, **options)]
            self._thresholds[row] = windows.shortest_action(frames, own, **options)
        self.count = len(self._items)
        of_items = None if shards is None else shards[[row for row, _ in self._items]]
        self._order = _orders(config, seed, self.count, of_items)

    def sample(self, epoch: int, position: int, skip: int = 0) -> Sample:
        item = int(self._order(epoch)[(position + skip) % self.count])
        row, window = self._items[item]
        num_frames, width, height = self._shapes.of(row)
        config, random = self._config, _random(self._seed, epoch, _SAMPLE, item)
        crop = multi_scale_crop(random, width, height, config.scales, config.max_distort, config.crop_positions)
        flip = bool(random.random() < config.flip)
        chooser = _Chooser(_random(self._seed, epoch, _SPLICE, item))
        spliced = windows.splice(window.actions, self._thresholds[row], chooser, config.clip_length, clean=True)
        frames = window_frames(window.offset, num_frames, config)
        return Sample(row, frames, crop, flip, _colour(random, config), window, spliced)


class EvaluationWindows:
    """Windows that cover every video to its end, in key order, each with a crop from the centre."""

    def __init__(self, config: DataConfig, rows: np.ndarray, shapes: Shapes):
        self.rows, self._config, self._shapes = rows, config, shapes
        self._items = [
            (row, offset)
            for row in rows.tolist()
            for offset in windows.window_offsets(
                int(shapes.num_frames[row]), clip=config.clip_length, stride=config.eval_window_stride
            )
        ]
        self.count = len(self._items)

    def sample(self, epoch: int, position: int, skip: int = 0) -> Sample:
        row, offset = self._items[position]
        num_frames, width, height = self._shapes.of(row)
        (crop,) = square_crops(width, height, 1, self._config.eval_scale)
        return Sample(row, window_frames(offset, num_frames, self._config), crop, False, None, Window(offset, ()))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `count` items are seen in an epoch: a permutation of 0..count-1, int64."""
    return _random(seed, epoch, _ORDER, 0).permutation(count)


def block_order(shards: np.ndarray, seed: int, epoch: int, width: int) -> np.ndarray:
    """The same for items that lie in shards (count,): few shards are in use at a time.

    The shards are shuffled, then the items within each `width` shards in a row. With width = number of shards it is a
    shuffle of everything.
    """
    random = _random(seed, epoch, _ORDER, 0)
    _, of_item = np.unique(shards, return_inverse=True)
    place_of_shard = random.permutation(int(of_item.max()) + 1) if len(shards) else of_item
    shuffled = random.permutation(len(shards))
    return shuffled[np.argsort(place_of_shard[of_item[shuffled]] // width, kind="stable")]


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Global batches of an epoch; the last one is smaller where batch_size does not divide count."""
    return -(-count // batch_size)


def rank_positions(batch: int, batch_size: int, count: int, rank: int, world_size: int) -> tuple[range, int]:
    """The positions of a rank in a global batch, and the size of that batch over all ranks.

    Batch b covers positions [b*batch_size, (b+1)*batch_size), cut off at count; ranks take consecutive slices whose
    sizes differ by one at most, so every position belongs to exactly one rank.
    """
    start = batch * batch_size
    total = min(batch_size, count - start)
    return range(start + total * rank // world_size, start + total * (rank + 1) // world_size), total


def train_sample(
    config: DataConfig, seed: int, epoch: int, row: int, num_frames: int, width: int, height: int
) -> Sample:
    """The training clip of one video in one epoch: a random window, multi-scale crop, flip and colour jitter."""
    random = _random(seed, epoch, _SAMPLE, row)
    span = (config.clip_length - 1) * config.stride + 1
    start = int(random.integers(0, max(1, num_frames - span + 1)))
    crop = multi_scale_crop(random, width, height, config.scales, config.max_distort, config.crop_positions)
    flip = bool(random.random() < config.flip)
    moved = random.integers(0, config.frame_jitter + 1, config.clip_length) if config.frame_jitter else 0
    frames = window_frames(start, num_frames, config, moved)
    return Sample(row, frames, crop, flip, _colour(random, config))


def eval_samples(
    config: DataConfig, row: int, num_frames: int, width: int, height: int, clips: int, crops: int
) -> list[Sample]:
    """The views of one video: `clips` windows spread evenly over it, each with 1 (centre) or 3 square crops."""
    span = (config.clip_length - 1) * config.stride + 1
    slack = max(0, num_frames - span)
    starts = [round(slack * (k + 0.5) / clips) if clips > 1 else slack // 2 for k in range(clips)]
    return [
        Sample(row, window_frames(start, num_frames, config), crop, False)
        for start in starts
        for crop in square_crops(width, height, crops, config.eval_scale)
    ]


def noise(seed: int, epoch: int, rows: Iterable[int], shape: tuple[int, ...], draw: int = 0) -> np.ndarray:
    """Standard normal noise for the samples of a batch: float32 (N, *shape), each sample's own in each epoch.

    draw: which of several that do not depend on each other.
    """
    drawn = [_random(seed, epoch, _NOISE + 4 * draw, row).standard_normal(shape, np.float32) for row in rows]
    return np.stack(drawn)


def dropout(seed: int, epoch: int, rows: Iterable[int], shape: tuple[int, ...], share: float) -> np.ndarray:
    """What dropout multiplies the samples of a batch with: float32 (N, *shape), each sample's own in each epoch.

    Zero for `share` of the values, 1 / (1 - share) for the others.
    """
    kept = [_random(seed, epoch, _DROPOUT, row).random(shape, np.float32) >= share for row in rows]
    return np.stack(kept) * np.float32(1 / (1 - share))


def window_frames(start: int, num_frames: int, config: DataConfig, moved: np.ndarray | int = 0) -> np.ndarray:
    """Source frames of a clip that begins at `start`, each moved forward by `moved`: int32 (T,).

    Beyond its end a video is played in a loop or, where the clip is padded, gives no more frames. A frame that is only
    moved beyond the end is the last one.
    """
    planned = start + np.arange(config.clip_length) * config.stride
    frames = np.where(planned < num_frames, np.minimum(planned + moved, num_frames - 1), planned % num_frames)
    if config.padding in ("black", "zero"):
        frames = frames[planned < num_frames]
    return frames.astype(np.int32)


def multi_scale_crop(
    random: np.random.Generator, width: int, height: int, scales: tuple[float, ...], max_distort: int, positions: str
) -> tuple[int, int, int, int]:
    """A crop whose sides are two of `scales` times the short side, at most max_distort steps apart.

    positions: "random" anywhere in the frame, or "corners", one of the four corners and the centre. Wang et al.,
    "Temporal Segment Networks", ECCV 2016, with positions computed from the crop's own size.
    """
    short = min(width, height)
    sides = [max(1, round(short * scale)) for scale in scales]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= max_distort]
    crop_width, crop_height = pairs[int(random.integers(len(pairs)))]
    room_x, room_y = width - crop_width, height - crop_height
    if positions == "corners":
        corners = [(0, 0), (room_x, 0), (0, room_y), (room_x, room_y), (room_x // 2, room_y // 2)]
        left, top = corners[int(random.integers(len(corners)))]
    else:
        left, top = int(random.integers(room_x + 1)), int(random.integers(room_y + 1))
    return top, left, top + crop_height, left + crop_width


def square_crops(width: int, height: int, crops: int, scale: float = 1.0) -> list[tuple[int, int, int, int]]:
    """Squares of `scale` times the short side: the centre (1), or both ends and the centre of the long side (3)."""
    short = min(width, height)
    side = max(1, round(short * scale))
    across, room = (short - side) // 2, max(width, height) - side
    offsets = {1: [room // 2], 3: [0, room // 2, room]}[crops]
    corners = [(across, o) if width >= height else (o, across) for o in offsets]
    return [(top, left, top + side, left + side) for top, left in corners]


def _colour(random: np.random.Generator, config: DataConfig) -> Colour | None:
    if not config.jitters_colour:
        return None
    strengths = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (float(random.uniform(1 - strength, 1 + strength)) for strength in strengths)
    return Colour(brightness, contrast, saturation, float(random.uniform(-config.hue, config.hue)))


def _orders(config: DataConfig, seed: int, count: int, shards: np.ndarray | None):
    """A function: epoch -> the order of `count` items, which keeps the latest."""

    @lru_cache(maxsize=2)  # the epoch that is read ahead, and the one that is consumed
    def order(epoch: int) -> np.ndarray:
        if shards is None:
            return epoch_order(count, seed, epoch)
        return block_order(shards, seed, epoch, config.shuffle_shards)

    return order


class _Chooser:
    """numpy's generator with the one method of Python's that a splice asks for."""

    def __init__(self, random: np.random.Generator):
        self._random = random

    def choice(self, seq: Sequence):
        return seq[int(self._random.integers(len(seq)))]


def _random(seed: int, epoch: int, stream: int, item: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, item]))
