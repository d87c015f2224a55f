import io
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


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "mjpeg"])
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
        assert not stream.codec_context.has_b_frames
        if codec == "hevc":
            assert stream.codec_context.codec_tag == "hvc1"  # ISO/IEC 14496-15: parameter sets in the header only
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
    assert [number for number, key in enumerate(keys) if key] == list(encoded.gop_frames[:-1])
    # Header and any run of fragments is a video of its own, equal to the whole one's frames bit for bit.
    whole = [frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(sink.data))]
    for first in range(len(offsets) - 1):
        last = min(first + 2, len(offsets) - 1)
        piece = sink.data[:header] + sink.data[offsets[first] : offsets[last]]
        got = [frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(piece))]
        np.testing.assert_array_equal(got, whole[encoded.gop_frames[first] : encoded.gop_frames[last]])


@pytest.mark.ffmpeg
@pytest.mark.parametrize(("codec", "times"), [("h264", 40), ("hevc", 5), ("vp9", 5), ("mjpeg", 2)])
def test_the_same_source_gives_the_same_bytes(tmp_path, codec, times):
    """x264's macroblock tree gives other bytes in one of twenty runs over this picture, where there is AVX-512."""
    path, picture = tmp_path / "a.h264", "testsrc2=s=96x64:r=25:d=2"
    make = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        picture,
        "-pix_fmt",
        "yuv420p",
        "-c:v",
        "libx264",
        "-g",
        "40",
        path,
    ]
    subprocess.run(make, check=True)
    settings = VideoSettings(codec, short_side=0, gop=300)
    payloads = set()
    for _ in range(times):
        sink = Memory()
        transcode(source(path), sink, settings)
        payloads.add(sink.data)
    assert len(payloads) == 1


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
    [
        ((320, 240), 256, (336, 256)), ((240, 320), 256, (256, 336)),  # whole blocks, for NVDEC
        ((320, 240), 250, (334, 250)), ((64, 48), 0, (64, 48)), ((50, 34), 48, (70, 48)),
    ],
)  # fmt: skip
def test_the_short_side_is_as_asked_and_sides_are_even_or_whole_blocks(tmp_path, size, short_side, expected):
    sink = Memory()
    encoded = transcode(
        source(counting_video(tmp_path / "a.mp4", 3, size=size)), sink, VideoSettings(short_side=short_side)
    )
    assert (encoded.width, encoded.height) == expected
    assert next(decode_frames(io.BytesIO(sink.data))).width == expected[0]


def test_a_rate_beyond_reason_is_refused():
    for options in ({"codec": "gif"}, {"short_side": 5}, {"fps": 0.0004}, {"gop": 0}, {"crf": 99}, {"preset": "warp"}):
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


@pytest.mark.ffmpeg
def test_a_video_trimmed_without_encoding_is_taken(tmp_path):
    """FFmpeg keeps the frames before the cut back to the key frame and hides them by an edit list."""
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


def ffmpeg_yuv(path, filters, size, stream="0:v:0", pixels="yuv420p"):
    """Luma and chroma planes as FFmpeg's command line filters them, uint8 (T, H * 3/2, W)."""
    command = ["ffmpeg", "-v", "error", "-i", path, "-map", stream, "-vf", filters, "-fps_mode", "passthrough",
               "-f", "rawvideo", "-pix_fmt", pixels, "-"]  # fmt: skip
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, size[1] * 3 // 2, size[0])


