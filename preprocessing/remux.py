"""Copies a source's packets into a fragmented MP4 without re-encoding, where the source already has the format."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from .containers import declared_seconds, open_container, video_stream
from .decoding import Frames, VideoError, is_turned, stream_aspect, stream_rate, upright_filters
from .shards import Encoded, Sink
from .sources import SourceVideo

if TYPE_CHECKING:
    from .video import VideoSettings

CODECS = ("h264", "hevc", "vp9", "av1")
# NAL unit types, ITU-T H.264 table 7-1 and H.265 table 7-1.
_IDR = {"h264": {5}, "hevc": {19, 20}}
_MOST_REORDERED = 16  # frames; the limit of H.264 and H.265
_PARAMETER_SETS = {"h264": {7, 8}, "hevc": {32, 33, 34}}


class Misfit(Exception):
    """Why a source has to be re-encoded."""


def remux(
    video: SourceVideo, sink: Sink, settings: VideoSettings, muxer: dict, on_frame: Callable[[], None]
) -> Encoded:
    """Writes the video stream's packets to `sink`, one fragment a key frame.

    Packets are not decoded, so damage inside them is copied too. Raises Misfit, with an unusable sink, for a source
    that is not 8-bit yuv420p with square pixels at a constant rate in closed GOPs of at most settings.gop frames, of
    the size and rate asked for, and for one whose packets are torn; VideoError for one that ends early.
    """
    if video.path.endswith(".npy") or video.start_s is not None or video.end_s is not None:
        raise Misfit("not a whole video file")
    with open_container(video) as container:
        stream = video_stream(container)
        assert stream.time_base is not None
        packets = _packets(container, stream)
        head = next(packets, None)
        if head is None:
            raise VideoError("decode", "the video stream holds no packet")
        frames = _look_at(stream, head)
        _require_format(frames, settings)
        rate = frames.rate
        assert rate is not None, "_require_format has checked it"
        copier = _Copier(sink, stream, rate, settings.gop, muxer)
        with contextlib.closing(copier):
            every = itertools.chain([head], packets)
            for packet in _with_dts(every, float(1 / rate / stream.time_base)):
                copier.add(packet)
                on_frame()
            key_frames = copier.finish()
        number, declared = copier.num_frames, stream.frames
        if declared and declared - number > max(2, 0.05 * declared):
            raise VideoError("decode", f"cut off or damaged: {number} of {declared} frames are there")
        ends, seconds = float(number / rate), declared_seconds(container, stream)
        if not declared and ends < 0.95 * seconds - 0.5:
            raise VideoError("decode", f"cut off or damaged: it ends after {ends:.1f} of {seconds:.1f} seconds")
        return Encoded(
            frames.first.width, frames.first.height, float(rate), number, (*key_frames, number),
            frames.codec, float(rate), number,
        )  # fmt: skip


def _look_at(stream: av.VideoStream, packet: av.Packet) -> Frames:
    """The first frame and what the stream says of the others. The stream's decoder is spent afterwards."""
    context, found = stream.codec_context, []
    with contextlib.suppress(av.FFmpegError, EOFError):
        found += context.decode(packet)
        found += context.decode(None)  # a decoder that reorders frames gives the first one only so
    if not found:
        raise Misfit("a first frame that cannot be decoded")
    assert stream.time_base is not None
    frames = Frames(iter(found), stream_rate(stream), stream.time_base, context.codec.canonical_name)
    frames.pixel_aspect = stream_aspect(stream)
    return frames


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


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        raise Misfit("B-frames without time stamps")
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.EOFError):
            return
        except av.FFmpegError as error:
            raise VideoError("decode", f"the file cannot be read to its end ({error.strerror})") from None
        if packet.size:
            yield packet


def _with_dts(packets: Iterator[av.Packet], period: float) -> Iterator[av.Packet]:
    """Gives the first packets their decoding times, which Matroska does not store; period: of a frame, in ticks."""
    waiting: list[av.Packet] = []
    for packet in packets:
        waiting.append(packet)
        if packet.dts is None and len(waiting) <= _MOST_REORDERED:
            continue
        if packet.dts is not None:
            for number, earlier in enumerate(reversed(waiting[:-1]), 1):
                earlier.dts = packet.dts - round(number * period)
        yield from waiting
        waiting.clear()
    yield from waiting


