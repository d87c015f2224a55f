import dataclasses
import os
import shutil
import subprocess

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from genkd.errors import UserError
from genkd.files import locked
from genkd.preprocessing import shards, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.decoding import open_frames, rgb_frames
from genkd.preprocessing.export import export_parquet
from genkd.preprocessing.interop import dataset_sources, images, notes_folder, write_frames
from genkd.preprocessing.lists import frame_counter
from genkd.preprocessing.sources import Rejection, SourceList, SourceVideo
from genkd.preprocessing.video import VideoSettings, decode_frames, transcode

FRAMES = 40  # of each synthetic video


@pytest.fixture
def data(shard_sets):
    return shard_sets("mjpeg")


def some(videos, *numbers):
    """Synthetic videos as a source list."""
    source = sources.ucf101(videos)
    return dataclasses.replace(source, videos=tuple(source.videos[number] for number in numbers))


def listed(*files, root, split="train", fps=None):
    videos = tuple(
        SourceVideo(str(path.relative_to(root).with_suffix("")), str(path), split, 0, 1, fps=fps) for path in files
    )
    return SourceList("some", root, ("one",), videos)


def read_images(folder, extension="jpg"):
    return [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.glob(f"image_*.{extension}"))]


def grey(image):
    return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


def difference(first, second):
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean()


# --- data sets as sources --------------------------------------------------------------------------------------------


def test_a_data_set_is_a_source_with_the_same_frames(data):
    source = dataset_sources(data)
    assert [video.key for video in source.videos] == data.table["key"].to_pylist()
    assert source.classes == tuple(data.classes)
    video, row = source.videos[3], data.video(3)
    assert (video.size, video.mtime_ns, video.fps, video.label) == (row.size, row.crc32c, 25.0, row.label)
    with open(data.path / "shards" / row.shard, "rb") as file:
        file.seek(row.offset)
        payload = file.read(row.size)
    with open_frames(video) as frames:
        planes = [frame.to_ndarray() for frame in frames]
    (data.path / "one.mp4").write_bytes(payload)
    direct = [frame.to_ndarray() for frame in decode_frames(data.path / "one.mp4")]
    (data.path / "one.mp4").unlink()
    assert len(planes) == row.num_frames and all(map(np.array_equal, planes, direct))


def test_one_split_of_a_data_set(data):
    source = dataset_sources(data, "test")
    assert len(source.videos) == len(data.rows("test")) and {video.split for video in source.videos} == {"test"}
    with pytest.raises(UserError, match="no videos in a split 'nope'"):
        dataset_sources(data, "nope")


def test_annotations_of_a_data_set_are_kept(data):
    row = data.table.slice(0, 1).to_pylist()[0] | {"annotations": [{"start_s": 0.5, "end_s": 1.0, "label": 2}]}
    table = shards.pa.Table.from_pylist([row], shards.SCHEMA)
    source = dataset_sources(shards.Dataset(data.storage, data.info, table))
    assert source.videos[0].annotations == (sources.Annotation(0.5, 1.0, 2),)


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.ffmpeg
@pytest.mark.parametrize("width,height", [(352, 288), (322, 242), (128, 96), (100, 38)])
def test_frames_are_those_of_ffmpeg(tmp_path, width, height):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:duration=0.2:rate=25"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", path], check=True)
    source = listed(path, root=tmp_path / "in")
    write_frames(source, tmp_path / "out", workers=0)
    for extension in ("jpg", "png"):
        (tmp_path / extension).mkdir()
        command = ["ffmpeg", "-v", "error", "-i", path, "-vf", "scale=-1:240", "-q:v", "1"]
        subprocess.run([*command, tmp_path / extension / f"image_%05d.{extension}"], check=True)
    ours, jpegs = read_images(tmp_path / "out" / "a"), read_images(tmp_path / "jpg")
    exact = read_images(tmp_path / "png", "png")
    assert [image.shape for image in ours] == [image.shape for image in jpegs] and len(ours) == 5
    assert ours[0].shape[0] == 240
    with open_frames(source.videos[0]) as frames:
        scaled = list(images(frames, "rgb24", [("scale", "-1:240:flags=bicubic+accurate_rnd")]))
    for number in range(5):
        assert difference(scaled[number], exact[number]) < 0.5
        # A JPEG of 4:2:0 halves the colours' resolution, so grey is compared closely and colour roughly.
        assert difference(grey(ours[number]), grey(jpegs[number])) < 2
        assert difference(ours[number], exact[number]) < 6
    assert (tmp_path / "out" / "a" / "n_frames").read_bytes() == b"5"


