"""Decodes a source video and writes it as a fragmented MP4 with one closed GOP a fragment (PyAV)."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast

import av

from ..errors import UserError
from .decoding import Frames, VideoError, build_graph, filtered, is_turned, open_frames, upright_filters
from .remux import Misfit, remux
from .shards import Encoded, Sink
from .sources import MAX_FPS, MIN_FPS, SourceVideo

CODECS = ("h264", "hevc", "vp9", "mjpeg", "copy")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
# x264 takes 0 for lossless, and writes a profile then that NVDEC does not decode.
_CRF_RANGES = {"h264": (1, 51), "copy": (1, 51), "hevc": (0, 51), "vp9": (0, 63), "mjpeg": (0, 63)}
# H.264 is coded in blocks of 16 pixels. DALI uses an NVDEC decoder again only where videos fill theirs: it looks for
# the coded size among shown sizes, and making a new one takes a good part of a tenth of a second.
BLOCK = 16
_LEAST_ROUNDED = 128  # short side from which the long one is rounded to blocks: a change of shape of 6 % at the most
# One fragment a key frame; no trailing index, so that the payload ends with its last GOP.
MUXER = {"movflags": "frag_keyframe+empty_moov+default_base_moof+skip_trailer", "fflags": "+bitexact"}


@dataclass(frozen=True)
class VideoSettings:
    """How videos are stored. short_side: pixels, 0 keeps the source's size; fps: None keeps the source's rate.

    Beside a short side of whole blocks of 16 pixels the long one is rounded to whole blocks too.

    size: "WIDTHxHEIGHT" stretches to exactly that, whatever the shape; it wins over short_side. codec "copy" takes
    sources that already fit as they are. modality: "flow" for arrays of optical flow.
    """

    codec: str = "h264"
    short_side: int = 256
    fps: float | None = None
    gop: int = 16
    crf: int | None = None
    preset: str = "medium"
    size: str | None = None
    modality: str = "rgb"

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(f"unknown codec {self.codec!r}; there are {', '.join(CODECS)}")
        if self.short_side and not 16 <= self.short_side <= 4096:
            raise UserError(f"short side {self.short_side} is not between 16 and 4096 pixels (0 keeps the source's)")
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise UserError(f"fps {self.fps:g} is not between {MIN_FPS:g} and {MAX_FPS:g}")
        if not 1 <= self.gop <= 1000:
            raise UserError(f"gop {self.gop} is not between 1 and 1000 frames")
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset {self.preset!r}; x264 has {', '.join(PRESETS)}")
        least, most = _CRF_RANGES[self.codec]
        if self.crf is not None and not least <= self.crf <= most:
            raise UserError(f"crf {self.crf} is not between {least} and {most}, as {self.codec} has it")
        if self.size is not None:
            match = re.fullmatch(r"(\d+)x(\d+)", self.size)
            if not match or not all(16 <= int(side) <= 8192 and int(side) % 2 == 0 for side in match.groups()):
                raise UserError(f"size {self.size!r} is not WIDTHxHEIGHT with even sides of 16 to 8192, e.g. 112x112")

    @property
    def exact_size(self) -> tuple[int, int]:
        """(width, height) of `size`."""
        width, height = (self.size or "0x0").split("x")
        return int(width), int(height)

    def encode(self, video: SourceVideo, sink: Sink, on_frame: Callable[[], None]) -> Encoded:
        """What a conversion calls for every source: see the function of the same name."""
        return encode(video, sink, self, on_frame)


def encode(
    video: SourceVideo, sink: Sink, settings: VideoSettings, on_frame: Callable[[], None] = lambda: None
) -> Encoded:
    """Writes one source to `sink` as `settings` say: transcoded, or copied where codec is "copy" and the source fits.

    A source that does not fit is encoded as H.264, and the result's `reencoded` says why. Raises VideoError.
    """
    if settings.codec != "copy":
        return transcode(video, sink, settings, on_frame)
    try:
        return remux(video, sink, settings, MUXER, on_frame)
    except Misfit as misfit:
        sink.reset()
        return replace(transcode(video, sink, replace(settings, codec="h264"), on_frame), reencoded=str(misfit))


def transcode(
    video: SourceVideo, sink: Sink, settings: VideoSettings, on_frame: Callable[[], None] = lambda: None
) -> Encoded:
    """Writes the frames of a source to `sink` as 8-bit yuv420p at a constant frame rate, deinterlaced and upright.

    Output colour is BT.601 (limited range, full range for mjpeg), square pixels, even sides. on_frame is called for
    every written frame and may raise to stop. One thread is used, so that the bytes do not depend on the machine's
    load. Raises VideoError for a source that is no usable video.
    """
    with open_frames(video) as frames:
        rate = output_rate(frames, settings)
        width, height = output_size(frames, settings)
        colour = f"out_color_matrix=bt601:out_range={'full' if settings.codec == 'mjpeg' else 'limited'}"
        filters = [
            *upright_filters(frames),
            ("fps", f"fps={rate.numerator}/{rate.denominator}"),
            ("scale", f"{width}:{height}:flags=bicubic+accurate_rnd:{colour}"),
            ("setsar", "1"),
            ("format", "yuvj420p" if settings.codec == "mjpeg" else "yuv420p"),
        ]
        try:
            graph = build_graph(frames, filters)
            with contextlib.closing(Encoder(sink, settings, width, height, rate, on_frame)) as encoder:
                encoder.write(filtered(graph, frames))
        except av.FFmpegError as error:
            raise VideoError(
                "encode", f"cannot be encoded as {settings.codec} {width}x{height} ({error.strerror})"
            ) from None
        frames.refuse_damaged()
        return Encoded(
            width, height, float(rate), encoder.num_frames, (*encoder.key_frames, encoder.num_frames),
            settings.codec, float(frames.rate or rate), frames.count,
        )  # fmt: skip


def decode_frames(payload: BinaryIO | str | Path) -> Iterator[av.VideoFrame]:
    """Every frame of a stored payload or of a slice of it (header + GOPs), in order."""
    with av.open(payload if not isinstance(payload, Path) else str(payload), "r") as container:
        yield from container.decode(video=0)


def output_rate(frames: Frames, settings: VideoSettings) -> Fraction:
    """Frames a second of what is written. Raises VideoError for a source that states none."""
    if settings.fps is not None:
        return Fraction(settings.fps).limit_denominator(1001)
    if frames.rate is None:
        raise VideoError("open", "the video states no usable frame rate; give one with --fps")
    return frames.rate.limit_denominator(100_000)


def output_size(frames: Frames, settings: VideoSettings) -> tuple[int, int]:
    """Width and height in square pixels, as asked for: even, or whole blocks (see VideoSettings)."""
    if settings.size:
        return settings.exact_size
    first = frames.first
    width, height = float(first.width * frames.pixel_aspect), float(first.height)
    if is_turned(frames):
        width, height = height, width
    if settings.short_side and first.format.name == "gray" and frames.codec == "npy":
        raise VideoError("open", "flow cannot be scaled once it is computed; use --short-side 0")
    scale = settings.short_side / min(width, height) if settings.short_side else 1.0

    blocks = settings.short_side >= _LEAST_ROUNDED and settings.short_side % BLOCK == 0
    step = BLOCK if blocks else 2

    def rounded(value: float) -> int:
        return max(step, step * math.floor(value * scale / step + 0.5))

    width, height = rounded(width), rounded(height)
    if max(width, height) > 16 * min(width, height):
        raise VideoError("decode", f"frames of {first.width}x{first.height} are too narrow to be a video")
    return width, height


class Encoder:
    """One video stream into a fragmented MP4; remembers where its GOPs begin."""

    def __init__(self, sink: Sink, settings: VideoSettings, width: int, height: int, rate: Fraction, on_frame):
        self._container = av.open(sink, "w", format="mp4", options=MUXER)
        name, pixel_format, options, gop = _codec_options(settings)
        stream = cast(av.VideoStream, self._container.add_stream(name, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 0
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        if settings.codec == "hevc":
            stream.codec_context.codec_tag = "hvc1"  # parameter sets in the header only; hev1 plays on fewer devices
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
        # fastdecode: no deblocking and no CABAC; fixed GOPs of one IDR frame and P frames. No mbtree: its AVX-512 code
        # gives other bytes in one run of twenty, its SSE2 code always. It would save 9 % of the bytes.
        crf = 23 if settings.crf is None else settings.crf
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:mbtree=0:threads=1"
        return (
            "libx264",
            "yuv420p",
            {"preset": settings.preset, "tune": "fastdecode", "crf": str(crf), "x264-params": params},
            settings.gop,
        )
    if settings.codec == "hevc":
        crf = 28 if settings.crf is None else settings.crf
        params = (
            f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:pools=none:frame-threads=1:"
            "repeat-headers=0:info=0:log-level=error"
        )
        options = {"preset": settings.preset, "crf": str(crf), "x265-params": params}
        return "libx265", "yuv420p", options, settings.gop
    if settings.codec == "vp9":
        # No look-ahead and no hidden alternate reference frames: every packet is one shown frame.
        crf = 33 if settings.crf is None else settings.crf
        options = {"crf": str(crf), "b": "0", "keyint_min": gop, "lag-in-frames": "0", "auto-alt-ref": "0",
                   "deadline": "good", "cpu-used": "4", "row-mt": "0"}  # fmt: skip
        return "libvpx-vp9", "yuv420p", options, settings.gop
    quality = 4 if settings.crf is None else settings.crf
    return "mjpeg", "yuvj420p", {"qmin": str(max(1, quality)), "qmax": str(max(1, quality))}, 1
