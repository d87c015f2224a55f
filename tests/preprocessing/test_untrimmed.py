import csv
import json

import av
import numpy as np
import pytest

from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines.loader import Loader
from genkd.pipelines.windows import detection_windows
from genkd.preprocessing import thumos
from genkd.preprocessing.convert import convert
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.synthetic import CLASSES, SynthSettings, synthesize
from genkd.preprocessing.untrimmed import (
    UntrimmedSettings,
    _fill_gap,
    poses,
    render_untrimmed,
    synthesize_untrimmed,
    timelines,
)
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoSettings

SMALL = UntrimmedSettings(
    validation_videos=2, test_videos=1, seconds=(12.0, 12.0), width=64, height=48, actions_per_minute=15,
    action_seconds=(1.0, 3.0), gap_seconds=0.5, mixed_share=0.5,
)  # fmt: skip
VIDEO = VideoSettings("vp9", fps=10.0, size="64x48")
WINDOWS = DataConfig(
    clip_length=64, window_stride=32, eval_window_stride=32, size=48, scales=(1.0,), max_distort=0, flip=0.0,
    padding="zero",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("untrimmed") / "videos"
    synthesize_untrimmed(out, SMALL, workers=0)
    return out


@pytest.fixture(scope="module")
def sharded(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("untrimmed") / "data"
    convert(thumos.thumos14(made), out, VIDEO, workers=0)
    return Dataset.open(out)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lateness(frames, video, part=slice(None), columns=slice(None)):
    """By how many frames, from -3 to 3, `frames` lag behind the part of the video that they show, in its actions."""
    rendered = np.stack(list(render_untrimmed(SMALL, video)))[part, :, columns]
    assert frames.shape == rendered.shape
    acting = np.zeros(video.frames, bool)
    for action in video.actions:
        acting[action.first : action.end] = True
    frames, rendered = (array.astype(np.float64).mean(3) for array in (frames, rendered))
    moving = np.ptp(rendered, axis=0) > 60
    count = len(frames) - 6
    away = [np.abs(frames[3:-3] - rendered[3 - k : 3 - k + count])[:, moving].mean(1) for k in range(-3, 4)]
    return np.argmin(away, axis=0)[acting[part][3:-3]] - 3


@pytest.mark.real
def test_the_files_are_those_of_thumos14(made, real_data):
    official, ours = real_data / "splits" / "thumos14", made / "thumos_annotations"
    for name in ("val_Annotation.csv", "test_Annotation.csv", "val_video_info.csv", "test_video_info.csv"):
        assert (ours / name).read_text().splitlines()[0] == (official / name).read_text().splitlines()[0]
    truths = [json.loads((folder / "thumos_gt.json").read_text())["database"] for folder in (official, ours)]
    fields = [{field for entry in truth.values() for field in entry} for truth in truths]
    assert fields[0] <= fields[1] == {"subset", "annotations", "duration"}  # the last one as in ActivityNet
    for split, part in (("val", "validation"), ("test", "test")):
        for place, truth in ((official, truths[0]), (ours, truths[1])):
            names = {row["video"] for row in rows(place / f"{split}_Annotation.csv")}
            assert all(
                name.startswith(f"video_{part}_") and len(name) == len(f"video_{part}_0000001") for name in names
            )
            assert {truth[name]["subset"] for name in names & truth.keys()} == {{"val": "train"}.get(split, split)}


def test_annotations_say_the_same_in_every_file(made):
    folder = made / "thumos_annotations"
    assert sorted(path.relative_to(made).as_posix() for path in made.glob("*/*.mp4")) == [
        "test/video_test_0000001.mp4",
        "validation/video_validation_0000001.mp4",
        "validation/video_validation_0000002.mp4",
    ]
    assert (folder / "Class Index_Detection.txt").read_text().splitlines() == [
        f"{number} {name}" for number, name in enumerate(CLASSES, 1)
    ]
    # 12 s at 10 frames a second, 15 actions a minute: 3 a video, of which every second one has several classes.
    assert (folder / "val_video_info.csv").read_text().splitlines()[1:] == [
        f"video_validation_000000{number},10.0,10.0,120.0,120" for number in (1, 2)
    ]
    found = rows(folder / "val_Annotation.csv") + rows(folder / "test_Annotation.csv")
    assert [len({row["type"] for row in found[start : start + 3]}) for start in (0, 3, 6)] == [1, 2, 1]
    truth = json.loads((folder / "thumos_gt.json").read_text())
    assert {entry["duration"] for entry in truth["database"].values()} == {12.0} and truth["taxonomy"][2] == {
        "nodeId": 2, "nodeName": "Fall", "parentId": 0, "parentName": "Root",
    }  # fmt: skip
    listed = [
        (name, entry["label"], *entry["segment"])
        for name, video in truth["database"].items()
        for entry in video["annotations"]
    ]
    assert listed == [(row["video"], row["type"], float(row["start"]), float(row["end"])) for row in found]
    for row in found:
        assert CLASSES[int(row["type_idx"]) - 1] == row["type"]
        assert (int(row["startFrame"]) / 10, int(row["endFrame"]) / 10) == (float(row["start"]), float(row["end"]))


def test_a_few_classes_keep_their_numbers(tmp_path):
    few = UntrimmedSettings(1, 1, (6.0, 6.0), 25, 32, 32, ("Spin", "Fall"), mixed_share=1, action_seconds=(1, 2))
    synthesize_untrimmed(tmp_path / "few", few, workers=0)
    folder = tmp_path / "few" / "thumos_annotations"
    assert (folder / "Class Index_Detection.txt").read_text() == "2 Fall\n9 Spin\n"
    # 150 frames at 25 a second are 60 at 10: those that genkd npy would write.
    assert (folder / "val_video_info.csv").read_text().split()[1] == "video_validation_0000001,25.0,10.0,150.0,60"
    assert thumos.thumos14(tmp_path / "few").classes == ("Background", "Fall", "Spin")


def test_actions_are_spread_as_asked_for():
    settings = UntrimmedSettings(validation_videos=200, test_videos=20, seed=5)
    videos = timelines(settings)
    lengths = []
    for video in videos:
        assert 450 <= video.frames <= 750 and len(video.actions) == max(1, round(video.frames / 100))
        edges = [0, *(edge for action in video.actions for edge in action[:2]), video.frames]
        gaps = np.diff(edges)[::2]
        assert gaps.min() >= 10  # 1 s
        lengths += [action.end - action.first for action in video.actions]
    assert min(lengths) >= 10 and max(lengths) <= 80
    assert 26 < np.median(lengths) < 31  # log-uniform from 10 to 80: the square root of 800 is 28.3
    several = [len({action.name for action in video.actions}) for video in videos if video.split == "val"]
    assert sum(count > 1 for count in several) == 30 and set(several) == {1, 2, 3}  # 0.15 of 200
    for split in ("val", "test"):
        assert {action.name for v in videos if v.split == split for action in v.actions} == set(CLASSES)


def test_crowded_videos_have_shorter_actions_but_never_too_short_ones():
    crowded = UntrimmedSettings(4, 1, (20.0, 20.0), actions_per_minute=24, action_seconds=(1.0, 8.0), gap_seconds=1.2)
    for video in timelines(crowded):  # 8 actions of 1 s and 9 gaps of 1.2 s leave 1.2 s
        lengths = [action.end - action.first for action in video.actions]
        assert len(lengths) == 8 and min(lengths) >= 10 and 80 <= sum(lengths) <= 92


def test_a_video_depends_on_its_own_number_alone():
    few, many = timelines(UntrimmedSettings(3, 2)), timelines(UntrimmedSettings(9, 4))
    assert few[:3] == many[:3] and few[3:] == many[9:11]
    assert timelines(UntrimmedSettings(3, 2, seed=1)) != few


def test_the_object_moves_in_an_action_and_stands_around_it():
    settings = UntrimmedSettings(validation_videos=10, test_videos=1)
    for video in timelines(settings):
        track, scenes = poses(settings, video)
        moves = (np.diff(track[:, :3], axis=0) != 0).any(1) | (np.diff(track[:, 3]) % 360 > 1e-9)
        for first, end, name in video.actions:
            assert moves[first:end].all() and not moves[first - 1] and not moves[end]
            assert len(set(scenes[first : end + 1])) == 1
            changed = np.ptp(track[first : end + 1], axis=0) > 1e-9  # x, y, scale, angle
            axes = {"Bob": 1, "Fall": 1, "Rise": 1, "Slide": 0, "Sway": 0, "Spin": 3, "Orbit": (0, 1)}
            assert np.flatnonzero(changed).tolist() == np.atleast_1d(axes.get(name, 2)).tolist()
        assert scenes[-1] > 0 and (np.diff(scenes) >= 0).all()


def test_what_moves_between_actions_moves_as_no_class_does():
    """Of x, y, scale and angle a class changes one, or x and y along a circle without a turn."""
    random = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        here, there = ([*random.uniform(0.3, 0.7, 3), random.uniform(0, 360)] for _ in range(2))
        track, scenes = np.empty((20, 4)), np.zeros(20, int)
        _fill_gap(random, track, scenes, (0, 20), np.array(here), np.array(there), fps=10)
        assert np.allclose(track[:2], here) and np.allclose(track[-2:], there)
        moved = np.diff(track, axis=0)
        moved = moved[np.abs(moved).max(1) > 0]
        cut = bool(scenes[-1])
        kinds.add(cut)
        assert len(moved) == 1 if cut else (np.abs(moved) > 0).all()
    assert kinds == {True, False}


def test_files_hold_what_is_rendered_whoever_writes_them(made, tmp_path, content):
    with av.open(str(made / "validation" / "video_validation_0000002.mp4")) as container:
        stored = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (10, "mpeg4")
        assert "mp4" in container.format.name.split(",")
    late = lateness(stored, timelines(SMALL)[1])
    assert len(late) == 62 and (late == 0).mean() > 0.9
    before = content(made)
    (tmp_path / "again").mkdir()
    for name in ("synth.json", "validation/video_validation_0000001.mp4"):
        (tmp_path / "again" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(before[name])
    counted = []
    synthesize_untrimmed(tmp_path / "again", SMALL, workers=2, on_video=counted.append)
    assert content(tmp_path / "again") == before and sum(counted) == 3


def test_windows_of_shards_agree_with_the_annotations(made, sharded):
    """Counted by hand from the annotations, for windows of 64 frames, every 32, of videos of 120."""
    assert [",".join(row.values()) for row in rows(made / "thumos_annotations" / "val_Annotation.csv")[3:]] == [
        "video_validation_0000002,Slide,8,1.2,3.1,12,31",
        "video_validation_0000002,Fall,2,4.1,5.5,41,55",
        "video_validation_0000002,Slide,8,7.6,10.5,76,105",
    ]
    expected = {
        0: ([(12, 31, 8), (41, 55, 2)], [11, 12, 13, 40, 41, 42], [30, 31, 32, 54, 55, 56]),
        # The second Slide has 20 of its 29 frames here and is cut; Fall is whole.
        32: ([(9, 23, 2), (44, 64, 8)], [8, 9, 10, 43, 44, 45], [22, 23, 24, 63]),
        # The last window ends with the video; a twentieth of 29 frames is 1.45.
        56: ([(20, 49, 8)], [19, 20, 21], [48, 49, 50]),
    }
    assert sharded.classes == ["Background", *CLASSES]
    with Loader(sharded, "val", WINDOWS, batch_size=1, training=True, detection=True) as loader:
        found = {(sharded.video(int(b.ids[0])).key, int(b.windows.offsets[0])): b.windows for b in loader}
    assert len(found) == 6
    for offset, (actions, starts, ends) in expected.items():
        window = found["video_validation_0000002", offset]
        assert window.actions[0].tolist() == [list(action) for action in actions]
        for row, places in enumerate((starts, ends)):
            assert np.flatnonzero(window.boundaries[0, row]).tolist() == places

    # So do those that the original implementation would take from the files of frame counts.
    folder = made / "thumos_annotations"
    files = (folder / f"val_{name}.csv" for name in ("video_info", "Annotation"))
    for window in detection_windows(*files, folder / "Class Index_Detection.txt", 64, 32):
        loaded = found.pop((window.video, window.offset))
        assert np.array_equal(window.annotations, loaded.actions[0])
        assert np.array_equal([window.start, window.end], loaded.boundaries[0])
    assert not found


def test_frames_of_windows_are_those_of_the_video(sharded):
    config = WINDOWS.model_copy(update={"dtype": "uint8"})
    with Loader(sharded, "test", config, batch_size=1, training=False, detection=True) as loader:
        batches = list(loader)
    assert [int(batch.windows.offsets[0]) for batch in batches] == [0, 32, 56]
    clip = batches[1].clips[0].permute(1, 2, 3, 0).numpy()
    late = lateness(clip, timelines(SMALL)[2], slice(32, 96), slice(8, 56))  # the square in the middle
    assert len(late) == 31 and (late == 0).mean() > 0.9


def test_a_sharded_set_is_sound(sharded):
    assert verify(sharded.path, workers=0) == []


def test_annotations_beyond_the_end_are_told_and_left_out(made, tmp_path):
    """The second video lasts 12 s."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    for path in (made / "thumos_annotations").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with open(folder / "val_Annotation.csv", "a") as file:
        for start, end in ((12.0, 13.0), (11.9, 12.4), (11.0, 12.5), (20.0, 21.0)):
            file.write(f"video_validation_0000002,Fall,2,{start},{end},{start * 10:.0f},{end * 10:.0f}\n")
    source = thumos.thumos14(made, annotations=folder)
    summary = convert(source, tmp_path / "data", VIDEO, workers=0)
    assert summary.late_actions == {"video_validation_0000002": 2} and not summary.rejected
    with Loader(Dataset.open(tmp_path / "data"), "val", WINDOWS, batch_size=1, training=True, detection=True) as loader:
        actions = {int(b.windows.offsets[0]): b.windows.actions[0] for b in loader if int(b.ids[0]) == 2}
    # Only the one of which two thirds are in the video is left, cut to it: frames 110 to 120.
    assert actions[56].tolist() == [[20, 49, 8], [54, 64, 2]]


def test_a_video_shorter_than_a_window_is_filled_up_and_never_looped(sharded):
    longer = WINDOWS.model_copy(update={"clip_length": 128})
    with Loader(sharded, "val", longer, batch_size=2, training=True, detection=True) as loader:
        (batch,) = loader
    assert batch.clips.shape == (2, 3, 128, 48, 48) and not batch.clips[:, :, 120:].any()
    assert sorted(len(actions) for actions in batch.windows.actions) == [3, 3]
    for padding, message in (("loop", "set data.padding=zero"), ("fail", "shorter than a clip of 128 frames")):
        with pytest.raises(UserError, match=message):
            Loader(
                sharded, "val", longer.model_copy(update={"padding": padding}), batch_size=2, training=True,
                detection=True,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_videos": 0}, "--validation-videos 0: each split needs at least one video"),
        ({"test_videos": -1}, "--test-videos -1"),
        ({"classes": ("Bob", "slid")}, "unknown class 'slid'; did you mean Slide"),
        ({"classes": ()}, "name one class or more"),
        ({"classes": ("Bob", "Bob")}, "each once"),
        ({"classes": ("Bob",)}, "--mixed-share 0.15 needs two --classes"),
        ({"mixed_share": float("nan")}, "--mixed-share nan is not between 0 and 1"),
        ({"seconds": (75.0, 45.0)}, "--seconds 75-45 is no length"),
        ({"seconds": (1.0, float("inf"))}, "--seconds 1-inf is no length"),
        ({"seconds": (float("nan"), 5.0)}, "--seconds nan-5 is no length"),
        ({"seconds": (0.1, 5.0)}, "0.1 s at 10 frames/s is less than two frames"),
        ({"action_seconds": (0.1, 5.0)}, "--action-seconds 0.1-5 is no length"),
        ({"action_seconds": (1.01, 1.05)}, "whole frames of 0.1 s"),
        ({"action_seconds": (float("nan"), 1.0)}, "--action-seconds nan-1"),
        ({"actions_per_minute": 0.0}, "--actions-per-minute 0 is not above 0"),
        ({"actions_per_minute": float("inf")}, "--actions-per-minute inf"),
        ({"gap_seconds": -1.0}, "--gap-seconds -1 is not between"),
        ({"fps": 0}, "at 0 frames/s"),
        ({"width": 31}, "--size 31x112"),
        ({"height": 10_000}, "--size 112x10000"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        UntrimmedSettings(**options)


def test_actions_that_do_not_fit_and_folders_of_others_are_refused(made, tmp_path):
    needed = "6 actions of at least 9 s with 7 gaps of 1 s need 61 s, but video_validation_0000001 has 60 s"
    with pytest.raises(UserError, match=needed):
        synthesize_untrimmed(tmp_path / "a", UntrimmedSettings(seconds=(60, 60), action_seconds=(9, 10)), workers=0)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match=r"other settings \(seed 0 -> 1\)"):
        synthesize_untrimmed(made, UntrimmedSettings(**{**vars(SMALL), "seed": 1}), workers=0)
    with pytest.raises(UserError, match="another kind of data set"):
        synthesize(made, SynthSettings(), workers=0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        synthesize_untrimmed(tmp_path / "b", SMALL, workers=0)
    for text in ("{", "[1]"):
        (tmp_path / "b" / "synth.json").write_text(text)
        with pytest.raises(UserError, match=r"synth\.json is damaged"):
            synthesize_untrimmed(tmp_path / "b", SMALL, workers=0)
