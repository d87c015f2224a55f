"""Copies a source's packets into a fragmented MP4 without re-encoding, where the source already has the format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from .decoding import Frames, VideoError, is_turned, open_container, open_frames, upright_filters
from .shards import Encoded, Sink
from .sources import SourceVideo

if TYPE_CHECKING:
    from .video import VideoSettings

CODECS = ("h264", "hevc", "vp9", "av1")
_H264_IDR, _HEVC_IDR = {5}, {19, 20}  # NAL unit types, ITU-T H.264 table 7-1 and H.265 table 7-1


class Misfit(Exception):
    """Why a source has to be re-encoded."""


def remux(
    video: SourceVideo, sink: Sink, settings: VideoSettings, muxer: dict, on_frame: Callable[[], None]
) -> Encoded:
    """Writes the video stream's packets to `sink`, one fragment a key frame.

    Raises Misfit, with an unusable sink, for a source that is not 8-bit yuv420p with square pixels at a constant rate
    in closed GOPs of at most settings.gop frames, of the size and rate asked for; VideoError for one that is damaged.
    """
    if video.path.endswith(".npy") or video.start_s is not None or video.end_s is not None:
        raise Misfit("not a whole video file")
    with open_frames(video) as frames:
        _require_format(frames, settings)
    with _reopened(video) as (container, stream):
        rate = Fraction(stream.average_rate or 0)
        with contextlib.closing(_Copier(sink, stream, rate, settings.gop, muxer)) as copier:
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        copier.add(packet)
                        on_frame()
            except av.error.EOFError:
                pass
            except av.FFmpegError as error:
                raise VideoError("decode", f"the file cannot be read to its end ({error.strerror})") from None
            key_frames = copier.finish()
        number = copier.num_frames
        declared = stream.frames
        if declared and declared - number > max(2, 0.05 * declared):
            raise VideoError("decode", f"cut off or damaged: {number} of {declared} frames are there")
        return Encoded(
            frames.first.width, frames.first.height, float(rate), number, (*key_frames, number),
            stream.codec_context.name, float(rate), number,
        )  # fmt: skip


def _require_format(frames: Frames, settings: VideoSettings) -> None:
    first = frames.first
    if frames.codec not in CODECS:
        raise Misfit(f"codec {frames.codec}")
    if first.format.name != "yuv420p":
        raise Misfit(f"pixel format {first.format.name}")
    if int(first.color_range) == 2:
        raise Misfit("full-range colour")
    if frames.pixel_aspect != 1:
        raise Misfit("pixels that are not square")
    if first.interlaced_frame:
        raise Misfit("interlaced")
    if is_turned(frames) or any(name != "bwdif" for name, _ in upright_filters(frames)):
        raise Misfit("a display rotation")
    if settings.size and (first.width, first.height) != settings.exact_size:
        raise Misfit(f"size {first.width}x{first.height}")
    if settings.short_side and min(first.width, first.height) != settings.short_side and not settings.size:
        raise Misfit(f"short side {min(first.width, first.height)}")
    if first.width % 2 or first.height % 2:
        raise Misfit("odd size")
    if frames.rate is None or (settings.fps is not None and abs(float(frames.rate) - settings.fps) > 1e-3):
        raise Misfit(f"frame rate {frames.rate}")


@contextlib.contextmanager
def _reopened(video: SourceVideo) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with open_container(video) as container:
        stream = container.streams.best("video")
        assert stream is not None
        yield container, stream


class _Copier:
    """Muxes packets and checks on the way that GOPs are short and closed and that the frame rate is constant."""

    def __init__(self, sink: Sink, stream: av.VideoStream, rate: Fraction, longest: int, muxer: dict):
        self._out = av.open(sink, "w", format="mp4", options=muxer)
        self._stream = self._out.add_stream_from_template(stream)
        self._codec, self._longest = stream.codec_context.name, longest
        self._length_size = _nal_length_size(self._codec, stream.codec_context.extradata)
        if self._codec in ("h264", "hevc") and not stream.codec_context.extradata:
            raise Misfit("no parameter sets in the file's header")
        assert stream.time_base is not None
        self._period = float(1 / rate / stream.time_base)
        self._start: int | None = None
        self._gop: list[int] = []
        self._key_frames: list[int] = []
        self.num_frames = 0

    def add(self, packet: av.Packet) -> None:
        if packet.is_discard or packet.pts is None or packet.dts is None:
            raise Misfit("frames that are hidden or without a time stamp")
        if packet.is_keyframe:
            if self._codec in ("h264", "hevc") and not self._is_idr(bytes(packet)):
                raise Misfit("open GOPs")
            self._end_gop(packet.pts)
            self._key_frames.append(self.num_frames)
        elif not self._key_frames:
            raise Misfit("no key frame at the beginning")
        if self._start is None:
            self._start = packet.pts
        self._gop.append(packet.pts)
        if len(self._gop) > self._longest:
            raise Misfit(f"GOPs longer than {self._longest}")
        self.num_frames += 1
        packet.pts, packet.dts = packet.pts - self._start, packet.dts - self._start
        packet.stream = self._stream
        self._out.mux(packet)

    def finish(self) -> list[int]:
        """The number of each GOP's first frame."""
        self._end_gop(None)
        if not self.num_frames:
            raise VideoError("decode", "the video stream holds no packet")
        self._out.close()
        return self._key_frames

    def close(self) -> None:
        self._out.close()

    def _end_gop(self, next_start: int | None) -> None:
        """Every frame of a GOP is shown after its key frame, before the next one, and at its turn of the frame rate."""
        if not self._gop:
            return
        assert self._start is not None
        shown = sorted(self._gop)
        if shown[0] != self._gop[0] or (next_start is not None and shown[-1] >= next_start):
            raise Misfit("open GOPs")
        first = self.num_frames - len(shown)
        for number, pts in enumerate(shown, first):
            if abs(pts - self._start - number * self._period) > max(1.0, 0.1 * self._period):
                raise Misfit("a variable frame rate")
        self._gop = []

    def _is_idr(self, data: bytes) -> bool:
        return any(kind in (_H264_IDR if self._codec == "h264" else _HEVC_IDR) for kind in self._nal_types(data))

    def _nal_types(self, data: bytes) -> Iterator[int]:
        def kind(byte: int) -> int:
            return byte & 31 if self._codec == "h264" else (byte >> 1) & 63

        if self._length_size:
            at = 0
            while at + self._length_size < len(data):
                size = int.from_bytes(data[at : at + self._length_size], "big")
                yield kind(data[at + self._length_size])
                at += self._length_size + size
            return
        at = data.find(b"\0\0\1")
        while 0 <= at < len(data) - 3:
            yield kind(data[at + 3])
            at = data.find(b"\0\0\1", at + 3)


def _nal_length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of a NAL unit's length field (ISO/IEC 14496-15); 0 where start codes separate the units."""
    if not extradata or extradata[:3] == b"\0\0\1" or extradata[:4] == b"\0\0\0\1":
        return 0
    if codec == "h264" and len(extradata) > 4:
        return (extradata[4] & 3) + 1
    if codec == "hevc" and len(extradata) > 21:
        return (extradata[21] & 3) + 1
    return 0
