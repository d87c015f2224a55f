import io
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest

from genkd.errors import UserError
from genkd.preprocessing.shards import Payload, gop_table
from genkd.preprocessing.sources import SourceVideo
from genkd.preprocessing.video import VideoError, VideoSettings, decode_frames, transcode


def source(path, **more) -> SourceVideo:
    return SourceVideo("key", str(path), "train", 0, 0, **more)


class Memory(Payload):
    def __init__(self):
        super().__init__(io.BytesIO(), 0)

    @property
    def data(self) -> bytes:
        return self._file.getvalue()


def counting_video(path, frames=40, fps=25, size=(64, 48), codec="mpeg4", times=None, pix_fmt="yuv420p"):
    """Frame n is a grey field of value 40 + 5 n, so that a decoded frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"qmin": "1", "qmax": "2"} if codec == "mpeg4" else {})
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, fps)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), 40 + 5 * (number % 40), np.uint8), format="rgb24"
            )
            frame.pts = times[number] if times else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames) -> list[int]:
    return [round((frame.to_ndarray(format="rgb24").mean() - 40) / 5) for frame in frames]


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_every_frame_survives_in_order_with_closed_gops(tmp_path, codec):
    sink = Memory()
    encoded = transcode(
        source(counting_video(tmp_path / "a.mp4")), sink, VideoSettings(codec, short_side=48, gop=16, crf=10)
    )
    assert (encoded.num_frames, encoded.source_frames, encoded.fps) == (40, 40, 25.0)
    assert (encoded.width, encoded.height) == (64, 48)
    assert encoded.gop_frames == (tuple(range(41)) if codec == "mjpeg" else (0, 16, 32, 40))
    assert numbers(decode_frames(io.BytesIO(sink.data))) == list(range(40))
    header, offsets = gop_table(sink.boxes(), sink.size)
    with av.open(io.BytesIO(sink.data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt in ("yuv420p", "yuvj420p")
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
    assert [number for number, key in enumerate(keys) if key] == list(encoded.gop_frames[:-1])
    # Header and any run of fragments is a video of its own, equal to the whole one's frames bit for bit.
    whole = [frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(sink.data))]
    for first in range(len(offsets) - 1):
        piece = sink.data[:header] + sink.data[offsets[first] : offsets[min(first + 2, len(offsets) - 1)]]
        for got, want in zip(decode_frames(io.BytesIO(piece)), whole[encoded.gop_frames[first] :], strict=False):
            np.testing.assert_array_equal(got.to_ndarray(format="rgb24"), want)


def test_the_same_source_gives_the_same_bytes(tmp_path):
    path = str(counting_video(tmp_path / "a.mp4"))
    first, second = Memory(), Memory()
    for sink in (first, second):
        transcode(source(path), sink, VideoSettings(short_side=48))
    assert first.data == second.data and first.crc32c == second.crc32c


@pytest.mark.parametrize(("fps", "expected"), [(12.5, range(0, 40, 2)), (50.0, np.repeat(range(40), 2))])
def test_fps_picks_or_repeats_frames_by_time(tmp_path, fps, expected):
    sink = Memory()
    settings = VideoSettings("mjpeg", short_side=48, fps=fps, crf=2)
    encoded = transcode(source(counting_video(tmp_path / "a.mp4")), sink, settings)
    assert encoded.fps == fps
    got, expected = numbers(decode_frames(io.BytesIO(sink.data))), list(expected)
    assert abs(len(got) - len(expected)) <= 1
    length = min(len(got), len(expected))
    assert max(abs(a - b) for a, b in zip(got[:length], expected[:length], strict=True)) <= 1


def test_variable_frame_rate_becomes_constant(tmp_path):
    """20 frames 40 ms apart, then 10 frames 120 ms apart: two seconds, whatever the number of frames."""
    times = [40 * n for n in range(20)] + [800 + 120 * n for n in range(10)]
    path = counting_video(tmp_path / "a.mkv", frames=30, times=times, codec="libx264")
    sink = Memory()
    encoded = transcode(source(path), sink, VideoSettings("mjpeg", short_side=48, fps=25.0, crf=2))
    got = numbers(decode_frames(io.BytesIO(sink.data)))
    assert abs(encoded.num_frames - 50) <= 3
    assert got[:20] == list(range(20))
    assert got[20:29] == [20, 20, 20, 21, 21, 21, 22, 22, 22]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((320, 240), 256, (342, 256)), ((240, 320), 256, (256, 342)), ((64, 48), 0, (64, 48)), ((50, 34), 48, (70, 48))],
)
def test_the_short_side_is_as_asked_and_sides_are_even(tmp_path, size, short_side, expected):
    sink = Memory()
    encoded = transcode(
        source(counting_video(tmp_path / "a.mp4", 3, size=size)), sink, VideoSettings(short_side=short_side)
    )
    assert (encoded.width, encoded.height) == expected
    assert next(decode_frames(io.BytesIO(sink.data))).width == expected[0]


def test_a_rate_beyond_reason_is_refused():
    for options in ({"codec": "gif"}, {"short_side": 5}, {"fps": 0.0}, {"gop": 0}, {"crf": 99}, {"preset": "warp"}):
        with pytest.raises(UserError):
            VideoSettings(**options)


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("name", "make", "stage", "words"),
    [
        ("text.mp4", lambda p: p.write_text("this is no video\n" * 50), "open", "not a video"),
        ("empty.mp4", lambda p: p.touch(), "open", "empty"),
        ("gone.mp4", lambda p: p.symlink_to(p.parent / "nowhere"), "open", "link points nowhere"),
        ("audio.mp4", audio_only, "open", "no video stream in the file (it holds audio)"),
        ("zero.avi", no_frames, "decode", "no frame"),
        ("cut.mp4", lambda p: cut(counting_video(p), 0.5), "open", "cut off"),
        ("cut.avi", lambda p: cut(counting_video(p, 100), 0.5), "decode", "cut off or damaged"),
        ("cut.mkv", lambda p: cut(counting_video(p, 100), 0.5), "decode", "cut off or damaged"),
    ],
)
def test_a_source_that_is_no_usable_video_is_told_apart(tmp_path, name, make, stage, words):
    path = tmp_path / name
    make(path)
    with pytest.raises(VideoError) as caught:
        transcode(source(path), Memory(), VideoSettings(short_side=48))
    assert caught.value.stage == stage
    assert words in caught.value.reason


def test_a_video_trimmed_without_encoding_is_taken(tmp_path):
    """FFmpeg keeps the frames before the cut back to the key frame and hides them by an edit list."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs the ffmpeg command")
    path = counting_video(tmp_path / "a.mp4", 100, codec="libx264")
    cut = ["ffmpeg", "-v", "error", "-ss", "2.9", "-i", path, "-c", "copy", tmp_path / "b.mp4"]
    subprocess.run(cut, check=True)
    encoded = transcode(source(tmp_path / "b.mp4"), Memory(), VideoSettings(short_side=48))
    assert 25 <= encoded.num_frames <= 28


@pytest.mark.parametrize("frames", [1, 2, 40])
@pytest.mark.parametrize("name", ["a.flv", "a.mp4", "a.avi"])
def test_the_last_frame_is_kept(tmp_path, name, frames):
    """FLV states no duration for its frames."""
    path = counting_video(tmp_path / name, frames, codec="flv1" if name == "a.flv" else "mpeg4")
    assert transcode(source(path), Memory(), VideoSettings(short_side=48)).num_frames == frames


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["test.avi", "h264_10bits.mp4", "bt709_full_range.mp4", "h265_video.mp4", "nasa_13013.mp4"]
)
def test_real_sources_look_as_ffmpeg_decodes_them(real_data, tmp_path, name):
    """Against FFmpeg's command line with the same scaling to RGB; two encoders' losses aside, frames agree."""
    path = real_data / "clips" / name
    sink = Memory()
    encoded = transcode(source(path), sink, VideoSettings("mjpeg", short_side=0, crf=2))
    ours = np.stack([frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(sink.data))])
    try:
        command = [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            path,
            "-map",
            "0:v:0",
            "-fps_mode",
            "passthrough",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("needs the ffmpeg command")
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, encoded.height, encoded.width, 3)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).mean() < 4.0
