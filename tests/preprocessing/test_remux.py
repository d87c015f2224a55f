"""codec="copy": packets go over untouched where they fit, and everything else is re-encoded, saying why."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest

from genkd.preprocessing.decoding import VideoError, rgb_frames
from genkd.preprocessing.remux import Misfit, remux
from genkd.preprocessing.shards import Payload, gop_table
from genkd.preprocessing.sources import SourceVideo
from genkd.preprocessing.video import MUXER, VideoSettings, decode_frames, encode, transcode

import av  # isort: skip

pytestmark = pytest.mark.ffmpeg
COPY = VideoSettings("copy", short_side=0, gop=300)


def source(path, **more) -> SourceVideo:
    return SourceVideo("key", str(path), "train", 0, 0, **more)


class Memory(Payload):
    def __init__(self):
        super().__init__(io.BytesIO(), 0)

    @property
    def data(self) -> bytes:
        return self._file.getvalue()


def ffmpeg(*arguments) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True).stdout


def pattern(path, *options, size="96x64", rate=25, seconds=4.0):
    """FFmpeg's moving test picture, encoded as `options` say."""
    picture = f"testsrc2=s={size}:r={rate}:d={seconds}"
    pixels = [] if "-pix_fmt" in options else ["-pix_fmt", "yuv420p"]
    ffmpeg("-f", "lavfi", "-i", picture, *pixels, *options, path)
    return path


def rgb(data: bytes) -> np.ndarray:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(data))])


def assert_copied(path, gops=None) -> Memory:
    """The payload decodes to the source's frames bit for bit, as a whole and each GOP by itself."""
    sink = Memory()
    encoded = encode(source(path), sink, COPY)
    assert encoded.reencoded is None
    expected = np.stack(list(rgb_frames(source(path))))
    assert encoded.num_frames == encoded.source_frames == len(expected)
    np.testing.assert_array_equal(rgb(sink.data), expected)
    header, offsets = gop_table(sink.boxes(), sink.size)
    assert len(offsets) == len(encoded.gop_frames)
    if gops is not None:
        assert encoded.gop_frames == gops
    for number, (first, last) in enumerate(itertools.pairwise(encoded.gop_frames)):
        piece = sink.data[:header] + sink.data[offsets[number] : offsets[number + 1]]
        np.testing.assert_array_equal(rgb(piece), expected[first:last])
    return sink


H264, HEVC = ["-c:v", "libx264", "-g", "40"], ["-c:v", "libx265"]
CLOSED = "open-gop=0:keyint=40:min-keyint=40:scenecut=0:log-level=none"
FITS = {
    "b.mp4": H264,
    "b.mkv": H264,  # without decoding times
    "b.ts": H264,  # start codes, parameter sets before every key frame
    "b.flv": H264,
    "b.mov": H264,
    "plain.mp4": [*H264, "-bf", "0"],
    "plain.avi": [*H264, "-bf", "0"],
    "fragments.mp4": [*H264, "-movflags", "frag_keyframe+empty_moov"],
    "hevc.mp4": [*HEVC, "-x265-params", CLOSED],
    "hevc.mkv": [*HEVC, "-x265-params", CLOSED],
    "hevc.ts": [*HEVC, "-x265-params", CLOSED],
    # Hidden alternate reference frames lie in one packet with a shown frame.
    "vp9.webm": ["-c:v", "libvpx-vp9", "-g", "40", "-cpu-used", "4", "-auto-alt-ref", "1", "-lag-in-frames", "16"],
}


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_copied_bit_for_bit(tmp_path, name):
    sink = assert_copied(pattern(tmp_path / name, *FITS[name]), (0, 40, 80, 100))
    with av.open(io.BytesIO(sink.data)) as container:
        context = container.streams.video[0].codec_context
        assert context.codec_tag == {"hev": "hvc1", "vp9": "vp09"}.get(name[:3], "avc1")


def test_av1_is_copied(tmp_path):
    encoders = ffmpeg("-encoders").decode()
    if "libaom-av1" not in encoders:
        pytest.skip("needs FFmpeg's libaom encoder")
    options = ["-c:v", "libaom-av1", "-cpu-used", "8", "-g", "10", "-threads", "1"]
    assert_copied(pattern(tmp_path / "a.mkv", *options, seconds=1), (0, 10, 20, 25))


@pytest.mark.real
def test_real_clips_are_copied(real_data):
    fights = sorted((real_data / "fights").glob("*/*.mp4"), key=lambda path: path.stat().st_size)[:60:30]
    assert len(fights) == 2
    for path in [*fights, real_data / "clips" / "av1_video.mkv"]:
        assert_copied(path)


@pytest.mark.parametrize("rate", ["30000/1001", "24000/1001", "50", "12.5"])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_any_constant_rate_fits_whatever_clock_the_container_has(tmp_path, kind, rate):
    """Matroska rounds to milliseconds: 33.37 ms become 33 or 34."""
    path = pattern(tmp_path / f"a.{kind}", *H264, rate=rate, seconds=8)
    encoded = remux(source(path), Memory(), COPY, MUXER, lambda: None)
    above, _, below = rate.partition("/")
    assert encoded.fps == pytest.approx(float(above) / float(below or 1))


