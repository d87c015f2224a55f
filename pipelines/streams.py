"""Stream: one data set's part of every sample, from its bytes to what the graph takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..configs.schema import DataConfig
from ..errors import UserError
from ..preprocessing.shards import Corrupt, Dataset, Video
from ..storage import LocalStorage
from . import graph
from .buffers import Buffers
from .cache import BlockCache
from .plan import Colour, Sample, Shapes
from .pyav import decode_clip
from .stats import Meter
from .store import ClipStore, Slice, require_readable

_NO_JITTER = Colour(1.0, 1.0, 1.0, 0.0)


class Media(NamedTuple):
    """A sample for the graph: an encoded slice (uint8 1-D) with frame numbers in it and crop, or a finished window."""

    media: np.ndarray
    frames: np.ndarray
    crop: tuple[float, float, float, float]


class Stream:
    """A data set whose clips are read, and decoded as `decoder` says ("dali", "pyav" or "hybrid").

    rows: those of the index that will be read; of: the data set whose rows and pictures samples speak of, where that
    is another one; videos are matched by key, and crops scaled to their size. Raises UserError for videos that are
    missing or have other lengths, missing shards, and codecs that the decoder cannot take.
    """

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, config: DataConfig, device: torch.device, meter: Meter,
        of: Dataset | None = None,
    ):  # fmt: skip
        self.dataset, self.config, self._meter = dataset, config, meter
        self.is_flow = is_flow(dataset)
        self._row_of = None if of is None else _matched(of, dataset, rows)
        own = rows if self._row_of is None else self._row_of[rows]
        self._scale = None if of is None else (shapes(of), shapes(dataset))
        require_readable(dataset, own)
        self.decoder = graph.choose_decoder(config.decoder, kinds(dataset, own), device.type)
        remote = not isinstance(dataset.storage, LocalStorage)
        cache = None
        if config.cache_dir and remote:
            cache = BlockCache(Path(config.cache_dir, "blocks"), int(config.cache_gb * 1e9))
        self.store = ClipStore(dataset, cache, config.retries)
        self.buffers = Buffers()
        self._filler = _filler(config, self.is_flow, device)
        self.jitters_colour = config.jitters_colour and not self.is_flow

    def video(self, sample: Sample) -> Video:
        """The row of this data set that a sample is about."""
        return self.dataset.video(self._row(sample))

    def read(self, sample: Sample) -> Slice:
        """The bytes that hold a sample's frames. Raises Corrupt naming key and shard."""
        try:
            return self.store.read(self.video(sample), int(sample.frames.min()), int(sample.frames.max()))
        except Corrupt as problem:
            raise self.blamed(sample, str(problem)) from None

    def prepare(self, sample: Sample, part: Slice, encoded: bool) -> Media:
        """What the graph takes: always a whole clip, the last frame again where fill_up() puts something else. Raises
        Corrupt naming key and shard if a frame cannot be decoded."""
        length = self.config.clip_length
        frames = (sample.frames - part.base).astype(np.int32)
        self._meter.media(part.data.nbytes, int(frames.max()) + 1, len(frames))
        frames = np.pad(frames, (0, length - len(frames)), mode="edge")
        crop = self._crop(sample)
        if encoded:
            return Media(part.data, frames, crop)
        top, left = round(crop[0]), round(crop[1])
        window = (top, left, max(round(crop[2]), top + 1), max(round(crop[3]), left + 1))
        clip = self.buffers.take((length, self.config.size, self.config.size, 2 if self.is_flow else 3))
        try:
            decode_clip(part.data, frames, window, clip, flip=sample.flip)
        except Corrupt as problem:
            raise self.blamed(sample, str(problem)) from None
        return Media(clip, frames, crop)

    def fill_up(self, clip: torch.Tensor, sample: Sample) -> None:
        """Puts the padding behind a sample's frames in a finished clip (T,size,size,C)."""
        if len(sample.frames) < len(clip):
            clip[len(sample.frames) :] = self._filler

    def blamed(self, sample: Sample, problem: str) -> Corrupt:
        """An error that names a sample's key and shard in this data set."""
        key, shard = (self.dataset.table[name][self._row(sample)].as_py() for name in ("key", "shard"))
        return Corrupt(f"{key} in {self.dataset.storage}/shards/{shard}: {problem}")

    def release(self, media: list[Media], encoded: bool) -> None:
        """What the graph has done with."""
        for entry in media if not encoded else ():
            self.buffers.give(entry.media)

    def feed(self, samples: list[Sample], media: list[Media], encoded: bool) -> tuple[list, ...]:
        """The lists that graph.Spec.inputs names, for the samples of a batch."""
        given: tuple[list, ...] = ([entry.media for entry in media],)
        if encoded:
            crops = np.array([entry.crop for entry in media], np.float32)
            flips = [np.array(sample.flip, np.int32) for sample in samples]
            given += ([entry.frames for entry in media], list(crops[:, :2]), list(crops[:, 2:]), flips)
        if self.jitters_colour:
            colours = np.array([sample.colour or _NO_JITTER for sample in samples], np.float32)
            colours[:, 3] *= 360  # DALI turns hue by degrees
            given += tuple(list(column) for column in colours.T)
        return given

    def _row(self, sample: Sample) -> int:
        return sample.row if self._row_of is None else int(self._row_of[sample.row])

    def _crop(self, sample: Sample) -> tuple[float, float, float, float]:
        if self._scale is None:
            return sample.crop
        (_, width, height), (_, own_width, own_height) = (
            side.of(row) for side, row in zip(self._scale, (sample.row, self._row(sample)), strict=True)
        )
        x, y = own_width / width, own_height / height
        top, left, bottom, right = sample.crop
        return top * y, left * x, bottom * y, right * x


