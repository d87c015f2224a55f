"""Decoded frames against FFmpeg's command line, an older and separate build of the decoders, and against arithmetic."""

import math
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest

from genkd.preprocessing.decoding import VideoError, open_frames, rgb_frames
from genkd.preprocessing.sources import SourceVideo

pytestmark = pytest.mark.ffmpeg


def source(path, **more) -> SourceVideo:
    return SourceVideo("key", str(path), "train", 0, 0, **more)


def ffmpeg(*arguments) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True).stdout


def pattern(path, *options, size="96x64", rate=25, seconds=1.0):
    """FFmpeg's moving test picture, encoded as `options` say."""
    picture = f"testsrc2=s={size}:r={rate}:d={seconds}"
    ffmpeg("-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p", *options, path)
    return path


def ours(path, **more) -> np.ndarray:
    return np.stack(list(rgb_frames(source(path, **more))))


def theirs(path, model: np.ndarray, filters=None, stream="0:v:0") -> np.ndarray:
    """What the command line decodes, in frames of the model's size."""
    chosen = ["-vf", filters] if filters else []
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(ffmpeg("-i", path, "-map", stream, *chosen, *raw), np.uint8).reshape(-1, *model.shape[1:])


def assert_same(path, filters=None, **more) -> np.ndarray:
    got = ours(path, **more)
    np.testing.assert_array_equal(got, theirs(path, got, filters))
    return got


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "frames"),  # as the files' own packets count them
    [
        ("S001C001P001R001A001_rgb.avi", 12),  # 1080p: the first ones do
        ("av1_video.mkv", 125),
        ("bt709_full_range.mp4", 30),
        ("demo.mp4", 280),
        ("h264_10bits.mp4", 30),
        ("h265_video.mp4", 10),
        ("test.avi", 164),
        ("test.mp4", 300),
    ],
)
def test_real_clips_decode_bit_for_bit(real_data, name, frames):
    """Both AVI files hold B-frames, whose presentation times that container does not know."""
    path = real_data / "clips" / name
    if frames == 12:
        got = ours(path, end_s=0.4)
        assert len(got) == 12
        np.testing.assert_array_equal(got, theirs(path, got, "select=lt(n\\,12)"))
    else:
        assert len(assert_same(path)) == frames


@pytest.mark.real
def test_the_best_of_several_streams_is_taken(real_data):
    """torchcodec's test/utils.py publishes for NASA_VIDEO: stream 3, 480x270, 390 frames at 29.97 a second."""
    path = real_data / "clips" / "nasa_13013.mp4"
    with open_frames(source(path)) as frames:
        assert (frames.first.width, frames.first.height) == (480, 270)
        assert float(frames.rate) == pytest.approx(29.97003)
    got = ours(path)
    assert got.shape == (390, 270, 480, 3)
    np.testing.assert_array_equal(got, theirs(path, got, stream="0:3"))