VARIABLE = "select='not(eq(mod(n,7),3))'"
MISFITS = {
    "codec mpeg4": ("a.mp4", ["-c:v", "mpeg4"], {}),
    "codec mjpeg": ("a.mov", ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"], {}),
    "pixel format yuv444p": ("a.mp4", [*H264, "-pix_fmt", "yuv444p"], {}),
    "pixel format yuv420p10le": ("a.mp4", [*H264, "-pix_fmt", "yuv420p10le"], {}),
    "pixel format yuvj420p": ("a.mp4", [*H264, "-pix_fmt", "yuvj420p"], {}),
    "full-range colour": ("a.webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-color_range", "pc"], {}),
    "pixels that are not square": ("a.mp4", [*H264, "-vf", "setsar=4/3"], {}),
    "interlaced": ("a.mp4", [*H264, "-flags", "+ilme+ildct", "-x264-params", "tff=1"], {}),
    "a display rotation": ("turned.mp4", H264, {}),
    "size 96x64": ("a.mp4", H264, {"size": "64x64"}),
    "short side 64": ("a.mp4", H264, {"short_side": 32}),
    "odd size": ("a.webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-vf", "crop=95:63:0:0:exact=1"], {}),
    "frame rate 25": ("a.mp4", H264, {"fps": 12.5}),
    "a variable frame rate": ("a.mp4", [*H264, "-vf", VARIABLE, "-fps_mode", "vfr"], {}),
    "open GOPs": ("a.mp4", ["-c:v", "libx264", "-x264-params", "open-gop=1:keyint=30:bframes=3"], {}),
    "open GOPs (HEVC)": ("a.mp4", [*HEVC, "-x265-params", "keyint=30:log-level=none"], {}),
    "GOPs longer than 30": ("a.mp4", H264, {"gop": 30}),
    "B-frames without time stamps": ("a.avi", H264, {}),
    "frames that are hidden or without a time stamp": ("a.h264", H264, {}),
    "not a whole video file": ("a.mp4", H264, {"start_s": 1.0}),
    "parameter sets that change": ("joined.ts", H264, {}),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_what_does_not_fit_is_encoded_as_if_h264_had_been_asked_for(tmp_path, reason):
    name, options, change = MISFITS[reason]
    path = pattern(tmp_path / name, *options, seconds=2)
    if name == "turned.mp4":
        data = path.read_bytes()
        at = data.index(b"tkhd") + 44
        path.write_bytes(data[:at] + bytes.fromhex("00000000 00010000 00000000 ffff0000") + data[at + 16 :])
    if name == "joined.ts":  # the size changes in one stream, as when a television station switches
        later = pattern(tmp_path / "later.ts", *H264, size="192x128", seconds=2)
        path.rename(tmp_path / "first.ts")
        (tmp_path / "list.txt").write_text(f"file '{tmp_path}/first.ts'\nfile '{later}'\n")
        ffmpeg("-f", "concat", "-safe", "0", "-i", tmp_path / "list.txt", "-c", "copy", path)
    part = {key: change[key] for key in change if key == "start_s"}
    settings = {"short_side": 0, "gop": 300, **{key: change[key] for key in change if key != "start_s"}}
    copied, encoded = Memory(), Memory()
    got = encode(source(path, **part), copied, VideoSettings("copy", **settings))
    assert got.reencoded == reason.partition(" (")[0]
    transcode(source(path, **part), encoded, VideoSettings("h264", **settings))
    assert copied.data == encoded.data and copied.crc32c == encoded.crc32c
    assert got.codec == "h264"


@pytest.mark.parametrize("name", ["a.mp4", "faststart.mp4", "a.mkv", "a.avi", "a.flv"])
def test_a_cut_off_file_is_no_shorter_copy(tmp_path, name):
    options = ["-movflags", "+faststart"] if name == "faststart.mp4" else []
    path = pattern(tmp_path / name, *H264, "-bf", "0", *options)
    data = path.read_bytes()
    for share in (0.5, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(VideoError, match=r"cut off|cannot be read to its end"):
            encode(source(path), Memory(), COPY)


def test_torn_packets_are_not_copied(tmp_path):
    """The second key frame's first NAL unit claims to be longer than its packet."""
    path = pattern(tmp_path / "a.mp4", *H264)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        key = [packet for packet in packets if packet.is_keyframe][1]
    data = bytearray(path.read_bytes())
    data[key.pos : key.pos + 4] = (1 << 20).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(Misfit, match="damaged packets"):
        remux(source(path), Memory(), COPY, MUXER, lambda: None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", ["copy", "h264", "vp9"])
def test_two_hours_stay_in_600_mb(tmp_path, codec):
    path = pattern(tmp_path / "a.mp4", "-preset", "ultrafast", *H264, size="320x240", rate=2, seconds=7200)
    settings = {"copy": 'VideoSettings("copy", 0, gop=300)'}.get(codec, f'VideoSettings("{codec}", 128)')
    script = f"""
import pathlib, re
from genkd.preprocessing.shards import ShardWriter
from genkd.preprocessing.sources import SourceVideo
from genkd.preprocessing.video import VideoSettings, encode
with ShardWriter(pathlib.Path({str(tmp_path / "a.tar")!r})).member("a.mp4") as payload:
    encoded = encode(SourceVideo("a", {str(path)!r}, "train", 0, 0), payload, {settings})
# Of this program alone: what getrusage says counts what the process was before it became this program.
peak = re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(encoded.num_frames, encoded.reencoded, peak[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    frames, reencoded, peak = done.stdout.split()
    assert (frames, reencoded) == ("14400", "None")
    assert int(peak) < 600 << 10  # KiB
