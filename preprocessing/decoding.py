"""Opens any kind of source video and gives its frames: upright, in order, and with a verdict on damage at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideData

from .containers import (
    FRAME_NAME,
    VideoError,
    declared_seconds,
    frame_files,
    given_rate,
    open_container,
    require_readable,
    video_stream,
)
from .sources import SourceVideo

__all__ = [
    "FRAME_NAME", "Frames", "VideoError", "build_graph", "filtered", "is_turned", "open_container", "open_frames",
    "rgb_frames", "stream_aspect", "stream_rate", "upright_filters",
]  # fmt: skip

# Codecs whose streams may hold interlaced pictures; the deinterlacer passes progressive ones on untouched.
_INTERLACING = frozenset(["dvvideo", "ffv1", "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "prores", "vc1"])
_MOST_REPEATS = 20_000  # of a frame; 13 minutes at 25 frames a second
_TRANSPOSE = {90: "clock", 270: "cclock"}  # by the degrees that a player turns the picture clockwise


class Frames:
    """Decoded frames of one source, iterated once, in presentation order.

    first: the first frame; rate: average frame rate, None if unknown; pixel_aspect: width : height of a pixel;
    codec: name of the source's codec; count: frames given so far.
    """

    def __init__(self, frames: Iterator[av.VideoFrame], rate: Fraction | None, time_base: Fraction, codec: str):
        self.rate, self.time_base, self.codec = rate, time_base, codec
        first = next(frames, None)
        if first is None:
            raise VideoError("decode", "the video stream holds no frame that can be decoded")
        self.first = first
        self.pixel_aspect = Fraction(1)
        self.count = 0
        self._frames, self._dropped = frames, 0

    def __iter__(self) -> Iterator[av.VideoFrame]:
        """Every frame, at the first one's size and pixel format, with increasing time stamps from 0.

        From 0, as the rate filter rounds to multiples of a frame's duration, and a clock half a frame off would make
        it repeat and drop frames at random.
        """
        first, start, last = self.first, None, 0
        for frame in itertools.chain([first], self._frames):
            self.count += 1
            assert frame.pts is not None, "every kind of source gives its frames a time"
            if start is None:
                start = frame.pts
            elif frame.pts <= last:
                self._dropped += 1  # the rate filter would drop it too, with a warning each
                continue
            last = frame.pts
            frame.pts -= start
            self._refuse_endless(frame.pts)
            if not frame.duration or frame.duration > _MOST_REPEATS * self.frame_ticks:
                frame.duration = self.frame_ticks  # the rate filter repeats the last frame for as long as it lasts
            if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
                frame = _fitted(frame, first)
            yield frame

    @property
    def frame_ticks(self) -> int:
        """What a frame lasts at the average rate, in units of time_base."""
        return max(1, round(1 / ((self.rate or 25) * self.time_base)))

    def _refuse_endless(self, ticks: int) -> None:
        """Damaged time stamps would be filled with repeated frames for hours."""
        if ticks / self.frame_ticks > 100 * self.count + _MOST_REPEATS:
            seconds = float(ticks * self.time_base)
            raise VideoError("decode", f"damaged time stamps: {self.count} frames in {seconds:.0f} seconds")

    def refuse_damaged(self) -> None:
        """Raises VideoError if what was read shows that the source is cut off or largely damaged."""
        if self._dropped > max(2, 0.05 * self.count):
            raise VideoError("decode", f"damaged time stamps: {self._dropped} of {self.count} do not increase")


def _fitted(frame: av.VideoFrame, model: av.VideoFrame) -> av.VideoFrame:
    """frame at the size and pixel format of an earlier one, as streams may change their resolution."""
    if abs(frame.width / frame.height / (model.width / model.height) - 1) > 0.05:
        raise VideoError(
            "decode",
            f"the frame shape changes from {model.width}x{model.height} to {frame.width}x{frame.height}; cut the "
            "video there",
        )
    resized = frame.reformat(model.width, model.height, model.format.name, interpolation="BICUBIC")
    resized.pts, resized.time_base, resized.duration = frame.pts, frame.time_base, frame.duration
    return resized


@contextlib.contextmanager
def open_frames(video: SourceVideo) -> Iterator[Frames]:
    """The frames of a source: a video file, a part or a span of one, a folder of JPEG frames, or an .npy array.

    An .npy array is uint8, (T,H,W,3) RGB or (T,H,W,2) flow; flow becomes grey frames with x and y side by side.
    Of several video streams the best by FFmpeg's rule (default, then size) is taken, never a cover picture.
    Raises VideoError for a source that cannot be read.
    """
    if video.path.endswith(".npy"):
        yield _array_frames(video)
        return
    with open_container(video) as container:
        kind = _FolderFrames if os.path.isdir(video.path) else _ContainerFrames
        yield kind(container, video_stream(container), video)


def upright_filters(frames: Frames) -> list[tuple[str, str]]:
    """FFmpeg filters (name, arguments) that deinterlace and turn the picture as its display matrix says."""
    filters = []
    yuv = frames.first.format.name.startswith(("yuv", "nv12"))
    if frames.first.interlaced_frame or (frames.codec in _INTERLACING and yuv):
        filters.append(("bwdif", "mode=send_frame:parity=auto:deint=interlaced"))
    degrees, flipped = _display(frames.first)
    if flipped:
        filters.append(("hflip", ""))
    if degrees in _TRANSPOSE:
        filters.append(("transpose", _TRANSPOSE[degrees]))
    elif degrees == 180:
        filters += [("hflip", ""), ("vflip", "")]
    return filters


def is_turned(frames: Frames) -> bool:
    """Whether the display matrix exchanges width and height."""
    return _display(frames.first)[0] in _TRANSPOSE


def build_graph(frames: Frames, filters: list[tuple[str, str]]) -> av.filter.Graph:
    """A filter graph from the frames' own properties through `filters` to a sink."""
    first = frames.first
    graph = av.filter.Graph()
    graph.threads = 1  # else every frame is cut up for all cores, which other workers use
    colour = f":colorspace={int(first.colorspace)}:range={int(first.color_range)}"
    source = graph.add(
        "buffer",
        f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base={frames.time_base}{colour}",
    )
    nodes = [source, *(graph.add(name, arguments or None) for name, arguments in filters), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


def filtered(graph: av.filter.Graph, frames: Frames) -> Iterator[av.VideoFrame]:
    """The frames as they leave the graph."""

    def ready() -> Iterator[av.VideoFrame]:
        while True:
            try:
                yield graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for frame in frames:
        graph.vpush(frame)
        yield from ready()
    graph.vpush(None)
    yield from ready()


def rgb_frames(video: SourceVideo, height: int | None = None) -> Iterator[np.ndarray]:
    """Every frame of a source upright as RGB: uint8 (H,W,3); scaled to `height` pixels (bicubic) if it is given.

    The source's own frames, at whatever times they come. Raises VideoError.
    """
    with open_frames(video) as frames:
        filters = upright_filters(frames)
        if height:
            filters.append(("scale", f"-2:{height}:flags=bicubic+accurate_rnd"))
        filters.append(("format", "rgb24"))
        for frame in filtered(build_graph(frames, filters), frames):
            yield frame.to_ndarray()
        frames.refuse_damaged()


class _Clock:
    """Gives decoded frames their time: what the container says where that makes sense, in stream units.

    Of presentation and decoding time the one with fewer faults is taken, as FFmpeg's avcodec does for its programs.
    AVI knows decoding times only. Where streams were joined, and time begins anew, the next frame follows the last.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        assert stream.time_base is not None
        second = float(1 / stream.time_base)
        joins = _flagged(container, av.format.Flags.ts_discont)
        self._back, self._ahead = -0.5 * second, 10 * second if joins else float("inf")
        self._decoding_only = _is_avi(container)
        self._faults, self._latest = [0, 0], [float("-inf")] * 2
        self._last: int | None = None
        self._shift = 0

    def read(self, frame: av.VideoFrame, ticks: int) -> int:
        """The time of the next frame; ticks: how long a frame lasts."""
        times = [None if self._decoding_only else frame.pts, frame.dts]
        for kind, at in enumerate(times):
            if at is not None:
                self._faults[kind] += at <= self._latest[kind]
                self._latest[kind] = at
        pts, dts = times
        at = dts if pts is None or (dts is not None and self._faults[0] > self._faults[1]) else pts
        if at is None:
            at = (frame.pts or 0) if self._last is None else self._last + ticks
        elif self._last is not None:
            if not self._back < at + self._shift - self._last < self._ahead:
                self._shift = self._last + ticks - at
            at += self._shift
        self._last = at
        return at


def stream_rate(stream: av.VideoStream) -> Fraction | None:
    """Frames a second, on average; None if the container gives no usable one."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate and 1e-3 <= rate <= 1000 else None


def stream_aspect(stream: av.VideoStream) -> Fraction:
    """Width : height of a pixel; 1 where the header says nothing or nonsense."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)


class _ContainerFrames(Frames):
    """Frames of a container's stream. Damaged packets are passed over as FFmpeg does, and judged at the end."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, video: SourceVideo):
        self._container, self._stream, self._video = container, stream, video
        self._packets, self._damaged, self._end = 0, 0, 0.0  # _end: seconds
        self._origin = (container.start_time or 0) / av.time_base  # as players and FFmpeg's -ss count
        assert stream.time_base is not None
        super().__init__(
            self._decoded(), stream_rate(stream), stream.time_base, stream.codec_context.codec.canonical_name
        )
        self.pixel_aspect = stream_aspect(stream)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        start, end = self._video.start_s or 0.0, self._video.end_s
        frames = self._read(self._container, self._stream)
        if _is_avi(self._container) and (first := next(frames, None)) is not None:
            self._origin += self._seconds(first)  # its clock runs late by the frames that the decoder holds back
            frames = itertools.chain([first], frames)
        tolerance, given = 0.001, False
        for frame in self._from(start) if start else frames:
            at = self._seconds(frame)
            if end is not None and at >= end - tolerance:
                self._end = max(self._end, end)
                break
            self._end = max(self._end, at + float((frame.duration or 0) * self.time_base))
            if at >= start - tolerance:
                given = True
                yield frame
        if not given and (start or end is not None):
            until = "its end" if end is None else f"{end:g} s"
            raise VideoError("decode", f"no frame from {start:g} s to {until}; read as far as {self._end:.2f} s")

    def _seconds(self, frame: av.VideoFrame) -> float:
        assert frame.pts is not None, "the clock has set it"
        return float(frame.pts * self.time_base) - self._origin

    def _from(self, start: float) -> Iterator[av.VideoFrame]:
        """Frames in order, the first of them not after `start` seconds."""
        container, stream = self._container, self._stream
        if not _flagged(container, av.format.Flags.no_timestamps):
            for back in (0.25, 10.0):  # a key frame's decoding time, by which some seek, precedes its own
                try:
                    container.seek(int((start - back + self._origin) / self.time_base), stream=stream)
                except av.FFmpegError:
                    break
                frames = self._read(container, stream)
                first = next(frames, None)
                if first is not None and self._seconds(first) <= start:
                    yield first
                    yield from frames
                    return
        with open_container(self._video) as again:  # a failed seek may have moved anywhere
            yield from self._read(again, video_stream(again))

    def _read(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        packets = container.demux(stream)
        clock = _Clock(container, stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except av.FFmpegError as error:
                raise VideoError("decode", f"the file cannot be read to its end ({error.strerror})") from None
            self._packets += bool(packet.size)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                self._damaged += 1
                continue
            except av.FFmpegError as error:
                raise VideoError("decode", f"the video stream cannot be decoded ({error.strerror})") from None
            for frame in frames:
                if frame.width and frame.height:
                    frame.pts = clock.read(frame, self.frame_ticks)
                    yield frame

    def refuse_damaged(self) -> None:
        """Raises VideoError for a file that ends early, which many containers do not report, or is largely damaged."""
        declared, seconds = self._stream.frames, declared_seconds(self._container, self._stream)
        start, end = self._video.start_s or 0.0, self._video.end_s
        if declared and start == 0 and end is None:
            # Packets, not frames: trimming without encoding leaves frames that an edit list hides.
            if declared - self._packets > max(2, 0.05 * declared):
                raise VideoError("decode", f"cut off or damaged: {self._packets} of {declared} frames are there")
        elif seconds:
            goal = seconds if end is None else min(end, seconds)
            if self._end - start < 0.95 * (goal - start) - 0.5:
                raise VideoError("decode", f"cut off or damaged: it ends after {self._end:.1f} of {goal:.1f} seconds")
        super().refuse_damaged()
        if self._damaged > max(2, 0.05 * self._packets):
            raise VideoError("decode", f"damaged: {self._damaged} of {self._packets} packets cannot be decoded")


class _FolderFrames(_ContainerFrames):
    """Numbered JPEG files; every file of the folder must be part of the sequence."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, video: SourceVideo):
        self._there = frame_files(video.path)
        super().__init__(container, stream, video)

    def refuse_damaged(self) -> None:
        if self._packets < self._there and self._video.start_s is None and self._video.end_s is None:
            raise VideoError("decode", f"{FRAME_NAME % (self._packets + 1)} cannot be read; {self._there} are there")
        super().refuse_damaged()


def _flagged(container: av.container.InputContainer, flag: av.format.Flags) -> bool:
    return bool(container.format.flags & cast(int, flag.value))


def _is_avi(container: av.container.InputContainer) -> bool:
    return container.format.name == "avi"


def _array_frames(video: SourceVideo) -> Frames:
    require_readable(video.path)
    try:
        array = np.lib.format.open_memmap(video.path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise VideoError("open", f"not a readable .npy array ({error})") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (2, 3) or 0 in array.shape:
        raise VideoError("open", f"an array of {array.dtype} {array.shape} is neither uint8 (T,H,W,3) nor (T,H,W,2)")
    rate = given_rate(video)

    def frames() -> Iterator[av.VideoFrame]:
        for number, image in enumerate(array):
            if array.shape[3] == 3:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(np.concatenate([image[..., 0], image[..., 1]], 1), format="gray")
            frame.pts, frame.time_base, frame.duration = number, 1 / rate, 1
            yield frame

    return Frames(frames(), rate, 1 / rate, "npy")


def _display(frame: av.VideoFrame) -> tuple[int, bool]:
    """How a player shows a frame: mirrored first or not, then turned clockwise by 0, 90, 180 or 270 degrees."""
    side = frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if side is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
    flipped = a * d - b * c < 0
    if flipped:  # undo the mirror, so that what is left is a rotation
        a, b = -a, -b
    turn = np.degrees(np.arctan2(b, a))
    return int(round(turn / 90) * 90) % 360, flipped