def turned(path, matrix):
    """path with a 2x2 display matrix (a, b, c, d) in its track header, ISO/IEC 14496-12 section 8.3.2."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * value for value in matrix)
    out = path.with_name("turned.mp4")
    out.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    return out


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
     (0, -1, -1, 0)],
)  # fmt: skip
def test_all_eight_display_matrices_turn_the_picture_as_the_standard_says(tmp_path, matrix):
    """A pixel (x, y) is shown at (a x + c y, b x + d y), moved back to the origin."""
    plain = pattern(tmp_path / "a.mp4", "-c:v", "libx264", seconds=0.2)
    base = ours(plain)
    got = assert_same(turned(plain, matrix))
    a, b, c, d = matrix
    y, x = np.mgrid[: base.shape[1], : base.shape[2]]
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.empty_like(got)
    expected[:, to_y - to_y.min(), to_x - to_x.min()] = base
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("first", ["top", "bottom"])
@pytest.mark.parametrize("codec", ["mpeg2video", "libx264", "mpeg4"])
def test_interlaced_pictures_are_deinterlaced(tmp_path, codec, first):
    path = tmp_path / "a.mkv"
    options = ["-x264-params", f"{first[0]}ff=1"] if codec == "libx264" else ["-q:v", "2"]
    weave = f"tinterlace=interleave_{first},setfield={first[0]}ff"
    pattern(path, "-vf", weave, "-flags", "+ilme+ildct", "-c:v", codec, *options, size="160x120", rate=50)
    filters = "bwdif=mode=send_frame:parity=auto:deint=interlaced"
    with open_frames(source(path)) as frames:
        assert frames.first.interlaced_frame
    got = ours(path)
    expected = theirs(path, got, filters)
    assert got.shape == expected.shape == (25, 120, 160, 3)
    np.testing.assert_array_equal(got[1:], expected[1:])
    np.testing.assert_array_equal(got[0, 8:-8], expected[0, 8:-8])  # FFmpeg 7 changed the first picture's rim
    assert np.abs(got - theirs(path, got).astype(int)).mean() > 1


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video", "libx264", "libx265", "mpeg4", "ffv1"])
def test_progressive_pictures_pass_the_deinterlacer_untouched(tmp_path, codec):
    assert len(assert_same(pattern(tmp_path / "a.mkv", "-c:v", codec, size="160x120"))) == 25


@pytest.mark.parametrize(
    ("size", "pixels", "codec"),
    [
        ("97x63", "yuv444p", "libx264"),
        ("97x63", "yuv420p", "ffv1"),
        ("96x64", "yuv422p10le", "libx264"),
        ("96x64", "yuv420p10le", "libx265"),
        ("33x17", "gray", "ffv1"),
        ("33x17", "bgra", "ffv1"),
        ("96x64", "yuvj422p", "mjpeg"),
    ],
)
def test_odd_sizes_and_pixel_formats(tmp_path, size, pixels, codec):
    path = tmp_path / "a.mkv"
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=10:d=0.5", "-pix_fmt", pixels, "-c:v", codec, path)
    assert len(assert_same(path)) == 5


def cover(path, *maps):
    picture, film = path.with_name("cover.jpg"), path.with_name("film.mp4")
    pattern(picture, "-frames:v", "1", size="640x480")
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=96x64:r=10:d=1", "-f", "lavfi", "-i", "sine=d=1",
        "-c:v", "libx264", "-pix_fmt", "yuv420p", film,
    )  # fmt: skip
    ffmpeg("-i", picture, "-i", film, *maps, "-c", "copy", "-disposition:v:0", "attached_pic", path)
    return path


def test_a_cover_picture_is_not_the_video(tmp_path):
    got = ours(cover(tmp_path / "a.mp4", "-map", "0", "-map", "1"))
    assert got.shape == (10, 64, 96, 3)
    film, attached = tmp_path / "film.mp4", tmp_path / "a.mkv"
    ffmpeg(
        "-i", film, "-attach", tmp_path / "cover.jpg", "-metadata:s:t", "mimetype=image/jpeg", "-c", "copy", attached
    )
    np.testing.assert_array_equal(ours(attached), got)
    with pytest.raises(VideoError, match=r"no video stream in the file \(it holds audio, cover picture\)"):
        ours(cover(tmp_path / "b.mp4", "-map", "0", "-map", "1:a"))


@pytest.mark.parametrize("kind", ["ts", "h264", "mpg"])
def test_a_change_of_resolution_keeps_every_frame(tmp_path, kind):
    """Two streams one after the other, as a recorder writes them; time begins anew with the second."""
    codec = ["-c:v", "mpeg2video"] if kind == "mpg" else ["-c:v", "libx264"]
    parts = [pattern(tmp_path / f"{size}.{kind}", *codec, size=size, seconds=2) for size in ("96x64", "192x128")]
    path = tmp_path / f"joined.{kind}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    got = ours(path)
    # FFmpeg's MPEG-2 decoder loses the picture that it holds back where the size changes.
    assert len(got) == (99 if kind == "mpg" else 100)
    np.testing.assert_array_equal(got[:49], theirs(parts[0], got)[:49])
    with open_frames(source(path)) as frames:
        times, luma = zip(*((frame.pts, frame.to_ndarray()[:64]) for frame in frames), strict=True)
    scaled = ["-vf", "scale=96:64:flags=bicubic", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "yuv420p"]
    joined = np.frombuffer(ffmpeg("-i", path, *scaled, "-"), np.uint8).reshape(-1, 96, 96)[:, :64]
    np.testing.assert_array_equal(luma, joined)
    assert np.ptp(np.diff(times)) <= 0.01 / frames.time_base


def test_a_change_of_shape_is_refused(tmp_path):
    parts = [pattern(tmp_path / f"{size}.ts", "-c:v", "libx264", size=size) for size in ("96x64", "64x96")]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match="shape changes from 96x64 to 64x96"):
        ours(tmp_path / "joined.ts")


CUTS = {
    "a.mp4": ["-c:v", "libx264", "-g", "50"],
    "open.mkv": ["-c:v", "libx264", "-x264-params", "open-gop=1:keyint=30:bframes=3"],
    "fragments.mp4": ["-c:v", "libx264", "-g", "50", "-movflags", "frag_keyframe+empty_moov"],
    "open.mp4": ["-c:v", "libx265", "-x265-params", "keyint=30:log-level=none"],
    "a.ts": ["-c:v", "libx264", "-g", "40"],
    "a.avi": ["-c:v", "mpeg4", "-g", "30", "-bf", "2"],
    "h264.avi": ["-c:v", "libx264", "-g", "30"],
    "a.webm": ["-c:v", "libvpx-vp9", "-g", "30", "-deadline", "realtime", "-cpu-used", "8"],
    "a.mpg": ["-c:v", "mpeg2video", "-g", "15", "-bf", "2"],
    "a.flv": ["-c:v", "flv1"],
    "a.h264": ["-c:v", "libx264", "-g", "30"],
    "a.wmv": ["-c:v", "wmv2", "-g", "30"],
    "a.ogv": ["-c:v", "libtheora", "-g", "30"],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_part_is_cut_to_the_frame(tmp_path, name):
    """Kinetics' start and end; the same frames as FFmpeg's trim filter takes, which decodes from the beginning."""
    path = pattern(tmp_path / name, *CUTS[name], seconds=4)
    whole = theirs(path, ours(path))
    assert len(whole) == 100
    for start, end in ((2.98, 3.3), (0.02, 0.5), (3.5, 9.0)):
        got = ours(path, start_s=start, end_s=end)
        if name.endswith(".avi"):  # FFmpeg counts the decoder's delay as time
            expected = whole[math.ceil(start * 25) : math.ceil(end * 25)]
        else:
            expected = theirs(path, got, f"trim=start={start}:end={end}")
        np.testing.assert_array_equal(got, expected)
    for start, end, words in (
        (20.0, None, "from 20 s to its end"),
        (20, 22, "from 20 s to 22 s"),
        (2, 1, "from 2 s to 1 s"),
    ):
        with pytest.raises(VideoError, match=f"no frame {words}; read as far as"):
            ours(path, start_s=start, end_s=end)


def jpegs(folder, count=10):
    folder.mkdir()
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        f"testsrc2=s=96x64:r=10:d={count / 10}",
        "-q:v",
        "2",
        f"{folder}/image_%05d.jpg".replace("100%", "100%%"),
    )
    return folder


def test_a_folder_of_frames(tmp_path):
    folder = jpegs(tmp_path / "100%d frames")
    single = [ours(path, fps=10.0)[0] for path in sorted(folder.iterdir())]
    got = ours(folder, fps=10.0)
    assert got.shape == (10, 64, 96, 3)
    np.testing.assert_array_equal(got, single)
    np.testing.assert_array_equal(ours(folder, fps=10.0, start_s=0.3, end_s=0.6), single[3:6])
    with pytest.raises(VideoError, match="state no frame rate"):
        ours(folder)
    (folder / "image_00004.jpg").unlink()
    with pytest.raises(VideoError, match=r"image_00004\.jpg is missing; 9 frames are there"):
        ours(folder, fps=10.0)
    os.mkfifo(folder / "image_00004.jpg")
    with pytest.raises(VideoError, match=r"image_00004.jpg is no file"):
        ours(folder, fps=10.0)
    with pytest.raises(VideoError, match="without frames"):
        (tmp_path / "none").mkdir()
        ours(tmp_path / "none", fps=10.0)


def test_an_array_of_frames(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    np.save(tmp_path / "rgb.npy", rgb)
    np.testing.assert_array_equal(ours(tmp_path / "rgb.npy", fps=10.0), rgb)
    np.save(tmp_path / "flow.npy", rgb[..., :2])
    flow = ours(tmp_path / "flow.npy", fps=10.0)
    np.testing.assert_array_equal(flow[..., 0], np.concatenate([rgb[..., 0], rgb[..., 1]], 2))
    with pytest.raises(VideoError, match="state no frame rate"):
        ours(tmp_path / "rgb.npy")
    for number, array in enumerate([rgb[0], rgb.astype(np.float32), rgb[:0], np.zeros((2, 4, 4, 1), np.uint8)]):
        np.save(tmp_path / f"{number}.npy", array)
        with pytest.raises(VideoError, match="an array of"):
            ours(tmp_path / f"{number}.npy", fps=10.0)
    data = (tmp_path / "rgb.npy").read_bytes()
    np.savez(tmp_path / "zipped.npz", rgb)
    bad = [b"", data[:50], data[:-1], (tmp_path / "zipped.npz").read_bytes(), data.replace(b"(5, 32", b"(9" + b"9" * 3)]
    for content in bad:
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(VideoError, match=r"not a readable|empty"):
            ours(tmp_path / "bad.npy", fps=10.0)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_a_span_inside_a_larger_file(tmp_path, name):
    path = pattern(tmp_path / name, "-c:v", "libx264", seconds=3)
    data = path.read_bytes()
    larger = tmp_path / "larger.tar"
    larger.write_bytes(b"x" * 1000 + data + data[:5000])
    expected = ours(path)
    assert len(expected) == 75
    np.testing.assert_array_equal(ours(larger, span=(1000, len(data))), expected)
    np.testing.assert_array_equal(
        ours(larger, span=(1000, len(data)), start_s=2.0, end_s=2.5), ours(path, start_s=2.0, end_s=2.5)
    )
    with pytest.raises(VideoError):
        ours(larger, span=(0, 900))


def test_what_is_no_file_is_told_apart_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.npy").symlink_to("nowhere")
    for name, words in (
        ("pipe.mp4", "a pipe"),
        ("pipe.npy", "a pipe"),
        ("loop.mp4", "symbolic links"),
        ("gone.npy", "nowhere"),
    ):
        with pytest.raises(VideoError, match=words):
            ours(tmp_path / name, fps=10.0)


@pytest.mark.parametrize(
    "name", ["new\nline.mp4", "tab\t.mp4", "50%d.mp4", "-i.mp4", os.fsdecode(b"caf\xe9.mp4"), "file:a.mp4"]
)
def test_names_reach_ffmpeg_as_they_are(tmp_path, name):
    plain = pattern(tmp_path / "a.mp4", "-c:v", "libx264", seconds=0.2)
    odd = tmp_path / "odd" / name
    odd.parent.mkdir()
    shutil.copy(plain, odd)
    assert len(ours(odd)) == 5


def test_nonsense_in_headers_is_refused_early(tmp_path):
    (tmp_path / "huge.y4m").write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1\nFRAME\n" + bytes(10_000))
    with pytest.raises(VideoError, match="16000x16000"):
        ours(tmp_path / "huge.y4m")
    # One frame lasts ten hours: a constant frame rate would repeat it 900,000 times.
    long = pattern(tmp_path / "long.mkv", "-c:v", "libx264", "-vf", "setpts='PTS+if(gt(N,20),36000/TB,0)'", seconds=1)
    with pytest.raises(VideoError, match="damaged time stamps: 22 frames in 36001 seconds"):
        ours(long)