@pytest.mark.real
@pytest.mark.ffmpeg
@pytest.mark.parametrize("codec", ["h264", pytest.param("hevc", marks=pytest.mark.slow), "vp9", "mjpeg"])
@pytest.mark.parametrize(
    ("name", "size"),  # the short side is 96; demo.mp4 and test.mp4 have pixels that are not square
    [
        ("S001C001P001R001A001_rgb.avi", (170, 96)),
        ("av1_video.mkv", (170, 96)),
        ("bt709_full_range.mp4", (170, 96)),
        ("demo.mp4", (160, 96)),
        ("h264_10bits.mp4", (96, 96)),
        ("h265_video.mp4", (96, 96)),
        ("nasa_13013.mp4", (170, 96)),
        ("test.avi", (128, 96)),
        ("test.mp4", (170, 96)),
    ],
)
def test_real_sources_are_stored_as_ffmpeg_shows_them(real_data, name, size, codec):
    """Every frame, at its place, in BT.601: what differs from FFmpeg's filters is the last encoding's loss."""
    path, seconds = real_data / "clips" / name, 0.4 if name.startswith("S001") else 1.0
    sink = Memory()
    settings = VideoSettings(codec, short_side=96, crf=2, preset="ultrafast")
    encoded = transcode(source(path, end_s=seconds), sink, settings)
    assert (encoded.width, encoded.height, encoded.num_frames) == (*size, round(seconds * encoded.fps))
    ours = np.stack([frame.to_ndarray() for frame in decode_frames(io.BytesIO(sink.data))])
    full = codec == "mjpeg"
    filters = (
        f"fps={Fraction(encoded.fps).limit_denominator(1001)},scale={size[0]}:{size[1]}:flags=bicubic+accurate_rnd"
        f":out_color_matrix=bt601:out_range={'full' if full else 'limited'}"
    )
    stream, pixels = "0:3" if name.startswith("nasa") else "0:v:0", "yuvj420p" if full else "yuv420p"
    theirs = ffmpeg_yuv(path, filters, size, stream, pixels)[: len(ours)]
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference[:, : size[1]].mean() < 1.5 and difference[:, size[1] :].mean() < 1.5


@pytest.mark.ffmpeg
@pytest.mark.parametrize("fps", [10, 25, 30, 50])
def test_of_a_variable_frame_rate_the_same_frames_are_chosen_as_by_ffmpeg(tmp_path, fps):
    times = np.cumsum(np.random.default_rng(0).choice([8, 20, 40, 41, 130], 40)).tolist()
    path = counting_video(tmp_path / "a.mkv", frames=40, times=times, codec="libx264")
    sink = Memory()
    transcode(source(path), sink, VideoSettings("mjpeg", short_side=0, fps=fps, crf=2))
    expected = ffmpeg_yuv(path, f"fps={fps},scale=out_range=full", (64, 48), pixels="yuvj420p")[:, :48].mean((1, 2))
    got = [frame.to_ndarray()[:48].mean() for frame in decode_frames(io.BytesIO(sink.data))]
    assert abs(len(got) - len(expected)) <= 1  # how long the last frame lasts, the container does not say
    length = min(len(got), len(expected))
    np.testing.assert_allclose(got[:length], expected[:length], atol=1.5)  # frames are 5 levels apart


@pytest.mark.parametrize(
    ("codec", "crf", "words"),
    [
        ("h264", 0, "crf 0 is not between 1 and 51, as h264 has it"),
        ("h264", 52, "crf 52 is not between 1 and 51"),
        ("copy", 0, "crf 0 is not between 1 and 51, as copy has it"),
        ("hevc", 52, "crf 52 is not between 0 and 51"),
        ("vp9", 64, "crf 64 is not between 0 and 63"),
    ],
)
def test_quality_has_the_limits_of_its_codec(codec, crf, words):
    with pytest.raises(UserError, match=words):
        VideoSettings(codec, crf=crf)


@pytest.mark.parametrize(("codec", "crf", "profile"), [("h264", 1, "High"), ("hevc", 0, "Main")])
def test_the_best_quality_has_a_profile_that_gpus_decode(tmp_path, codec, crf, profile):
    sink = Memory()
    transcode(source(counting_video(tmp_path / "a.mp4")), sink, VideoSettings(codec, short_side=48, crf=crf))
    with av.open(io.BytesIO(sink.data)) as container:
        assert container.streams.video[0].profile == profile
