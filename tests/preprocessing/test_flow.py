import io
import itertools
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from genkd.errors import UserError
from genkd.preprocessing.convert import convert
from genkd.preprocessing.decoding import rgb_frames
from genkd.preprocessing.flow import METHODS, FlowEstimator, FlowSettings, dequantize, quantize
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Dataset, Payload, gop_table
from genkd.preprocessing.sources import SourceVideo
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoError, decode_frames


class Memory(Payload):
    def __init__(self):
        super().__init__(io.BytesIO(), 0)

    @property
    def data(self) -> bytes:
        return self._file.getvalue()


def source(path, **more) -> SourceVideo:
    return SourceVideo("key", str(path), "train", 0, 0, **more)


def texture(dx: float, dy: float, size=(96, 64)) -> np.ndarray:
    """A smooth random picture whose content lies (dx, dy) pixels to the right and below, uint8 (H,W)."""
    width, height = size
    noise = np.random.default_rng(0).uniform(0, 255, (height + 80, width + 80)).astype(np.float32)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    moved = cv2.warpAffine(smooth, np.float32([[1, 0, dx - 40], [0, 1, dy - 40]]), size, flags=cv2.INTER_CUBIC)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


def moving_video(path, frames=12, step=(2.0, -1.0), size=(96, 64), fps=25):
    """The texture, moved by `step` pixels from frame to frame, all but losslessly stored."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            image = texture(number * step[0], number * step[1], size)
            frame = av.VideoFrame.from_ndarray(np.repeat(image[..., None], 3, 2), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def stored(sink: Memory) -> np.ndarray:
    """What an ordinary decoder's RGB says: levels (T,H,W,2), x from the left half, y from the right one."""
    images = np.stack([frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(sink.data))])
    np.testing.assert_array_equal(images.max(-1), images.min(-1))  # grey
    return np.stack(np.split(images[..., 0], 2, axis=2), -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [(0, 0), (1, 0), (0, 1), (2.5, -1.5), (-4, 3)])
def test_known_motion(method, step):
    flow = FlowEstimator(method).flow(texture(0, 0), texture(*step))
    assert flow.dtype == np.float32 and flow.shape == (64, 96, 2)
    inside = flow[12:-12, 12:-12]
    np.testing.assert_allclose(np.median(inside, (0, 1)), step, atol=0.1)
    assert np.abs(inside - np.float32(step)).mean() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_an_estimator_remembers_nothing(method):
    estimator = FlowEstimator(method)
    first = estimator.flow(texture(0, 0), texture(2, 1))
    estimator.flow(texture(5, 0), texture(0, 5))
    np.testing.assert_array_equal(estimator.flow(texture(0, 0), texture(2, 1)), first)


@pytest.mark.parametrize("method", METHODS)
def test_pictures_without_texture_have_no_flow(method):
    flat = np.full((48, 64), 100, np.uint8)
    np.testing.assert_array_equal(FlowEstimator(method).flow(flat, flat), np.zeros((48, 64, 2), np.float32))


def test_quantize_is_the_published_line():
    # (v + 20) * 255 / 40: -20 is 0, 20 is 255, 1 is 133.875, -1 is 121.125, 0 is 127.5.
    flow = np.float32([-np.inf, -25, -20, -1, 0, 1, 20, 25, np.inf])
    levels = quantize(flow)
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, [0, 0, 0, 121, 128, 134, 255, 255, 255])
    np.testing.assert_allclose(dequantize(levels)[[2, 4, 6]], [-20, 20 / 255, 20], rtol=1e-5)
    assert dequantize(levels).dtype == np.float32


@pytest.mark.parametrize("bound", [0.1, 7.0, 15.0, 20.0, 1000.0])
def test_levels_survive_and_flow_is_off_by_half_a_level_at_most(bound):
    levels = np.arange(256, dtype=np.uint8).reshape(2, 64, 2)
    np.testing.assert_array_equal(quantize(dequantize(levels, bound), bound), levels)
    assert quantize(np.zeros((1, 2), np.float32), bound).tolist() == [[128, 128]]
    flow = np.random.default_rng(1).uniform(-bound, bound, (50, 2)).astype(np.float32)
    assert np.abs(dequantize(quantize(flow, bound), bound) - flow).max() <= bound / 255 * 1.0001


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "mjpeg"])
def test_stored_flow_is_the_computed_one(tmp_path, codec):
    video = source(moving_video(tmp_path / "a.mp4", frames=20))
    sink, written = Memory(), []
    settings = FlowSettings("farneback", codec=codec, gop=8)
    encoded = settings.encode(video, sink, lambda: written.append(1))
    assert (encoded.num_frames, encoded.source_frames, len(written)) == (20, 20, 20)
    assert (encoded.width, encoded.height, encoded.fps, encoded.codec) == (192, 64, 25.0, codec)
    assert encoded.gop_frames == (tuple(range(21)) if codec == "mjpeg" else (0, 8, 16, 20))
    assert len(gop_table(sink.boxes(), sink.size)[1]) == len(encoded.gop_frames)
    got = dequantize(stored(sink))
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in rgb_frames(video)]
    pairs = [*itertools.pairwise(greys), (greys[-2], greys[-1])]
    want = np.stack([FlowEstimator("farneback").flow(*pair) for pair in pairs])
    assert got.shape == want.shape
    assert np.abs(got - want).mean() < 0.25
    np.testing.assert_allclose(np.median(got[:, 12:-12, 12:-12], (0, 1, 2)), [2, -1], atol=0.2)


