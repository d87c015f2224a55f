"""Decodes a source video and writes it as a fragmented MP4 with one closed GOP a fragment (PyAV)."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import av
import av.filter

from ..errors import UserError

CODECS = ("h264", "vp9", "mjpeg")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
# One fragment a key frame; no trailing index, so that the payload ends with its last GOP.
_MUXER = {"movflags": "frag_keyframe+empty_moov+default_base_moof+skip_trailer", "fflags": "+bitexact"}


@dataclass(frozen=True)
class VideoSettings:
    """How videos are stored. short_side: pixels, 0 keeps the source's size; fps: None keeps the source's rate."""

    codec: str = "h264"
    short_side: int = 256
    fps: float | None = None
    gop: int = 16
    crf: int | None = None
    preset: str = "medium"

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(f"unknown codec {self.codec!r}; there are {', '.join(CODECS)}")
        if self.short_side and not 16 <= self.short_side <= 4096:
            raise UserError(f"short side {self.short_side} is not between 16 and 4096 pixels (0 keeps the source's)")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"fps {self.fps} is not between 0 and 1000")
        if not 1 <= self.gop <= 1000:
            raise UserError(f"gop {self.gop} is not between 1 and 1000 frames")
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset {self.preset!r}; x264 has {', '.join(PRESETS)}")
        if self.crf is not None and not 0 <= self.crf <= 63:
            raise UserError(f"crf {self.crf} is not between 0 and 63")


class VideoError(Exception):
    """A source that cannot be converted: the stage that failed (open, decode, encode) and the reason."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage, self.reason = stage, reason


class Sink(Protocol):
    """Where encoded bytes go, in order."""

    def write(self, data: bytes) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """What was written. gop_frames: first frame of each GOP, then the number of frames."""

    width: int
    height: int
    fps: float
    num_frames: int
    gop_frames: tuple[int, ...]
    codec: str
    source_fps: float
    source_frames: int


def transcode(path: str, sink: Sink, settings: VideoSettings, on_frame: Callable[[], None] = lambda: None) -> Encoded:
    """Writes the first video stream of `path` to `sink` as 8-bit yuv420p at a constant frame rate.

    Output colour is BT.601 (limited range for h264 and vp9, full range for mjpeg), square pixels, even sides.
    on_frame is called for every written frame and may raise to stop. One thread is used, so that the bytes do not
    depend on the machine's load. Raises VideoError for a source that is no usable video.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = _output_rate(stream, settings)
        source = _Frames(container, stream)
        frames = iter(source)
        first = next(frames, None)
        if first is None:
            raise VideoError("decode", "the video stream holds no frame that can be decoded")
        width, height = _output_size(first, stream.sample_aspect_ratio, settings.short_side)
        try:
            graph = _graph(stream, first, width, height, rate, settings.codec)
            with contextlib.closing(_Encoder(sink, settings, width, height, rate, on_frame)) as encoder:
                encoder.write(_filtered(graph, first, frames, rate))
        except av.FFmpegError as error:
            raise VideoError(
                "encode", f"cannot be encoded as {settings.codec} {width}x{height} ({error.strerror})"
            ) from None
        source.refuse_damaged()
        return Encoded(
            width, height, float(rate), encoder.num_frames, (*encoder.key_frames, encoder.num_frames),
            settings.codec, float(stream.average_rate or rate), source.count,
        )  # fmt: skip


def decode_frames(payload: BinaryIO | str | Path) -> Iterator[av.VideoFrame]:
    """Every frame of a stored payload or of a slice of it (header + GOPs), in order."""
    with av.open(payload if not isinstance(payload, Path) else str(payload), "r") as container:
        yield from container.decode(video=0)


class _Frames:
    """Decoded frames in presentation order, and how much of the stream they make up.

    Damaged packets are passed over as FFmpeg does; refuse_damaged judges them when all is read.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self._container, self._stream = container, stream
        self.count, self._packets, self._damaged, self._end = 0, 0, 0, 0.0  # _end: seconds

    def __iter__(self) -> Iterator[av.VideoFrame]:
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
                    self.count += 1
                    self._end = max(self._end, frame.time or 0.0)
                    yield frame

    def refuse_damaged(self) -> None:
        """Raises VideoError for a file that ends early, which many containers do not report, or is largely damaged."""
        declared, seconds = self._stream.frames, _declared_seconds(self._container, self._stream)
        if declared:
            # Packets, not frames: trimming without encoding leaves frames that an edit list hides.
            if declared - self._packets > max(2, 0.05 * declared):
                raise VideoError("decode", f"cut off or damaged: {self._packets} of {declared} frames are there")
        elif seconds and self._end < 0.8 * seconds - 0.3:
            raise VideoError("decode", f"cut off or damaged: it ends after {self._end:.1f} of {seconds:.1f} seconds")
        if self._damaged > max(2, 0.05 * self._packets):
            raise VideoError("decode", f"damaged: {self._damaged} of {self._packets} packets cannot be decoded")


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says that the video stream is; 0 where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match:
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    # The container's own length may be that of another stream.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def _open(path: str) -> av.container.InputContainer:
    try:
        if os.path.getsize(path) == 0:
            raise VideoError("open", "the file is empty")
        container = av.open(path, metadata_errors="replace")
    except PermissionError:
        raise VideoError("open", "no permission to read the file") from None
    except FileNotFoundError:
        raise VideoError("open", "the file is gone, or its link points nowhere") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError("open", f"not a video that FFmpeg can read, or cut off before its index ({reason})") from None
    if not container.streams.video:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        container.close()
        raise VideoError("open", f"no video stream in the file (it holds {found})")
    return container


