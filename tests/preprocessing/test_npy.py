import csv
import dataclasses
import shutil
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from genkd.errors import UserError
from genkd.preprocessing import sources
from genkd.preprocessing.decoding import open_frames, rgb_frames
from genkd.preprocessing.npy import sample_frames, write_array, write_flow_npy, write_npy
from genkd.preprocessing.sources import SourceList, SourceVideo
from genkd.preprocessing.thumos import thumos14


class Interrupted(Exception):
    pass


def encoded(path, images, fps=25):
    """An H.264 file with these RGB images, without visible loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def moving(count, width, height):
    """RGB images of a smooth pattern that moves two pixels to the right a frame."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin((x - 2 * t) / 9.0) + 50 * np.cos(y / 7.0 + (x - 2 * t) / 13.0) for t in range(count)]
    return [np.stack([wave, wave * 0.8 + 20, 255 - wave], -1).clip(0, 255).astype(np.uint8) for wave in waves]


def listed(*files, root, split="train", fps=None):
    videos = tuple(
        SourceVideo(str(path.relative_to(root).with_suffix("")), str(path), split, 0, 1, fps=fps) for path in files
    )
    return SourceList("some", root, ("one",), videos)


def difference(first, second):
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean()


def test_sampled_frames_by_hand():
    assert sample_frames(30, 10, 10).tolist() == [2, 5, 8]
    assert sample_frames(25, 10, 11).tolist() == [2, 4, 7, 9]  # step 2.5
    assert sample_frames(10, 10, 3).tolist() == [0, 1, 2]
    assert sample_frames(24, 10, 0).tolist() == []
    for fps, sample_fps in ((9.9, 10), (30, 0)):
        with pytest.raises(UserError, match="cannot be sampled"):
            sample_frames(fps, sample_fps, 5)


@pytest.mark.real
def test_sampled_frames_of_all_thumos14_videos(real_data):
    rows = [
        row
        for split in ("val", "test")
        for row in csv.DictReader(
            (real_data / "splits" / "thumos14" / f"{split}_video_info.csv").read_text().splitlines()
        )
    ]
    assert len(rows) == 412
    for row in rows:
        kept = sample_frames(float(row["fps"]), float(row["sample_fps"]), int(float(row["count"])))
        assert len(kept) == int(row["sample_count"]), row["video"]


@pytest.fixture
def clips(tmp_path):
    """Two short videos of 30 and 30000/1001 frames a second below tmp_path/in."""
    encoded(tmp_path / "in" / "video_validation_0000001.mp4", moving(31, 160, 120), 30)
    encoded(tmp_path / "in" / "video_validation_0000002.mp4", moving(20, 160, 120), Fraction(30000, 1001))
    return listed(*sorted((tmp_path / "in").iterdir()), root=tmp_path / "in", split="val")


def test_arrays_hold_every_third_frame_as_pillow_resizes_it(clips, tmp_path):
    written = write_npy(clips, tmp_path / "out", workers=0)
    assert written.frames == 10 + 6 and written.keys == tuple(video.key for video in clips.videos)
    array = np.load(tmp_path / "out" / "video_validation_0000001.npy")
    assert array.shape == (10, 112, 112, 3) and array.dtype == np.uint8
    decoded = list(rgb_frames(clips.videos[0]))
    for number, image in enumerate(array):
        expected = Image.fromarray(decoded[3 * number + 2]).resize((112, 112), Image.Resampling.BICUBIC)
        assert np.array_equal(image, np.asarray(expected))
    original = Image.fromarray(moving(31, 160, 120)[2]).resize((112, 112), Image.Resampling.BICUBIC)
    assert difference(array[0], original) < 4  # 4:2:0 chroma
    assert (tmp_path / "out" / "val_video_info.csv").read_text() == (
        "video,fps,sample_fps,count,sample_count\n"
        "video_validation_0000001,30.0,10.0,31.0,10\n"
        "video_validation_0000002,29.97002997002997,10.0,20.0,6\n"
    )


