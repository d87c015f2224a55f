"""Opens any kind of source video and gives its frames: upright, in order, and with a verdict on damage at the end."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideData

from .sources import SourceVideo

FRAME_NAME = "image_%05d.jpg"
# Codecs whose streams may hold interlaced pictures; the deinterlacer passes progressive ones on untouched.
_INTERLACING = frozenset(["dvvideo", "ffv1", "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "prores", "vc1"])
_TRANSPOSE = {90: "clock", 270: "cclock"}  # by the degrees that a player turns the picture clockwise


class VideoError(Exception):
    """A source that cannot be converted: the stage that failed (open, decode, encode) and the reason."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage, self.reason = stage, reason


class Frames:
    """Decoded frames of one source, iterated once, in presentation order.

    first: the first frame; rate: average frame rate, None if unknown; pixel_aspect: width : height of a pixel;
    codec: name of the source's codec; count: frames given so far.
    """

    def __init__(self, frames: Iterator[av.VideoFrame], rate: Fraction | None, time_base: Fraction, codec: str):
        first = next(frames, None)
        if first is None:
            raise VideoError("decode", "the video stream holds no frame that can be decoded")
        self.first, self.rate, self.time_base, self.codec = first, rate, time_base, codec
        self.pixel_aspect = Fraction(1)
        self.count = 0
        self._frames = frames

    def __iter__(self) -> Iterator[av.VideoFrame]:
        """Every frame, at the first one's size and pixel format, with increasing time stamps."""
        first, last = self.first, None
        for frame in self._all():
            self.count += 1
            if frame.pts is None:
                frame.pts = 0 if last is None else last + self.frame_ticks
            elif last is not None and frame.pts <= last:
                continue  # the rate filter would drop it too, with a warning each
            last = frame.pts
            if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
                frame = _fitted(frame, first)
            yield frame

    @property
    def frame_ticks(self) -> int:
        """What a frame lasts at the average rate, in units of time_base."""
        return max(1, round(1 / ((self.rate or 25) * self.time_base)))

    def _all(self) -> Iterator[av.VideoFrame]:
        yield self.first
        yield from self._frames

    def refuse_damaged(self) -> None:
        """Raises VideoError if what was read shows that the source is cut off or largely damaged."""


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
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        kind = _FolderFrames if os.path.isdir(video.path) else _ContainerFrames
        yield kind(container, stream, video)


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
        if not frame.duration:  # without one, the rate filter takes the last frame to end where it begins
            frame.duration = frames.frame_ticks
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


