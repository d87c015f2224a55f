import io

import numpy as np
import pytest

from genkd.pipelines.pyav import decode_rgb
from genkd.pipelines.store import ClipStore
from genkd.preprocessing.shards import Corrupt
from genkd.preprocessing.video import decode_frames


def whole(dataset, video):
    with open(dataset.path / "shards" / video.shard, "rb") as file:
        file.seek(video.offset)
        return file.read(video.size)


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 39), (7, 8), (8, 15), (13, 30), (39, 39)])
def test_a_range_decodes_to_the_same_frames_as_the_whole_video(shard_sets, codec, first, last):
    dataset = shard_sets(codec)
    video = dataset.video(11)
    data, base = ClipStore(dataset).read(video, first, last)
    want = [frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(whole(dataset, video)))]
    got = [frame.to_ndarray(format="rgb24") for frame in decode_frames(io.BytesIO(data.tobytes()))]
    assert base <= first and base + len(got) > last
    for offset, frame in enumerate(got):
        np.testing.assert_array_equal(frame, want[base + offset])


def test_only_the_gops_of_the_range_are_read(shard_sets):
    dataset = shard_sets("vp9")
    video = dataset.video(0)
    data, base = ClipStore(dataset).read(video, 17, 22)
    assert base == 16
    assert len(data) == video.header_size + video.gop_offsets[3] - video.gop_offsets[2]


def test_frames_come_in_the_order_asked_for_with_repeats(shard_sets):
    dataset = shard_sets("mjpeg")
    video = dataset.video(4)
    data, _ = ClipStore(dataset).read(video, 0, 39)
    every = decode_rgb(data, range(40))
    assert every.shape == (40, 48, 64, 3) and every.dtype == np.uint8
    np.testing.assert_array_equal(decode_rgb(data, [30, 2, 2, 17]), every[[30, 2, 2, 17]])


def test_frames_that_do_not_exist_are_an_error(data):
    video = data.video(0)
    store = ClipStore(data)
    for first, last in ((-1, 3), (3, 2), (0, 40)):
        with pytest.raises(IndexError):
            store.read(video, first, last)
    clip, _ = store.read(video, 0, 7)
    with pytest.raises(Corrupt, match="frame 9"):
        decode_rgb(clip, [9])
    with pytest.raises(Corrupt):
        decode_rgb(np.zeros(100, np.uint8), [0])