class _Copier:
    """Muxes packets and checks on the way that GOPs are short and closed and that the frame rate is constant."""

    def __init__(self, sink: Sink, stream: av.VideoStream, rate: Fraction, longest: int, muxer: dict):
        assert stream.time_base is not None
        context = stream.codec_context
        self._codec, self._decoder, self._longest = context.codec.canonical_name, context.name, longest
        self._size = context.width, context.height
        self._period = float(1 / rate / stream.time_base)
        self._start: int | None = None
        self._gop: list[int] = []
        self._key_frames: list[int] = []
        self.num_frames = 0
        self._nals = _NalUnits(self._codec, context.extradata or b"") if self._codec in _IDR else None
        self._out = av.open(sink, "w", format="mp4", options=muxer)
        self._stream = self._out.add_stream_from_template(stream, opaque=True)  # no encoder is looked for
        if self._codec == "hevc":
            self._stream.codec_context.codec_tag = "hvc1"

    def add(self, packet: av.Packet) -> None:
        if packet.is_discard or packet.pts is None or packet.dts is None:
            raise Misfit("frames that are hidden or without a time stamp")
        if packet.is_corrupt:
            raise Misfit("damaged packets")
        idr = self._nals.check(bytes(packet)) if self._nals else True
        if packet.is_keyframe:
            if not idr:
                raise Misfit("open GOPs")
            if self._nals is None and _picture_size(self._decoder, packet) != self._size:
                raise Misfit("a frame size that changes")
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
        try:
            self._out.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            raise Misfit(f"packets that MP4 does not take ({getattr(error, 'strerror', error)})") from None

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


class _NalUnits:
    """Reads the NAL units of H.264 and H.265 packets, which ISO/IEC 14496-15 gives a length each, others start codes.

    A slice of the stored video is decoded with the parameter sets of the header alone, so others must not follow.
    """

    def __init__(self, codec: str, extradata: bytes):
        if not extradata:
            raise Misfit("no parameter sets in the file's header")
        self._codec, self._length_size = codec, 0
        if extradata[0] == 1 and len(extradata) > (6 if codec == "h264" else 22):
            self._length_size = (extradata[4 if codec == "h264" else 21] & 3) + 1
            self._known = set(_configured(codec, extradata))
        else:
            self._known = set(self._units(extradata))

    def check(self, data: bytes) -> bool:
        """Whether the packet holds an IDR picture. Raises Misfit for a torn packet or a new parameter set."""
        idr = False
        for unit in self._units(data):
            kind = unit[0] & 31 if self._codec == "h264" else (unit[0] >> 1) & 63
            idr |= kind in _IDR[self._codec]
            if kind in _PARAMETER_SETS[self._codec] and unit not in self._known:
                raise Misfit("parameter sets that change")
        return idr

    def _units(self, data: bytes) -> Iterator[bytes]:
        if self._length_size:
            at = 0
            while at < len(data):
                begin = at + self._length_size
                at = begin + int.from_bytes(data[at:begin], "big")
                if not begin < at <= len(data):
                    raise Misfit("damaged packets")
                yield data[begin:at]
            return
        for unit in data.split(b"\0\0\1")[1:]:
            if unit.rstrip(b"\0"):
                yield unit.rstrip(b"\0")


def _configured(codec: str, record: bytes) -> Iterator[bytes]:
    """The parameter sets of an AVCDecoderConfigurationRecord or HEVCDecoderConfigurationRecord."""
    at = 5 if codec == "h264" else 23
    for _ in range(2 if codec == "h264" else record[22]):
        if codec == "h264":
            count, at = record[at] & (31 if at == 5 else 255), at + 1
        else:
            count, at = int.from_bytes(record[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(record[at : at + 2], "big")
            yield record[at + 2 : at + 2 + size]
            at += 2 + size
        if at >= len(record):
            return


def _picture_size(decoder_name: str, packet: av.Packet) -> tuple[int, int] | None:
    """(width, height) of a key frame decoded by itself; None if that fails."""
    decoder = av.CodecContext.create(decoder_name, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    try:
        frames = [*decoder.decode(packet), *decoder.decode(None)]
    except av.FFmpegError:
        return None
    return (frames[0].width, frames[0].height) if frames else None