def test_arrays_are_a_source_again(clips, tmp_path):
    write_npy(clips, tmp_path / "out", sample_fps=5, resolution=64, workers=0)
    array = np.load(tmp_path / "out" / "video_validation_0000001.npy")
    video = SourceVideo("a", str(tmp_path / "out" / "video_validation_0000001.npy"), "val", -1, 1, fps=5)
    with open_frames(video) as frames:
        assert frames.rate == 5
        read = [frame.to_ndarray() for frame in frames]
    assert array.shape == (5, 64, 64, 3) and np.array_equal(read, array)


@pytest.mark.real
def test_arrays_are_found_by_the_thumos14_layout(clips, real_data, tmp_path):
    names = ("video_validation_0000051", "video_validation_0000052")
    renamed = [dataclasses.replace(video, key=name) for video, name in zip(clips.videos, names, strict=True)]
    write_npy(dataclasses.replace(clips, videos=tuple(renamed)), tmp_path / "out" / "validation_npy", workers=0)
    found = thumos14(tmp_path / "out", annotations=real_data / "splits" / "thumos14")
    assert [(video.key, video.fps, video.split) for video in found.videos] == [(name, 10.0, "val") for name in names]


def test_an_array_run_is_continued_and_bad_sources_are_recorded(clips, tmp_path, content):
    slow = encoded(tmp_path / "in" / "slow.mp4", moving(12, 64, 48), 8)
    brief = encoded(tmp_path / "in" / "brief.mp4", moving(2, 64, 48), 30)
    more = listed(brief, slow, root=tmp_path / "in", split="test").videos
    source = dataclasses.replace(clips, videos=(*more, *clips.videos))

    def interrupt(count):
        if count and (tmp_path / "out" / "video_validation_0000001.npy").exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        write_npy(source, tmp_path / "out", workers=0, on_videos=interrupt)
    (tmp_path / "out" / ".partial").mkdir(exist_ok=True)
    (tmp_path / "out" / ".partial" / "01").write_bytes(b"half")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == ["video_validation_0000001.npy"]
    written = write_npy(source, tmp_path / "out", workers=0)
    assert written.resumed == 1
    assert [(entry.path, entry.stage) for entry in written.rejected] == [("brief.mp4", "encode"), ("slow.mp4", "open")]
    assert "8 frames/s are fewer than the 10 to sample" in written.rejected[1].reason
    write_npy(clips, tmp_path / "whole", workers=0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_cut_off_video_leaves_no_array(videos, tmp_path):
    good = sources.ucf101(videos).videos[0].path
    (tmp_path / "in").mkdir()
    data = Path(good).read_bytes()
    (tmp_path / "in" / "cut.avi").write_bytes(data[: len(data) // 2])
    shutil.copy(good, tmp_path / "in" / "whole.avi")
    source = listed(tmp_path / "in" / "cut.avi", tmp_path / "in" / "whole.avi", root=tmp_path / "in")
    written = write_npy(source, tmp_path / "out", workers=0)
    assert written.keys == ("whole",) and written.rejected[0].stage == "decode"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train_video_info.csv", "whole.npy"]


def test_an_array_is_written_row_by_row(tmp_path):
    row = np.arange(112 * 112 * 3, dtype=np.uint32).reshape(112, 112, 3).astype(np.uint8)
    tracemalloc.start()
    assert write_array(tmp_path / "a.npy", (row for _ in range(2000)), row.shape) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # of 75 MB
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert array.shape == (2000, 112, 112, 3) and np.array_equal(array[1999], row)


def test_user_errors_of_arrays(clips, tmp_path):
    with pytest.raises(UserError, match="resolution 8 is not"):
        write_npy(clips, tmp_path / "out", resolution=8, workers=0)
    with pytest.raises(UserError, match=r"sample rate 0\.001 is not between 0\.01"):
        write_npy(clips, tmp_path / "out", sample_fps=0.001, workers=0)
    with pytest.raises(UserError, match="there is no folder of arrays"):
        write_flow_npy(tmp_path / "nowhere", tmp_path / "out", workers=0)
    with pytest.raises(UserError, match=r"holds no \.npy array"):
        write_flow_npy(tmp_path / "in", tmp_path / "out", workers=0)
    with pytest.raises(UserError, match="unknown flow method 'guess'"):
        write_flow_npy(tmp_path / "in", tmp_path / "out", method="guess", workers=0)


@pytest.mark.parametrize("method,tolerance", [("tvl1", 2), ("dis", 4), ("farneback", 6)])
def test_flow_of_a_pattern_that_moves_two_pixels(tmp_path, method, tolerance):
    (tmp_path / "rgb").mkdir()
    np.save(tmp_path / "rgb" / "a.npy", np.stack(moving(3, 112, 112)))
    written = write_flow_npy(tmp_path / "rgb", tmp_path / "flow", method=method, workers=0)
    flow = np.load(tmp_path / "flow" / "a.npy")
    assert written.frames == 3 and flow.shape == (3, 112, 112, 2) and flow.dtype == np.uint8
    assert np.array_equal(flow[2], flow[1])
    # x: (2 + 20) * 255 / 40 = 140.25; y: 127.5
    inner = flow[:, 16:-16, 16:-16].astype(float)
    assert abs(np.median(inner[..., 0]) - 140.25) < tolerance and abs(np.median(inner[..., 1]) - 127.5) < tolerance


def test_flow_is_opencvs_and_runs_are_continued(tmp_path):
    (tmp_path / "rgb").mkdir()
    images = moving(3, 48, 40)
    np.save(tmp_path / "rgb" / "a.npy", np.stack(images))
    np.save(tmp_path / "rgb" / "one.npy", np.stack(images[:1]))
    np.save(tmp_path / "rgb" / "flow.npy", np.full((3, 8, 8, 2), 128, np.uint8))
    (tmp_path / "rgb" / "cut.npy").write_bytes((tmp_path / "rgb" / "a.npy").read_bytes()[:-500])
    written = write_flow_npy(tmp_path / "rgb", tmp_path / "flow", workers=2)
    assert written.keys == ("a", "one") and [entry.path for entry in written.rejected] == ["cut.npy", "flow.npy"]
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
    expected = cv2.optflow.DualTVL1OpticalFlow_create().calc(grey[0], grey[1], None)
    expected = np.rint((np.clip(expected, -20, 20) + 20) * 255 / 40)
    assert np.abs(np.load(tmp_path / "flow" / "a.npy")[0] - expected).max() <= 1
    assert np.load(tmp_path / "flow" / "one.npy").shape == (1, 40, 48, 2)
    again = write_flow_npy(tmp_path / "rgb", tmp_path / "flow", workers=0)
    assert (again.resumed, again.frames) == (2, 0)
    with pytest.raises(UserError, match="other settings"):
        write_flow_npy(tmp_path / "rgb", tmp_path / "flow", method="dis", workers=0)


def test_arrays_of_a_source_that_changed_are_written_again(clips, tmp_path):
    write_npy(clips, tmp_path / "out", workers=0)
    write_flow_npy(tmp_path / "out", tmp_path / "flow", method="dis", workers=0)
    first = dataclasses.replace(clips.videos[0], path=clips.videos[1].path, mtime_ns=7)
    changed = dataclasses.replace(clips, videos=(first, clips.videos[1]))
    written = write_npy(changed, tmp_path / "out", workers=0)
    assert (written.changed, written.resumed) == ((first.key,), 1)
    assert np.load(tmp_path / "out" / f"{first.key}.npy").shape[0] == 6
    assert f"{first.key},29.97002997002997,10.0,20.0,6\n" in (tmp_path / "out" / "val_video_info.csv").read_text()
    again = write_flow_npy(tmp_path / "out", tmp_path / "flow", method="dis", workers=0)
    assert again.changed == (first.key,) and np.load(tmp_path / "flow" / f"{first.key}.npy").shape[0] == 6