def test_height_0_keeps_the_size_and_quality_is_that_of_the_jpeg(videos, tmp_path):
    source = some(videos, 0)
    write_frames(source, tmp_path / "fine", height=0, workers=0)
    write_frames(source, tmp_path / "coarse", height=0, quality=30, workers=0)
    key = source.videos[0].key
    assert {image.shape for image in read_images(tmp_path / "fine" / key)} == {(48, 64, 3)}
    sizes = [(tmp_path / name / key / "image_00001.jpg").stat().st_size for name in ("fine", "coarse")]
    assert sizes[1] < 0.6 * sizes[0]


def test_written_frames_are_a_source_again(videos, tmp_path):
    source = some(videos, 0, 7)
    write_frames(source, tmp_path / "out", height=0, quality=100, workers=0)
    for video in source.videos:
        folder = SourceVideo(video.key, str(tmp_path / "out" / video.key), "train", 0, 1, fps=25)
        with open(tmp_path / "again.mp4", "wb") as file:
            result = transcode(folder, file, VideoSettings("h264", short_side=0, crf=1))
        assert (result.num_frames, result.source_frames, result.fps) == (FRAMES, FRAMES, 25.0)
        again = rgb_frames(SourceVideo("a", str(tmp_path / "again.mp4"), "train", 0, 1))
        for mine, original in zip(again, rgb_frames(video), strict=True):
            assert difference(mine, original) < 4


def test_frame_folders_are_found_by_the_layouts(videos, tmp_path):
    source = sources.ucf101(videos)
    few = dataclasses.replace(source, videos=source.videos[:3])
    for flat in (False, True):
        out = tmp_path / f"flat-{flat}"
        write_frames(few, out, height=0, flat=flat, workers=0)
        found = sources.ucf101(out, annotations=videos / "ucfTrainTestlist", source_fps=25)
        names = [video.key.rpartition("/")[2] for video in found.videos]
        assert sorted(names) == sorted(video.key.rpartition("/")[2] for video in few.videos)
        assert ("/" in found.videos[0].key) is not flat


def test_frames_of_a_data_set(data, tmp_path):
    source = dataset_sources(data)
    source = dataclasses.replace(source, videos=source.videos[:2])
    written = write_frames(source, tmp_path / "out", height=0, workers=0)
    assert written.frames == 2 * FRAMES and len(read_images(tmp_path / "out" / source.videos[1].key)) == FRAMES


def test_a_rerun_skips_what_is_complete(videos, tmp_path, content):
    source = some(videos, 0, 1, 2)
    done = []
    first = write_frames(source, tmp_path / "out", height=0, workers=0, on_videos=done.append)
    assert done == [1, 1, 1]
    before = content(tmp_path / "out")
    seen = []
    again = write_frames(source, tmp_path / "out", height=0, workers=0, on_start=lambda *counts: seen.append(counts))
    assert (first.resumed, first.frames) == (0, 3 * FRAMES) and (again.resumed, again.frames) == (3, 0)
    assert seen == [(3, 3)] and again.keys == first.keys and content(tmp_path / "out") == before


def test_only_folders_of_videos_are_in_the_output(videos, tmp_path):
    source = some(videos, 0, 8)
    write_frames(source, tmp_path / "out", height=0, workers=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        video.key.partition("/")[0] for video in source.videos
    }


class Interrupted(Exception):
    pass


