"""Which sample, which frames, which crop: pure functions of (seed, epoch, position), the same for any number of ranks.

Every draw comes from a counter-based generator (numpy's Philox) keyed by seed, epoch and row, so it does not depend on
ranks, workers, restarts or the order in which samples are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..configs.schema import DataConfig

_ORDER, _SAMPLE, _NOISE = 0, 1, 2  # separate streams of one key


@dataclass(frozen=True)
class Sample:
    """One clip of one video. frames: source frame of each clip frame (T,); crop: top, left, bottom, right in pixels."""

    row: int
    frames: np.ndarray
    crop: tuple[int, int, int, int]
    flip: bool


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `count` items are seen in an epoch: a permutation of 0..count-1, int64."""
    return _random(seed, epoch, _ORDER, 0).permutation(count)


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
    """The training clip of one video in one epoch: a random window, multi-scale crop and flip."""
    random = _random(seed, epoch, _SAMPLE, row)
    span = (config.clip_length - 1) * config.stride + 1
    start = int(random.integers(0, max(1, num_frames - span + 1)))
    crop = multi_scale_crop(random, width, height, config.scales, config.max_distort, config.crop_positions)
    return Sample(row, window(start, num_frames, config), crop, bool(random.random() < config.flip))


def eval_samples(
    config: DataConfig, row: int, num_frames: int, width: int, height: int, clips: int, crops: int
) -> list[Sample]:
    """The views of one video: `clips` windows spread evenly over it, each with 1 (centre) or 3 square crops."""
    span = (config.clip_length - 1) * config.stride + 1
    slack = max(0, num_frames - span)
    starts = [round(slack * (k + 0.5) / clips) if clips > 1 else slack // 2 for k in range(clips)]
    return [
        Sample(row, window(start, num_frames, config), crop, False)
        for start in starts
        for crop in square_crops(width, height, crops)
    ]


def noise(seed: int, epoch: int, rows: Iterable[int], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise for the samples of a batch: float32 (N, *shape), each sample's own in each epoch."""
    drawn = [_random(seed, epoch, _NOISE, row).standard_normal(shape, np.float32) for row in rows]
    return np.stack(drawn)


def window(start: int, num_frames: int, config: DataConfig) -> np.ndarray:
    """Source frames of a clip that begins at `start`; a video shorter than the clip is played in a loop."""
    return ((start + np.arange(config.clip_length) * config.stride) % num_frames).astype(np.int32)


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


def square_crops(width: int, height: int, crops: int) -> list[tuple[int, int, int, int]]:
    """Squares of the short side: the centre (1), or both ends and the centre of the long side (3)."""
    short = min(width, height)
    room = max(width, height) - short
    offsets = {1: [room // 2], 3: [0, room // 2, room]}[crops]
    return [(0, o, short, o + short) if width >= height else (o, 0, o + short, short) for o in offsets]


def _random(seed: int, epoch: int, stream: int, item: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, item]))