class _ContainerFrames(Frames):
    """Frames of a container's stream. Damaged packets are passed over as FFmpeg does, and judged at the end."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, video: SourceVideo):
        self._container, self._stream, self._video = container, stream, video
        self._packets, self._damaged, self._end = 0, 0, 0.0  # _end: seconds
        self._origin = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
        assert stream.time_base is not None
        rate = stream.average_rate or stream.guessed_rate
        super().__init__(
            self._decoded(), Fraction(rate) if rate and 0 < rate <= 1000 else None, stream.time_base, stream.name
        )
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        self.pixel_aspect = aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)  # else a nonsensical header value

    def _decoded(self) -> Iterator[av.VideoFrame]:
        start, end = self._video.start_s, self._video.end_s
        if start:
            assert self._stream.time_base is not None
            with contextlib.suppress(av.FFmpegError):  # a container that cannot seek is read from its beginning
                self._container.seek(int((start + self._origin) / self._stream.time_base), stream=self._stream)
        tolerance = 0.001
        for frame in self._read():
            at = (frame.time or 0.0) - self._origin
            if start is not None and at < start - tolerance:
                continue
            if end is not None and at >= end - tolerance:
                self._end = max(self._end, end)
                return
            self._end = max(self._end, at)
            yield frame

    def _read(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
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
                    yield frame

    def refuse_damaged(self) -> None:
        """Raises VideoError for a file that ends early, which many containers do not report, or is largely damaged."""
        declared, seconds = self._stream.frames, _declared_seconds(self._container, self._stream)
        start, end = self._video.start_s or 0.0, self._video.end_s
        if declared and start == 0 and end is None:
            # Packets, not frames: trimming without encoding leaves frames that an edit list hides.
            if declared - self._packets > max(2, 0.05 * declared):
                raise VideoError("decode", f"cut off or damaged: {self._packets} of {declared} frames are there")
        elif seconds:
            goal = seconds if end is None else min(end, seconds)
            if self._end - start < 0.8 * (goal - start) - 0.3:
                raise VideoError("decode", f"cut off or damaged: it ends after {self._end:.1f} of {goal:.1f} seconds")
        if self._damaged > max(2, 0.05 * self._packets):
            raise VideoError("decode", f"damaged: {self._damaged} of {self._packets} packets cannot be decoded")


class _FolderFrames(_ContainerFrames):
    """Numbered JPEG files; every file of the folder must be part of the sequence."""

    def refuse_damaged(self) -> None:
        there = sum(re.fullmatch(r"image_\d{5,}\.jpg", name) is not None for name in os.listdir(self._video.path))
        if self._packets < there:
            missing = FRAME_NAME % (self._packets + 1)
            raise VideoError("decode", f"{missing} is missing: {self._packets} of {there} frames can be read in order")
        super().refuse_damaged()


def _array_frames(video: SourceVideo) -> Frames:
    try:
        array = np.load(video.path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise VideoError("open", "the file is gone, or its link points nowhere") from None
    except (OSError, ValueError, EOFError) as error:
        raise VideoError("open", f"not a readable .npy array ({error})") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (2, 3) or 0 in array.shape:
        raise VideoError("open", f"an array of {array.dtype} {array.shape} is neither uint8 (T,H,W,3) nor (T,H,W,2)")
    rate = _given_rate(video)

    def frames() -> Iterator[av.VideoFrame]:
        for number, image in enumerate(array):
            if array.shape[3] == 3:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(np.concatenate([image[..., 0], image[..., 1]], 1), format="gray")
            frame.pts, frame.time_base, frame.duration = number, 1 / rate, 1
            yield frame

    return Frames(frames(), rate, 1 / rate, "npy")


def _given_rate(video: SourceVideo) -> Fraction:
    if not video.fps:
        raise VideoError("open", "frames without a video state no frame rate; give it with --source-fps")
    return Fraction(video.fps).limit_denominator(1001)


@contextlib.contextmanager
def open_container(video: SourceVideo) -> Iterator[av.container.InputContainer]:
    """A source as a container with a video stream. Raises VideoError."""
    options: dict = {}
    path: str | io.BufferedReader = video.path
    with contextlib.ExitStack() as stack:
        try:
            if os.path.isdir(video.path):
                path = str(Path(video.path.replace("%", "%%"), FRAME_NAME))
                rate = _given_rate(video)
                options = {"format": "image2", "options": {"framerate": str(rate), "start_number": "1"}}
            elif os.path.getsize(video.path) == 0:
                raise VideoError("open", "the file is empty")
            if video.span:
                path = stack.enter_context(io.BufferedReader(_Span(video.path, *video.span)))
            container = stack.enter_context(av.open(path, metadata_errors="replace", **options))
        except PermissionError:
            raise VideoError("open", "no permission to read the file") from None
        except FileNotFoundError:
            raise VideoError("open", "the file is gone, or its link points nowhere") from None
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(
                "open", f"not a video that FFmpeg can read, or cut off before its index ({reason})"
            ) from None
        if container.streams.best("video") is None:
            found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise VideoError("open", f"no video stream in the file (it holds {found})")
        yield container


class _Span(io.RawIOBase):
    """`size` bytes of a file from `offset`, as a file of their own."""

    def __init__(self, path: str, offset: int, size: int):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), left))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _display(frame: av.VideoFrame) -> tuple[int, bool]:
    """How a player shows a frame: mirrored first or not, then turned clockwise by 0, 90, 180 or 270 degrees."""
    side = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
    flipped = a * d - b * c < 0
    if flipped:  # undo the mirror, so that what is left is a rotation
        a, b = -a, -b
    turn = np.degrees(np.arctan2(b, a))
    return int(round(turn / 90) * 90) % 360, flipped


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says that the video stream is; 0 where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match:
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    # The container's own length may be that of another stream.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0
