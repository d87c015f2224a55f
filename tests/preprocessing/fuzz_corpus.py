"""Writes a folder of damaged, odd and hostile files in the class-per-folder layout. The same seed, the same files."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"mvex", b"moof", b"traf", b"dinf"}
Damage = Callable[[random.Random, bytes], bytes]


def write_corpus(root: Path, count: int, *, clips: tuple[Path, ...] = (), seed: int = 0) -> list[str]:
    """Writes `count` files below `root`, in two class folders, and gives their paths relative to it.

    clips: real videos to damage besides the generated ones. Every class holds one sound video at least.
    """
    bases = _generated() + [(path.suffix, path.read_bytes()) for path in clips]
    whole = [(".mp4", _encoded("libx264", "mp4", frames=12))] * 2
    special = _special(count)
    damages = list(DAMAGES)
    paths = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        if number < len(whole):
            name, (suffix, data) = "sound", whole[number]
        elif number < len(whole) + len(special):
            name, suffix, data = special[number - len(whole)]
        else:
            name = damages[number % len(damages)]
            suffix, data = rng.choice([base for base in bases if name in _ANY or base[0] in (".mp4", ".mov")])
            if name == "swapped":
                data += rng.choice([other for kind, other in bases if kind == ".mp4"])
            data = DAMAGES[name](rng, data)
        path = root / f"class{number % 2}" / f"{number:03d}_{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data(path) if callable(data) else path.write_bytes(data)
        paths.append(os.path.relpath(path, root))
    return paths


# --- damage to the bytes of a video


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> list[tuple[bytes, int, int]]:
    """(type, begin, end) of the MP4 boxes of a file and of those inside them (ISO/IEC 14496-12)."""
    end = len(data) if end is None else end
    found = []
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        if not 8 <= size <= end - begin:
            break
        found.append((kind, begin, begin + size))
        if kind in CONTAINERS:
            found += boxes(data, begin + 8, begin + size)
        begin += size
    return found


def cut_at_a_box(rng: random.Random, data: bytes) -> bytes:
    _, begin, end = rng.choice(boxes(data))
    return data[: rng.choice([begin, begin + 4, begin + 8, end, end - 1])]


def cut_anywhere(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def flip(rng: random.Random, data: bytes, begin: int, end: int) -> bytes:
    """1 to 1000 bits of data[begin:end], the number uniform in its logarithm."""
    changed = bytearray(data)
    for _ in range(round(10 ** rng.uniform(0, 3))):
        changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_anywhere(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 0, len(data))


def flip_the_first_bytes(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 0, min(len(data), 400))


def flip_the_index(rng: random.Random, data: bytes) -> bytes:
    _, begin, end = rng.choice([box for box in boxes(data) if box[0] in (b"moov", b"moof", b"stbl", b"stsd")])
    return flip(rng, data, begin, end)


def flip_the_media(rng: random.Random, data: bytes) -> bytes:
    _, begin, end = next(box for box in boxes(data) if box[0] == b"mdat")
    return flip(rng, data, begin, end)


def shuffled(rng: random.Random, data: bytes) -> bytes:
    """The top-level boxes in another order, or one of them twice or missing."""
    top = [data[begin:end] for kind, begin, end in boxes(data) if _is_top(kind)]
    rng.shuffle(top)
    return b"".join(rng.choice([top, top[1:], [top[0], *top]]))


def swapped(rng: random.Random, data: bytes) -> bytes:
    """Of two files one after the other: the header of one and the media of the other."""
    found = [(kind, data[begin:end]) for kind, begin, end in boxes(data) if _is_top(kind)]
    second = [place for place, (kind, _) in enumerate(found) if kind == b"ftyp"][-1]
    one, other = found[:second], found[second:]
    return b"".join([box for kind, box in one if kind != b"mdat"] + [box for kind, box in other if kind == b"mdat"])


def huge_number(rng: random.Random, data: bytes) -> bytes:
    """A size, count, time or length of the index becomes as large as it can be written."""
    fields = {b"stsz": [4, 8, 12], b"stts": [4, 8, 12], b"stco": [4, 8], b"stsc": [4, 8, 12, 16], b"ctts": [4, 8, 12],
              b"mdhd": [12, 16], b"mvhd": [12, 16], b"tkhd": [20, 76, 80], b"stsd": [4, 8, 40], b"elst": [4, 8, 12],
              b"stss": [4, 8], b"trun": [4, 8, 12], b"tfdt": [4, 8], b"trex": [8, 12, 16]}  # fmt: skip
    changed = bytearray(data)
    for kind, begin, end in rng.sample(found := [box for box in boxes(data) if box[0] in fields], min(2, len(found))):
        at = begin + 8 + rng.choice(fields[kind])
        if at + 4 <= end:
            struct.pack_into(
                ">I", changed, at, rng.choice([0xFFFFFFFF, 0x7FFFFFFF, 0x40000000, 0xFFFF0000, 100_000_000])
            )
    return bytes(changed)


def huge_box(rng: random.Random, data: bytes) -> bytes:
    """A box claims to be longer than the file, than its parent, or 64-bit long."""
    changed = bytearray(data)
    _, begin, _ = rng.choice(boxes(data))
    struct.pack_into(">I", changed, begin, rng.choice([0xFFFFFFFF, 0x7FFFFFFF, len(data) * 2, 1, 0, 7]))
    return bytes(changed)


def huge_picture(rng: random.Random, data: bytes) -> bytes:
    """Every place that may hold the picture's width and height as 16-bit numbers says 65535 x 65535."""
    at = next(begin for kind, begin, _ in boxes(data) if kind == b"stsd")
    changed = bytearray(data)
    struct.pack_into(">HH", changed, at + 48, 65535, 65535)
    # The parameter sets too, whose numbers are not on byte boundaries: only some of these are still a header.
    return flip(rng, bytes(changed), at + 100, at + 130) if rng.random() < 0.5 else bytes(changed)