def test_an_interrupted_run_is_continued(videos, tmp_path, content):
    source = some(videos, 0, 1, 2, 3)
    write_frames(source, tmp_path / "whole", height=0, workers=0)

    def interrupt(count):
        raise Interrupted

    with pytest.raises(Interrupted):
        write_frames(source, tmp_path / "out", height=0, workers=0, on_videos=interrupt)
    # What a process killed while it wrote the second video leaves.
    partial = tmp_path / "out" / ".partial" / "0123"
    partial.mkdir(parents=True)
    (partial / "image_00001.jpg").write_bytes(b"half")
    assert not (tmp_path / "out" / source.videos[1].key).exists()
    written = write_frames(source, tmp_path / "out", height=0, workers=2)
    assert written.resumed == 1 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_without_n_frames_is_written_anew(videos, tmp_path):
    source = some(videos, 0, 1)
    write_frames(source, tmp_path / "out", height=0, workers=0)
    folder = tmp_path / "out" / source.videos[0].key
    (folder / "n_frames").unlink()
    (folder / "image_00041.jpg").write_bytes(b"stale")
    assert write_frames(source, tmp_path / "out", height=0, workers=0).frames == FRAMES
    assert len(list(folder.iterdir())) == FRAMES + 1


def test_bad_sources_are_recorded_and_the_rest_is_written(videos, tmp_path):
    good = some(videos, 0)
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    (root / "a" / "text.avi").write_text("not a video")
    shutil.copy(good.videos[0].path, root / "a" / "whole.avi")
    cut = (root / "a" / "whole.avi").read_bytes()
    (root / "a" / "cut.avi").write_bytes(cut[: len(cut) // 2])
    source = sources.folder(root)
    source = dataclasses.replace(source, rejected=(Rejection("b", "scan", "no such file"),))
    written = write_frames(source, tmp_path / "out", height=0, workers=0)
    assert written.keys == ("a/whole",)
    assert [(entry.path, entry.stage) for entry in written.rejected] == [
        ("a/cut.avi", "decode"), ("a/text.avi", "open"), ("b", "scan"),
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "out.genkd" / "errors.parquet")
    assert table.schema.names == shards.ERROR_SCHEMA.names
    assert [Rejection(**row) for row in table.to_pylist()] == written.rejected
    assert sorted(path.name for path in (tmp_path / "out" / "a").iterdir()) == ["whole"]
    shutil.copy(root / "a" / "whole.avi", root / "a" / "text.avi")  # mended: taken by the next run
    assert write_frames(sources.folder(root), tmp_path / "out", height=0, workers=0).keys == ("a/text", "a/whole")


@pytest.mark.parametrize("name", ["with space (1)!&.avi", "100%05d.avi", "ünïcode.avi", "dots.in.name.avi"])
def test_awkward_names(videos, tmp_path, name):
    root = tmp_path / "in"
    (root / "a b").mkdir(parents=True)
    shutil.copy(some(videos, 0).videos[0].path, root / "a b" / name)
    source = sources.folder(root)
    write_frames(source, tmp_path / "out", height=0, workers=0)
    folder = tmp_path / "out" / source.videos[0].key
    with open_frames(SourceVideo("a", str(folder), "train", 0, 1, fps=25)) as frames:
        assert sum(1 for _ in frames) == FRAMES
    assert frame_counter(tmp_path / "out")(f"a b/{name[:-4]}") == FRAMES


def test_user_errors_of_frames(videos, tmp_path):
    source = some(videos, 0, 1)
    with pytest.raises(UserError, match="height 8 is not"):
        write_frames(source, tmp_path / "out", height=8, workers=0)
    with pytest.raises(UserError, match="quality 101 is not"):
        write_frames(source, tmp_path / "out", quality=101, workers=0)
    with pytest.raises(UserError, match="lies inside the source"):
        write_frames(source, videos / "UCF-101" / "out", workers=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty, and not a folder that genkd began"):
        write_frames(source, tmp_path / "full", workers=0)
    write_frames(source, tmp_path / "out", height=0, workers=0)
    with pytest.raises(UserError, match="begun with other settings"):
        write_frames(source, tmp_path / "out", height=32, workers=0)
    with locked(notes_folder(tmp_path / "busy"), "busy"), pytest.raises(UserError, match="another run is writing"):
        write_frames(source, tmp_path / "busy", workers=0)
    bad = dataclasses.replace(source, videos=(dataclasses.replace(source.videos[0], key="../x"),))
    with pytest.raises(UserError, match=r"key '\.\./x' cannot be written"):
        write_frames(bad, tmp_path / "bad", workers=0)
    nested = [dataclasses.replace(source.videos[0], key=key) for key in ("a", "a/b")]
    with pytest.raises(UserError, match="'a/b' would lie in the folder of another"):
        write_frames(dataclasses.replace(source, videos=tuple(nested)), tmp_path / "nested", workers=0)
    twice = [dataclasses.replace(source.videos[number], key=key) for number, key in enumerate(("a/v", "b/v"))]
    with pytest.raises(UserError, match="two sources have the key 'v'"):
        write_frames(dataclasses.replace(source, videos=tuple(twice)), tmp_path / "twice", flat=True, workers=0)
    gone = dataclasses.replace(source, videos=(dataclasses.replace(source.videos[0], path=str(tmp_path / "no.avi")),))
    with pytest.raises(UserError, match="none of the 1 videos could be used"):
        write_frames(gone, tmp_path / "gone", workers=0)


def test_flow_arrays_are_not_scaled(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.full((3, 16, 16, 2), 128, np.uint8))
    source = listed(tmp_path / "in" / "a.npy", root=tmp_path / "in", fps=10)
    with pytest.raises(UserError, match="flow cannot be scaled"):
        write_frames(source, tmp_path / "out", workers=0)
    write_frames(source, tmp_path / "kept", height=0, workers=0)
    assert read_images(tmp_path / "kept" / "a")[0].shape == (16, 32, 3)


def test_frames_of_a_source_that_changed_are_written_again(tmp_path, videos):
    names = sorted((videos / "UCF-101" / "Bob").iterdir())
    (tmp_path / "in").mkdir()
    for name, path in zip(("a.avi", "b.avi"), names, strict=False):
        shutil.copy(path, tmp_path / "in" / name)

    def write():
        found = [sources.source_video(str(path), tmp_path / "in", "train", 0) for path in files]
        return write_frames(sources.SourceList("in", tmp_path / "in", (), tuple(found)), tmp_path / "out", workers=0)

    files = [tmp_path / "in" / "a.avi", tmp_path / "in" / "b.avi"]
    assert write().changed == ()
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/image_*.jpg"))}
    shutil.copy(names[2], files[1])
    os.utime(files[1], ns=(5, 5))
    done = write()
    assert (done.changed, done.resumed) == (("b",), 1)
    after = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/image_*.jpg"))}
    assert {path.parent.name for path in after if after[path] != before.get(path)} == {"b"}
    assert write().changed == () and write().resumed == 2
    (tmp_path / "out.genkd" / "sources.json").write_text("{")
    with pytest.raises(UserError, match=r"sources\.json is damaged; delete"):
        write()


def test_an_output_that_a_link_leads_into_the_source_is_refused(videos, data, tmp_path):
    (tmp_path / "link").symlink_to(videos / "UCF-101" / "Bob")
    (tmp_path / "root").symlink_to(videos / "UCF-101")
    (tmp_path / "set").symlink_to(data.path)
    for run in (
        lambda: write_frames(sources.folder(tmp_path / "root"), tmp_path / "link" / "out", workers=0),
        lambda: convert(sources.folder(tmp_path / "root"), tmp_path / "link" / "out", VideoSettings(), workers=0),
        lambda: convert(sources.folder(tmp_path / "root"), videos / "UCF-101" / "out", VideoSettings(), workers=0),
        lambda: export_parquet(data.path, tmp_path / "set" / "out", workers=0),
    ):
        with pytest.raises(UserError, match="lies inside the source"):
            run()


def test_a_folder_of_other_things_gets_no_notes_beside_it(tmp_path, videos):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a folder that genkd began"):
        write_frames(sources.folder(videos / "UCF-101"), tmp_path / "mine", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
