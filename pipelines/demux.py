"""Packets of an encoded slice straight to a decoder that is kept: opening a container for every clip costs as much as
decoding ten frames."""

from __future__ import annotations

import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

_KEPT = 8  # decoders a thread; videos of one encoding share theirs
_ENTRIES = {b"avc1": "h264", b"avc3": "h264", b"hvc1": "hevc", b"hev1": "hevc", b"vp09": "vp9"}
_CONFIGURATIONS = (b"avcC", b"hvcC")  # boxes whose content the decoder needs
# In an esds box: a decoder description (ISO/IEC 14496-1), its length in one or four bytes, of object type 0x6C.
_JPEG = re.compile(rb"\x04(\x80\x80\x80)?[\x0d-\x7f]\x6c")
_local = threading.local()


class Unknown(Exception):
    """The slice is not of a form that is read here; a demuxer may know it."""


def decode_slice(data: np.ndarray) -> Iterator[VideoFrame]:
    """The frames of a fragmented MP4 in memory (uint8 1-D), in display order, by a decoder of this thread.

    Raises Unknown before the first frame for another container or codec, av.FFmpegError for what cannot be decoded.
    """
    view = data.data
    try:
        name, extradata, start = _description(view)
        spans = list(_samples(view, start))
    except (struct.error, ValueError) as error:
        raise Unknown(str(error)) from None
    decoder = _take_decoder(name, extradata)
    try:
        for number, (first, last) in enumerate(spans):
            packet = av.Packet(bytes(view[first:last]))
            packet.pts = packet.dts = number
            yield from decoder.decode(packet)
        yield from decoder.decode(None)
    except GeneratorExit:
        pass  # the frames that are wanted have come
    # Not after an error, nor while another clip of this thread is being decoded.
    decoder.flush_buffers()
    _decoders()[name, extradata] = decoder
    if len(_decoders()) > _KEPT:
        _decoders().popitem(last=False)


def _decoders() -> OrderedDict[tuple[str, bytes], VideoCodecContext]:
    if not hasattr(_local, "decoders"):
        _local.decoders = OrderedDict()
    return _local.decoders


def _take_decoder(name: str, extradata: bytes) -> VideoCodecContext:
    """One that was kept, or a new one."""
    decoder = _decoders().pop((name, extradata), None)
    if decoder is None:
        decoder = cast(VideoCodecContext, VideoCodecContext.create(name, "r"))
        decoder.thread_count = 1
        if extradata:
            decoder.extradata = extradata
        decoder.open()
    return decoder


def _description(data: memoryview) -> tuple[str, bytes, int]:
    """Codec, its configuration, and where the first fragment begins (ISO/IEC 14496-12 and -15)."""
    start = next((at - 8 for kind, at, _ in _boxes(data, 0, len(data)) if kind == b"moof"), None)
    if start is None:
        raise Unknown("no fragment")
    begin, end = 0, start
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        begin, end = _child(data, begin, end, name)
    entry, begin, end = next(_boxes(data, begin + 8, end))
    inside = {kind: bytes(data[first:last]) for kind, first, last in _boxes(data, begin + 78, end)}
    if entry == b"mp4v" and _JPEG.search(inside.get(b"esds", b"")):
        return "mjpeg", b"", start
    if entry not in _ENTRIES:
        raise Unknown(f"sample entry {entry!r}")
    return _ENTRIES[entry], next((inside[kind] for kind in _CONFIGURATIONS if kind in inside), b""), start


def _samples(data: memoryview, start: int) -> Iterator[tuple[int, int]]:
    """Where each sample of the fragments from `start` on begins and ends, in decoding order."""
    for kind, begin, end in _boxes(data, start, len(data)):
        if kind != b"moof":
            continue
        moof, default = begin - 8, 0
        for name, at, _ in _boxes(data, *_child(data, begin, end, b"traf")):
            if name == b"tfhd":
                flags = struct.unpack_from(">I", data, at)[0]
                # After version, flags and track: base offset, description index, default duration, default size.
                at += 8 + 8 * bool(flags & 0x1) + 4 * bool(flags & 0x2) + 4 * bool(flags & 0x8)
                default = struct.unpack_from(">I", data, at)[0] if flags & 0x10 else 0
            elif name == b"trun":
                flags, count = struct.unpack_from(">II", data, at)
                if not flags & 0x1:
                    raise Unknown("a run of samples without an offset")
                place = moof + struct.unpack_from(">i", data, at + 8)[0]
                for size in _sizes(data, at + 12 + 4 * bool(flags & 0x4), flags, count, default):
                    if not 0 < place < place + size <= len(data):
                        raise Unknown("a sample outside the slice")
                    yield place, place + size
                    place += size


def _sizes(data: memoryview, at: int, flags: int, count: int, default: int) -> list[int]:
    """Sizes of a run's samples. A sample has up to four fields: duration, size, flags, composition offset."""
    fields = [field for field in (0x100, 0x200, 0x400, 0x800) if flags & field]
    if 0x200 not in fields:
        return [default] * count
    table = np.frombuffer(data[at : at + 4 * len(fields) * count], ">u4").reshape(count, len(fields))
    return table[:, fields.index(0x200)].tolist()


def _child(data: memoryview, begin: int, end: int, name: bytes) -> tuple[int, int]:
    for kind, first, last in _boxes(data, begin, end):
        if kind == name:
            return first, last
    raise Unknown(f"no box {name!r}")


def _boxes(data: memoryview, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, where the content begins, where it ends) of the boxes in a stretch."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        if size < head or at + size > end:
            raise Unknown(f"a box of {size} bytes")
        yield kind, at + head, at + size
        at += size