def hole(rng: random.Random, data: bytes) -> bytes:
    """A run of zeros, as a disk or a download leaves it."""
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.randrange(1, 100_000))
    return data[:begin] + bytes(end - begin) + data[end:]


def _is_top(kind: bytes) -> bool:
    return kind in (b"ftyp", b"moov", b"mdat", b"free", b"moof", b"mfra", b"sidx")


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        cut_at_a_box, cut_anywhere, flip_anywhere, flip_the_first_bytes, flip_the_index, flip_the_media, shuffled,
        swapped, huge_number, huge_box, huge_picture, hole,
    )
}  # fmt: skip
_ANY = ("cut_anywhere", "flip_anywhere", "flip_the_first_bytes", "hole")  # damage to any container


# --- whole videos, and files that are none


def _encoded(
    codec: str, container: str, frames: int = 30, size: tuple[int, int] = (96, 64), movflags: str = "", **options: str
) -> bytes:
    flags = {"movflags": movflags} if movflags else {}
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=container, options=flags) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
        rows, columns = np.mgrid[: size[1], : size[0]]
        for number in range(frames):
            image = np.stack([columns + 3 * number, rows - number, rows + columns], 2).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        out.close()
        return Path(file.name).read_bytes()


def _generated() -> list[tuple[str, bytes]]:
    fragmented = "frag_keyframe+empty_moov+default_base_moof"
    return [
        (".mp4", _encoded("libx264", "mp4", preset="veryfast")),
        (".mp4", _encoded("libx264", "mp4", movflags="faststart")),
        (".mp4", _encoded("libx264", "mp4", movflags=fragmented)),
        (".mp4", _encoded("mpeg4", "mp4")),
        (".mp4", _encoded("libx265", "mp4", **{"x265-params": "log-level=none:pools=none"})),
        (".mov", _encoded("mjpeg", "mov")),
        (".avi", _encoded("mpeg4", "avi")),
        (".avi", _encoded("mjpeg", "avi")),
        (".mkv", _encoded("libx264", "matroska")),
        (".webm", _encoded("libvpx-vp9", "webm", deadline="realtime", **{"cpu-used": "8"})),
        (".ts", _encoded("libx264", "mpegts")),
        (".mpg", _encoded("mpeg2video", "mpeg")),
        (".flv", _encoded("flv1", "flv")),
    ]


def _special(count: int) -> list[tuple[str, str, bytes | Callable[[Path], object]]]:
    """(name, suffix, content or what writes it) of single cases; the costly ones only in a large corpus."""
    small = _encoded("libx264", "mp4", frames=5)
    wav = b"RIFF" + struct.pack("<I", 8036) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    cases: list[tuple[str, str, bytes | Callable[[Path], object]]] = [
        ("empty", ".mp4", b""),
        ("text", ".mp4", b"this is no video\n" * 100),
        ("pipe", ".mp4", os.mkfifo),
        ("gone", ".mp4", lambda path: path.symlink_to("nowhere.mp4")),
        ("loop", ".mkv", lambda path: path.symlink_to(path.name)),
        ("new\nline\ttab", ".mp4", small),
        ("caf\udce9 \udcff", ".mp4", small),
        ("100%d %s %%", ".mp4", small),
        ("two.dots..mp4", ".avi", small),
        ("n" * 230, ".mp4", small),
        ("one_frame", ".mp4", _encoded("libx264", "mp4", frames=1)),
        ("eight_pixels", ".mkv", _encoded("ffv1", "matroska", frames=10, size=(8, 8))),
        ("zip", ".mp4", b"PK\x03\x04" + bytes(100)),
        ("wav", ".avi", wav + b"data" + struct.pack("<I", 8000) + bytes(8000)),
        ("jpeg", ".mp4", _encoded("mjpeg", "image2pipe", frames=1)),
        ("y4m_huge", ".y4m", b"YUV4MPEG2 W65535 H65535 F25:1\nFRAME\n" + bytes(1000)),
        ("y4m_rate", ".y4m", b"YUV4MPEG2 W16 H16 F1:99999999\n" + (b"FRAME\n" + bytes(384)) * 3),
        ("playlist", ".mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"),
        ("concat", ".mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("unreadable", ".mp4", lambda path: (path.write_bytes(small), path.chmod(0))),
        ("other", ".xyz", small),
        ("-dash", ".mp4", small),
        ("npy_short", ".npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999,"),
        ("npy_pickle", ".npy", b"\x80\x04K\x01."),
    ]
    if count >= 100:
        cases += [
            ("8k", ".mp4", _encoded("libx264", "mp4", frames=2, size=(7680, 4320), preset="ultrafast")),
            ("8k_mpeg4", ".mkv", _encoded("libx264", "matroska", frames=3, size=(8192, 4320), preset="ultrafast")),
            ("beyond_8k", ".mp4", _encoded("mpeg4", "mp4", frames=1, size=(8190, 8190))),
            ("thin", ".mkv", _encoded("ffv1", "matroska", frames=3, size=(4096, 2))),
            ("zeros", ".mp4", lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 3 << 30)),  # sparse
        ]
    return cases