@pytest.mark.parametrize(("codec", "frames"), [("h264", 1), ("vp9", 1), ("mjpeg", 1), ("h264", 2), ("mjpeg", 2)])
def test_shortest_videos(tmp_path, codec, frames):
    sink = Memory()
    video = source(moving_video(tmp_path / "a.mp4", frames))
    encoded = FlowSettings("dis", codec=codec, crf=1).encode(video, sink)
    assert encoded.num_frames == frames and encoded.gop_frames[-1] == frames
    levels = stored(sink)
    if frames == 1:
        np.testing.assert_array_equal(levels, np.full((1, 64, 96, 2), 128))
    else:  # the only flow stands twice
        assert np.abs(levels[0].astype(int) - levels[1]).mean() < 1
        np.testing.assert_allclose(np.median(dequantize(levels), (0, 1, 2)), [2, -1], atol=0.2)


def test_flow_is_that_of_the_scaled_frames(tmp_path):
    video = source(moving_video(tmp_path / "a.mp4", frames=6, step=(4, -2), size=(192, 128)))
    sink = Memory()
    encoded = FlowSettings("dis", codec="mjpeg", short_side=64).encode(video, sink)
    assert (encoded.width, encoded.height) == (192, 64)
    np.testing.assert_allclose(np.median(dequantize(stored(sink)), (0, 1, 2)), [2, -1], atol=0.2)


def test_frames_are_written_while_they_are_read(tmp_path, monkeypatch):
    events = []
    compute = FlowEstimator.flow
    monkeypatch.setattr(FlowEstimator, "flow", lambda *pair: events.append("flow") or compute(*pair))
    video = source(moving_video(tmp_path / "a.mp4", frames=6))
    FlowSettings("dis").encode(video, Memory(), lambda: events.append("write"))
    assert events == [*["flow", "write"] * 5, "write"]


def test_opencv_threads_are_as_before(tmp_path):
    before = cv2.getNumThreads()
    during = []
    video = source(moving_video(tmp_path / "a.mp4", frames=2))
    FlowSettings("dis").encode(video, Memory(), lambda: during.append(cv2.getNumThreads()))
    assert during == [1, 1] and cv2.getNumThreads() == before


def test_a_flow_data_set_has_the_rgb_one_s_index(shard_sets, tmp_path, content):
    rgb = shard_sets("h264")
    everything = dataset_sources(rgb)
    some = replace(everything, videos=everything.videos[::4])
    for workers in (0, 2):
        convert(some, tmp_path / f"flow{workers}", FlowSettings("farneback", gop=8), workers=workers)
    assert content(tmp_path / "flow0") == content(tmp_path / "flow2")
    flow, rgb_table = Dataset.open(tmp_path / "flow2"), rgb.table.take(list(range(0, rgb.table.num_rows, 4)))
    assert flow.classes == rgb.classes and flow.info["modality"] == "flow"
    assert set(flow.info["splits"]) == {"train", "test"}
    # Equal GOPs too: the frames of a clip lie in the same GOPs of both.
    for name in ("key", "split", "label", "annotations", "num_frames", "gop_frames", "fps", "height"):
        assert flow.table[name].to_pylist() == rgb_table[name].to_pylist(), name
    assert flow.table["width"].to_pylist() == [2 * width for width in rgb_table["width"].to_pylist()]
    assert verify(tmp_path / "flow2", workers=0) == []


def short_of_data(path):
    moving_video(path, frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "stage", "words"),
    [
        ("text.mp4", lambda path: path.write_text("this is no video\n" * 50), "open", "not a video"),
        ("cut.avi", short_of_data, "decode", "cut off or damaged"),
        ("small.mp4", lambda path: moving_video(path, 3, size=(8, 8)), "encode", "no dis flow of frames of 8x8"),
        ("flow.npy", lambda path: np.save(path, np.zeros((3, 48, 64, 2), np.uint8)), "open", "holds flow already"),
    ],
)
def test_sources_without_flow_say_why(tmp_path, name, make, stage, words):
    make(tmp_path / name)
    with pytest.raises(VideoError) as caught:
        FlowSettings("dis").encode(source(tmp_path / name, fps=10.0), Memory())
    assert caught.value.stage == stage and words in caught.value.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "raft"}, "unknown flow method 'raft'; there are tvl1, dis, farneback"),
        ({"bound": 0}, "bound 0 "),
        ({"bound": float("nan")}, "bound nan "),
        ({"codec": "copy"}, "flow cannot be stored as 'copy'; there are h264, hevc, vp9, mjpeg"),
        ({"gop": 0}, "gop 0 "),
        ({"crf": 64}, "crf 64 "),
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"short_side": 5}, "short side 5 "),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        FlowSettings(**options)


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="unknown flow method 'lucas'"):
        FlowEstimator("lucas")
