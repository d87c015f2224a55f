"""Packets handed straight to a decoder, against FFmpeg's demuxer in front of it."""

import contextlib
import io

import av
import numpy as np
import pytest

from genkd.pipelines import demux
from genkd.pipelines.pyav import decode_rgb
from genkd.pipelines.store import ClipStore
from genkd.preprocessing import sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.shards import Corrupt, Dataset
from genkd.preprocessing.video import VideoSettings


def pictures(frames):
    return [frame.to_ndarray(format="rgb24") for frame in frames]


def by_ffmpeg(data):
    with av.open(io.BytesIO(data.tobytes())) as container:
        return pictures(container.decode(video=0))


@pytest.fixture(scope="module")
def slices(shard_sets, tmp_path_factory):
    """A function: codec -> slices of several videos; "copy" has B-frames, which are stored in another order."""

    def get(codec):
        if codec == "copy":
            root = tmp_path_factory.mktemp("bframes")
            for name in ("a", "b"):
                (root / name).mkdir()
                _write_b_frames(root / name / "film.mp4")
            out = tmp_path_factory.mktemp("copied") / "data"
            convert(sources.folder(root), out, VideoSettings("copy", short_side=0, gop=300), workers=0)
            dataset = Dataset.open(out)
            assert not dataset.info["reencoded"]
        else:
            dataset = shard_sets(codec)
        store = ClipStore(dataset)
        rows = range(min(4, dataset.table.num_rows))
        return [store.read(dataset.video(row), first, last).data for row in rows for first, last in ((0, 39), (17, 22))]

    return get


def _write_b_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3", "g": "10", "flags": "+cgop"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            picture = np.roll(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8), number, axis=1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "mjpeg", "copy"])
def test_frames_are_those_of_ffmpegs_demuxer_bit_for_bit(slices, codec):
    for data in slices(codec):
        ours, theirs = pictures(demux.decode_slice(data)), by_ffmpeg(data)
        assert len(ours) == len(theirs) > 0
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_decoder_that_was_left_in_the_middle_starts_afresh(slices):
    first, second = slices("h264")[:2]
    want = by_ffmpeg(second)
    with contextlib.closing(demux.decode_slice(first)) as frames:
        next(frames)
        other = pictures(demux.decode_slice(second))  # while the first is still under way
    again = pictures(demux.decode_slice(second))  # by the decoder that was left
    for got in (other, again):
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_few_decoders_are_kept(slices):
    demux._decoders().clear()
    for _ in range(3):
        for codec in ("h264", "vp9", "mjpeg"):
            for data in slices(codec):
                list(demux.decode_slice(data))
    assert len(demux._decoders()) == 3


def test_other_containers_go_by_ffmpegs_demuxer(videos):
    (path, *_) = sorted((videos / "UCF-101" / "Bob").iterdir())
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with pytest.raises(demux.Unknown):
        next(demux.decode_slice(data))
    assert np.array_equal(decode_rgb(data, [3]), np.stack(by_ffmpeg(data)[3:4]))


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_any_damage_is_a_sentence(slices, codec):
    """Random bytes written over the boxes: an error of this project, or frames; never anything else, never endless."""
    data = slices(codec)[0]
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = data[: int(random.integers(1, len(data)))].copy() if random.random() < 0.3 else data.copy()
        for _ in range(int(random.integers(1, 6))):
            damaged[int(random.integers(min(1500, len(damaged))))] = random.integers(256)
        with contextlib.suppress(Corrupt):
            decode_rgb(damaged, [2])
    assert np.array_equal(decode_rgb(data, [2])[0], by_ffmpeg(data)[2])