def kinds(dataset: Dataset, rows: np.ndarray) -> list[graph.Kind]:
    """What videos there are among these rows of the index."""
    table = dataset.table.select(["codec", "width", "height"]).take(pa.array(rows))
    groups = table.group_by(["codec", "width", "height"]).aggregate([([], "count_all")])
    return [graph.Kind(*(row[name] for name in (*table.column_names, "count_all"))) for row in groups.to_pylist()]


def _filler(config: DataConfig, flow: bool, device: torch.device) -> torch.Tensor:
    """A pixel of padding as it stands in a clip, (C,): zeros, or black; for flow that is no motion."""
    channels = 2 if flow else 3
    mean, std = (config.flow_mean, config.flow_std) if flow else (config.mean, config.std)
    level = 128 if flow else 0
    if config.padding == "zero":
        values = [0.0] * channels
    elif config.dtype == "uint8":
        values = [level] * channels
    else:
        values = [(level / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(values, dtype=getattr(torch, config.dtype), device=device)


def is_flow(dataset: Dataset) -> bool:
    """Whether a data set's frames are optical flow, x and y side by side."""
    return dataset.info.get("modality") == "flow"


def shapes(dataset: Dataset) -> Shapes:
    """Frames, width and height of the pictures of every row; a flow frame holds two pictures."""
    width = dataset.column("width")
    return Shapes(dataset.num_frames, width // 2 if is_flow(dataset) else width, dataset.column("height"))


def _matched(of: Dataset, dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """The row of `dataset` with the key of each row of `of`, -1 for none; all of `rows` have one of equal length."""
    found = pc.index_in(of.table["key"], value_set=dataset.table["key"].combine_chunks())
    row_of = found.fill_null(-1).to_numpy().astype(np.int64)
    missing = rows[row_of[rows] < 0]
    if len(missing):
        key = of.table["key"][int(missing[0])].as_py()
        raise UserError(
            f"{dataset.storage} lacks {len(missing)} of the {len(rows)} videos of {of.storage}, e.g. {key}; make both "
            "from the same sources, the flow by `genkd flow`"
        )
    other = rows[of.num_frames[rows] != dataset.num_frames[row_of[rows]]]
    if len(other):
        row = int(other[0])
        raise UserError(
            f"{of.table['key'][row].as_py()} has {of.num_frames[row]} frames in {of.storage}, but "
            f"{dataset.num_frames[row_of[row]]} in {dataset.storage}; make the flow of that data set by `genkd flow`"
        )
    return row_of
