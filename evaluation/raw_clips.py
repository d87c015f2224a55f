"""Clips of raw video files, made as sharding and the loader make them, in one pass over each file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..configs.schema import DataConfig
from ..errors import UserError
from ..models.checkpoints import ModelCard
from ..pipelines.plan import square_crops, window_frames
from ..preprocessing.containers import declared_seconds, open_container, video_stream
from ..preprocessing.decoding import (
    Frames,
    VideoError,
    build_graph,
    filtered,
    open_frames,
    stream_rate,
    upright_filters,
)
from ..preprocessing.flow import FlowSettings, one_thread
from ..preprocessing.shards import Dataset
from ..preprocessing.sources import SourceVideo
from ..preprocessing.video import VideoSettings, output_rate, output_size

log = logging.getLogger(__name__)

_UNTRIMMED: dict[str, Any] = {"fps": 10.0, "size": "112x112"}  # as `genkd shard thumos14` stores videos
_MILD = 1.5  # as in pipelines.pyav: how many times larger than a clip a crop may be before areas are averaged


@dataclass(frozen=True)
class Storing:
    """How the videos of the weights' data set are stored, which a raw video is brought to first.

    video: frame rate (None: the video's own) and size; flow: how flow is computed, None for RGB; origin: where these
    settings come from.
    """

    video: VideoSettings
    flow: FlowSettings | None
    origin: str


def storing(
    card: ModelCard,
    *,
    fps: float | None = None,
    short_side: int | None = None,
    flow_method: str | None = None,
    weights: Path | None = None,
) -> Storing:
    """The storing of the data set that weights were trained on; given values win.

    A relative place of that data set is looked for below the working directory, then below each folder that the file
    `weights` lies in. Where it is not on this machine: as `genkd shard` and `genkd flow` do by default, which is 256
    pixels, the video's own frame rate, and tvl1, for a detector 112x112 pixels and 10 frames a second; a warning then
    tells what is taken and not given. A flow data set does not record the rate and size of the pictures that its flow
    is of; those of its videos are taken where all have the same. Raises UserError for a value out of its range.
    """
    known: dict[str, Any] = dict(_UNTRIMMED) if card.task == "detection" else {}
    origin = "defaults, as the weights' data set is not on this machine"
    method, bound = "tvl1", 20.0
    dataset = _own_dataset(card, weights)
    if dataset is not None:
        stored, origin = dataset.info["video"], str(dataset.storage)
        if dataset.info.get("modality") == "flow":
            method, bound = stored.get("method", method), stored.get("bound", bound)
            known = _common(dataset, stretched=card.task == "detection")
        else:
            known = {key: stored[key] for key in ("fps", "short_side", "size") if key in stored}
    if fps is not None:
        known["fps"] = fps
    if short_side is not None:
        known["short_side"], known["size"] = short_side, None
    flow = FlowSettings(flow_method or method, bound) if card.modality == "flow" else None
    if flow_method and not flow:
        raise UserError(f"--flow-method {flow_method}: these weights take RGB clips; leave it out")
    if dataset is None:
        _warn(card, weights, fps is None, short_side is None, None if flow_method or not flow else method)
    return Storing(VideoSettings(**known), flow, origin)


def _own_dataset(card: ModelCard, weights: Path | None) -> Dataset | None:
    """The data set that the weights name, if it is on this machine."""
    place = str(card.data.get("dataset") or "")
    if not place or "://" in place:  # only a local one: predicting should not depend on a network
        return None
    folders = [Path()] if weights is None else [Path(), *weights.resolve().parents]
    for path in dict.fromkeys(folder / place for folder in folders):
        if not (path / "dataset.json").is_file():
            continue
        dataset = Dataset.open(path)
        # Another one may lie in a place of that name here.
        if tuple(dataset.classes) == card.classes and dataset.info.get("modality", "rgb") == card.modality:
            return dataset
    return None


def _warn(card: ModelCard, weights: Path | None, rate: bool, side: bool, method: str | None) -> None:
    """Tells which settings are taken without knowing the weights' data set, and how to give them."""
    own_rate, own_size = "the videos' own frame rate", f"a short side of {VideoSettings().short_side} pixels"
    if card.task == "detection":
        own_rate, own_size = f"{_UNTRIMMED['fps']:g} frames a second", f"{_UNTRIMMED['size']} pixels"
    taken = [
        *([f"{own_rate} (--fps)"] if rate else []),
        *([f"{own_size} (--short-side)"] if side else []),
        *([f"flow by {method} (--flow-method)"] if method else []),
    ]
    if taken:
        place = card.data.get("dataset")
        what = f"the data set {place} of these weights is not here" if place else "these weights name no data set"
        log.warning("%s%s, so predictions are made with %s; give other values by these options if it has others",
                    f"{weights}: " if weights else "", what, " and ".join(taken))  # fmt: skip


def _common(dataset: Dataset, *, stretched: bool) -> dict[str, Any]:
    """Frame rate and short side of all videos of a flow data set, each where there is just one; stretched: a size in
    its place where all are squares, as those of untrimmed videos are by default."""
    widths, heights = dataset.column("width") // 2, dataset.column("height")
    found = {"fps": np.unique(dataset.column("fps")), "short_side": np.unique(np.minimum(widths, heights))}
    common = {key: values[0].item() for key, values in found.items() if len(values) == 1}
    if stretched and "short_side" in common and (widths == heights).all():
        common["size"] = f"{common['short_side']}x{common['short_side']}"
    return common


class Window(NamedTuple):
    """A clip of a raw video: its first picture, uint8 pixels (T,H,W,C), and how many of the T are no padding."""

    start: int
    pixels: np.ndarray
    known: int


class RawClips:
    """Sliding windows of one raw video, iterated once: every frame is decoded once, and one window's are kept.

    hop: frame rate -> pictures from one window to the next; the last window ends with the video. A video shorter than
    a clip gives one, filled up as config.padding says. rate: pictures a second; count: pictures so far; problem: why
    the video could not be read to its end, None if it could: its windows are then those of what was read.
    Raises VideoError for a video of which nothing can be read or that is too short for padding "fail".
    """

    def __init__(self, path: Path, config: DataConfig, storing: Storing, hop: Callable[[float], int]):
        self._video, self._config, self._storing, self._hop = raw_source(path), config, storing, hop
        self.rate, self.count = 0.0, 0
        self.problem: str | None = None

    def __iter__(self) -> Iterator[Window]:
        config = self._config
        span = (config.clip_length - 1) * config.stride + 1
        latest = np.empty((span, config.size, config.size, 2 if self._storing.flow else 3), np.uint8)
        start, ends = 0, 0  # of the next window; of the last one
        for picture in self._readable():
            _fit(picture, config, latest[self.count % span])
            self.count += 1
            if self.count == start + span:
                yield self._window(start, self.count, latest)
                start, ends = start + self._hop(self.rate), self.count
        if self.count < span and config.padding == "fail":
            raise VideoError("decode", f"{self.count} frames are fewer than the {span} of a clip of these weights")
        if ends < self.count:
            yield self._window(max(0, self.count - span), self.count, latest)

    def _window(self, start: int, count: int, latest: np.ndarray) -> Window:
        frames = window_frames(start, count, self._config)
        pixels = np.zeros((self._config.clip_length, *latest.shape[1:]), np.uint8)
        pixels[: len(frames)] = latest[frames % len(latest)]
        return Window(start, pixels, len(frames))

    def _readable(self) -> Iterator[np.ndarray]:
        """The pictures, as far as they can be read."""
        try:
            with open_frames(self._video) as frames:
                self.rate = float(output_rate(frames, self._storing.video))
                yield from self._pictures(frames)
                frames.refuse_damaged()
        except (VideoError, av.FFmpegError) as error:
            self.problem = str(error) if isinstance(error, VideoError) else f"cannot be decoded ({error.strerror})"
            if not self.count:
                raise VideoError("decode", self.problem) from None

    def _pictures(self, frames: Frames) -> Iterator[np.ndarray]:
        """uint8 (H,W,3) RGB as a data set's decoder gives it, or (H,W,2) levels of flow."""
        graph = build_graph(frames, stored_filters(frames, self._storing.video))
        reformatter = VideoReformatter()
        images = (reformatter.reformat(frame, format="rgb24").to_ndarray() for frame in filtered(graph, frames))
        if self._storing.flow is None:
            yield from images
            return
        levels = self._storing.flow.levels(images)
        while True:
            with one_thread():
                level = next(levels, None)
            if level is None:
                return
            yield level


def normalized(windows: Sequence[Window], config: DataConfig, device: torch.device, *, flow: bool) -> torch.Tensor:
    """The windows as a network takes them, and as a loader gives them: float32 (N,C,T,H,W) in channels_last_3d."""
    values = (config.flow_mean, config.flow_std) if flow else (config.mean, config.std)
    mean, std = (torch.tensor(value, device=device) * 255 for value in values)
    pixels = torch.from_numpy(np.stack([window.pixels for window in windows])).to(device)
    clips = (pixels - mean) / std  # (N,T,H,W,C)
    filler = 0.0 if config.padding == "zero" else ((128.0 if flow else 0.0) - mean) / std
    for clip, window in zip(clips, windows, strict=True):
        if window.known < len(clip):
            clip[window.known :] = filler
    # A view in channels_last_3d, which is the network's layout.
    return clips.permute(0, 4, 1, 2, 3)


def stored_filters(frames: Frames, settings: VideoSettings) -> list[tuple[str, str]]:
    """What sharding does to a source's frames before it encodes them, as FFmpeg filters; see video.transcode."""
    rate, (width, height) = output_rate(frames, settings), output_size(frames, settings)
    return [
        *upright_filters(frames),
        ("fps", f"fps={rate.numerator}/{rate.denominator}"),
        ("scale", f"{width}:{height}:flags=bicubic+accurate_rnd:out_color_matrix=bt601:out_range=limited"),
        ("setsar", "1"),
        ("format", "yuv420p"),
    ]


def _fit(picture: np.ndarray, config: DataConfig, out: np.ndarray) -> None:
    """The evaluation's centre crop of a picture (H,W,C), resized into out (size,size,C), as pipelines.pyav does."""
    height, width = picture.shape[:2]
    ((top, left, bottom, right),) = square_crops(width, height, 1, config.eval_scale)
    method = cv2.INTER_AREA if bottom - top > _MILD * config.size else cv2.INTER_LINEAR
    region = np.ascontiguousarray(picture[top:bottom, left:right])
    cv2.resize(region, (config.size, config.size), dst=out, interpolation=method)


def raw_source(path: Path) -> SourceVideo:
    """A raw video file as a source."""
    return SourceVideo(path.stem, str(path), "", -1, 0)


def expected_windows(path: Path, config: DataConfig, storing: Storing, hop: Callable[[float], int]) -> int:
    """About how many windows a video gives, by its header; 1 where that says nothing."""
    try:
        with open_container(raw_source(path)) as container:
            stream = video_stream(container)
            rate = storing.video.fps or float(stream_rate(stream) or 25)
            count = declared_seconds(container, stream) * rate
    except VideoError:
        return 1
    beyond = count - (config.clip_length - 1) * config.stride - 1
    return 1 + max(0, -int(-beyond // hop(rate)))