def _output_rate(stream: av.VideoStream, settings: VideoSettings) -> Fraction:
    if settings.fps is not None:
        return Fraction(settings.fps).limit_denominator(1001)
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < rate <= 1000:
        raise VideoError("open", f"the video states no usable frame rate ({rate}); give one with --fps")
    return Fraction(rate).limit_denominator(100_000)


def _output_size(frame: av.VideoFrame, pixel_aspect: Fraction | None, short_side: int) -> tuple[int, int]:
    """Width and height in square pixels, even, the short side as asked for."""
    aspect = Fraction(pixel_aspect or 1)
    if not Fraction(1, 4) <= aspect <= 4:  # a nonsensical header value
        aspect = Fraction(1)
    width, height = float(frame.width * aspect), float(frame.height)
    scale = short_side / min(width, height) if short_side else 1.0

    def even(value: float) -> int:
        return max(2, 2 * math.floor(value * scale / 2 + 0.5))

    width, height = even(width), even(height)
    if max(width, height) > 16 * min(width, height):
        raise VideoError("decode", f"frames of {frame.width}x{frame.height} are too narrow to be a video")
    return width, height


def _graph(stream, frame, width: int, height: int, rate: Fraction, codec: str) -> av.filter.Graph:
    """Constant frame rate, size and colour through FFmpeg's own filters."""
    pixel_range = "full" if codec == "mjpeg" else "limited"
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base,
            name="in",
        ),
        graph.add("fps", f"fps={rate.numerator}/{rate.denominator}"),
        graph.add(
            "scale", f"{width}:{height}:flags=bicubic+accurate_rnd:out_color_matrix=bt601:out_range={pixel_range}"
        ),
        graph.add("setsar", "1"),
        graph.add("format", "yuvj420p" if codec == "mjpeg" else "yuv420p"),
        graph.add("buffersink"),
    ]  # fmt: skip
    graph.link_nodes(*nodes).configure()
    return graph


def _filtered(
    graph: av.filter.Graph, first: av.VideoFrame, rest: Iterator[av.VideoFrame], rate: Fraction
) -> Iterator[av.VideoFrame]:
    def ready() -> Iterator[av.VideoFrame]:
        while True:
            try:
                yield graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    shape, last = (first.width, first.height, first.format.name), first.pts

    def push(frame: av.VideoFrame) -> None:
        if (
            not frame.duration and frame.time_base
        ):  # without one, the rate filter takes the last frame to end where it begins
            frame.duration = max(1, round(1 / (rate * frame.time_base)))
        graph.vpush(frame)

    push(first)
    yield from ready()
    for frame in rest:
        if (frame.width, frame.height, frame.format.name) != shape:
            raise VideoError(
                "decode", f"the frame size changes from {shape[0]}x{shape[1]} to {frame.width}x{frame.height}"
            )
        if frame.pts is not None and last is not None and frame.pts <= last:
            continue  # a repeated or stepped-back time stamp would be dropped by the rate filter with a warning a frame
        last = frame.pts
        push(frame)
        yield from ready()
    graph.vpush(None)
    yield from ready()


class _Encoder:
    """One video stream into a fragmented MP4; remembers where its GOPs begin."""

    def __init__(self, sink: Sink, settings: VideoSettings, width: int, height: int, rate: Fraction, on_frame):
        self._container = av.open(sink, "w", format="mp4", options=_MUXER)
        name, pixel_format, options, gop = _codec_options(settings)
        stream = cast(av.VideoStream, self._container.add_stream(name, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 0
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        self._stream, self._rate, self._on_frame = stream, rate, on_frame
        self._packets = 0
        self.num_frames = 0
        self.key_frames: list[int] = []

    def write(self, frames: Iterator[av.VideoFrame]) -> None:
        for frame in frames:
            # The source's own picture types would override the GOP length.
            frame.pict_type = av.video.frame.PictureType.NONE
            frame.pts, frame.time_base = self.num_frames, 1 / self._rate
            self.num_frames += 1
            self._mux(self._stream.encode(frame))
            self._on_frame()
        self._mux(self._stream.encode(None))
        if not self.num_frames:
            raise VideoError("encode", "no frame is left at the frame rate asked for")
        if self._packets != self.num_frames:
            raise VideoError("encode", f"the encoder gave {self._packets} packets for {self.num_frames} frames")

    def close(self) -> None:
        self._container.close()

    def _mux(self, packets) -> None:
        for packet in packets:
            if packet.is_keyframe:
                self.key_frames.append(self._packets)
            self._packets += 1
            self._container.mux(packet)


def _codec_options(settings: VideoSettings) -> tuple[str, str, dict[str, str], int]:
    gop = str(settings.gop)
    if settings.codec == "h264":
        # fastdecode: no deblocking and no CABAC; fixed GOPs of one IDR frame and P frames.
        crf = 23 if settings.crf is None else settings.crf
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:threads=1"
        return (
            "libx264",
            "yuv420p",
            {"preset": settings.preset, "tune": "fastdecode", "crf": str(crf), "x264-params": params},
            settings.gop,
        )
    if settings.codec == "vp9":
        # No look-ahead and no hidden alternate reference frames: every packet is one shown frame.
        crf = 33 if settings.crf is None else settings.crf
        options = {"crf": str(crf), "b": "0", "keyint_min": gop, "lag-in-frames": "0", "auto-alt-ref": "0",
                   "deadline": "good", "cpu-used": "4", "row-mt": "0"}  # fmt: skip
        return "libvpx-vp9", "yuv420p", options, settings.gop
    quality = 4 if settings.crf is None else settings.crf
    return "mjpeg", "yuvj420p", {"qmin": str(max(1, quality)), "qmax": str(max(1, quality))}, 1
