import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from genkd import thumos_files
from genkd.errors import UserError
from genkd.preprocessing import thumos
from genkd.preprocessing.sources import Annotation


def names(listing: Path) -> list[str]:
    with open(listing) as file:
        return sorted({row["video"] for row in csv.DictReader(file)})


@pytest.fixture(scope="module")
def annotations(real_data):
    return real_data / "splits" / "thumos14"


def layout(root: Path, annotations: Path, val: str, test: str, extension: str) -> Path:
    for folder, split in ((val, "val"), (test, "test")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names(annotations / f"{split}_Annotation.csv"):
            (root / folder / f"{name}{extension}").touch()
    return root


@pytest.fixture(scope="module")
def root(annotations, tmp_path_factory):
    root = layout(tmp_path_factory.mktemp("thumos"), annotations, "validation", "test", ".mp4")
    layout(root, annotations, "validation_npy", "test_npy", ".npy")
    (root / "validation" / "video_validation_0000001.mp4").touch()  # one of those without annotations
    return root


@pytest.mark.real
def test_the_annotated_videos_of_thumos14(root, annotations):
    found = thumos.thumos14(root, annotations=annotations)
    by_split = {split: [v for v in found.videos if v.split == split] for split in ("val", "test")}
    # 200 validation and 212 test videos with 3007 and 3358 actions are what papers report.
    assert {split: len(videos) for split, videos in by_split.items()} == {"val": 200, "test": 212}
    assert [sum(len(v.annotations) for v in by_split[split]) for split in ("val", "test")] == [3007, 3358]
    assert all(v.label == -1 and v.annotations == tuple(sorted(v.annotations)) for v in found.videos)
    assert all(v.path.endswith(".mp4") and v.fps is None for v in found.videos)
    assert [(r.path, r.reason) for r in found.rejected] == [
        ("video_test_0001292", "all its annotations are of the class Ambiguous")
    ]


@pytest.mark.real
def test_the_classes_of_thumos14(root, annotations, reference):
    import numpy as np

    found = thumos.thumos14(root, annotations=annotations)
    expected = np.load(reference / "open" / "data_windows.npz")["class_names"]
    assert found.classes == ("Background", *expected.tolist())
    video = next(v for v in found.videos if v.key == "video_test_0000004")
    assert video.annotations[0] == Annotation(0.2, 1.1, found.classes.index("CricketBowling"))


@pytest.mark.real
def test_annotations_are_those_of_the_ground_truth(root, annotations):
    """thumos_gt.json leaves out two test videos whose annotations do not fit them."""
    found = thumos.thumos14(root, annotations=annotations)
    truth = json.loads((annotations / "thumos_gt.json").read_text())["database"]
    test = {name: entry["annotations"] for name, entry in truth.items() if entry["subset"].lower() == "test"}
    assert len(test) == 210
    ours = {v.key: v.annotations for v in found.videos}
    for name, entries in test.items():
        expected = sorted((*map(float, entry["segment"]), found.classes.index(entry["label"])) for entry in entries)
        assert [tuple(annotation) for annotation in ours[name]] == expected


@pytest.mark.real
def test_published_arrays_of_thumos14(annotations, tmp_path):
    root = layout(tmp_path / "sets", annotations, "validation_npy", "test_npy", ".npy")
    layout(root, annotations, "validation_flow_npy", "test_flow_npy", ".npy")
    shutil.copytree(annotations, tmp_path / "thumos_annotations")  # beside ROOT
    rgb, flow = thumos.thumos14(root), thumos.thumos14(root, flow=True)
    assert len(rgb.videos) == len(flow.videos) == 412
    assert {v.fps for v in (*rgb.videos, *flow.videos)} == {10.0}
    assert [v.key for v in rgb.videos] == [v.key for v in flow.videos]
    assert all(re.search("/(validation|test)_npy/", v.path) for v in rgb.videos)
    assert all(re.search("/(validation|test)_flow_npy/", v.path) for v in flow.videos)
    assert {v.fps for v in thumos.thumos14(root, source_fps=5).videos} == {5}


@pytest.fixture
def small(tmp_path) -> Path:
    """A root with one video in each split, and its annotations."""
    (tmp_path / "Class_Index_Detection.txt").write_text("7 BaseballPitch\n9 BasketballDunk\n")
    for split in ("val", "test"):
        (tmp_path / f"{split}_{1}.mp4").touch()
        (tmp_path / f"{split}_Annotation.csv").write_text(
            "video,type,type_idx,start,end,startFrame,endFrame\n"
            f"{split}_1,BasketballDunk,9,4.5,6.0,135,180\n{split}_1,Ambiguous,0,2,3,60,90\n"
            f"{split}_1,BaseballPitch,7,0.5,6.0,15,180\n{split}_2,BaseballPitch,7,0.5,6.0,15,180\n"
        )
    return tmp_path


def test_videos_may_lie_in_the_root(small):
    found = thumos.thumos14(small)
    assert [(v.key, v.split, v.annotations) for v in found.videos] == [
        (f"{split}_1", split, (Annotation(0.5, 6.0, 1), Annotation(4.5, 6.0, 2))) for split in ("test", "val")
    ]
    assert {r.path: r.reason for r in found.rejected} == {
        f"{split}_2": f"listed in {split}_Annotation.csv, but there is no such file" for split in ("test", "val")
    }


def test_the_rate_of_arrays_is_what_was_written_with_them(small, tmp_path):
    """The annotations have a file of the same name, for the published arrays."""
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for split, rate in (("val", 5.0), ("test", 10.0)):
        np.save(arrays / f"{split}_1.npy", np.zeros((4, 16, 16, 3), np.uint8))
        text = f"video,fps,sample_fps,count,sample_count\n{split}_1,30.0,{rate},300.0,50\n"
        ((arrays if split == "val" else small) / f"{split}_video_info.csv").write_text(text)
    (small / "val_video_info.csv").write_text("video,fps,sample_fps,count,sample_count\nval_1,30.0,10.0,300.0,100\n")
    found = thumos.thumos14(arrays, annotations=small)
    assert {video.key: video.fps for video in found.videos} == {"val_1": 5.0, "test_1": 10.0}
    (arrays / "val_video_info.csv").rename(arrays / "gone.csv")
    assert thumos.thumos14(arrays, annotations=small).videos[1].fps == 10.0
    assert thumos.thumos14(arrays, annotations=small, source_fps=7.0).videos[1].fps == 7.0
    with pytest.raises(UserError, match=r"rate 0\.0001 is not between 0\.01 and 1000"):
        thumos.thumos14(arrays, annotations=small, source_fps=0.0001)


def test_frames_of_the_original_are_frames_at_ten_a_second(small):
    info = "video,fps,sample_fps,count,sample_count\nval_1,30.0,10.0,300.0,100\nval_2,25.0,10.0,200.0,80\n"
    (small / "val_video_info.csv").write_text(info)
    frames = thumos_files.thumos_frames(
        small / "val_video_info.csv", small / "val_Annotation.csv", small / "Class_Index_Detection.txt"
    )
    assert frames == {"val_1": (100, [(45.0, 60.0, 2), (5.0, 60.0, 1)]), "val_2": (80, [(6.0, 72.0, 1)])}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("val_Annotation.csv", "4.5", "x", r"val_Annotation\.csv, line 2: .* must be numbers"),
        ("val_Annotation.csv", "4.5", "7", "line 2: start 7 is not before end 6"),
        ("val_Annotation.csv", ",9,", ",8,", "line 2: class number 8 is not in the class index"),
        ("val_Annotation.csv", ",9,", ",nan,", "line 2: .* must be numbers"),
        ("val_Annotation.csv", "4.5", "nan", "line 2: .* must be numbers"),
        ("val_Annotation.csv", ",4.5,6.0,", ",4.5,inf,", "line 2: .* must be numbers"),
        ("val_Annotation.csv", "135,180", "135,nan", "line 2: .* must be numbers"),
        ("val_Annotation.csv", "4.5", "-4.5", "line 2: start -4.5 is not before end 6, or below 0"),
        ("val_Annotation.csv", "4.5", "6.0", "line 2: start 6 is not before end 6"),
        ("val_Annotation.csv", "BasketballDunk", "HighJump", "line 2: class number 9 is BasketballDunk, not HighJump"),
        ("val_Annotation.csv", ",9,", ",0,", "line 2: class number 0 is Ambiguous, not BasketballDunk"),
        ("val_Annotation.csv", "type_idx", "index", "no column type_idx"),
        ("val_Annotation.csv", "val_1", "../val_1", "line 2: .* is no path below"),
        ("Class_Index_Detection.txt", "7 ", "seven ", "line 1: expected `number name`, found 'seven BaseballPitch'"),
        ("Class_Index_Detection.txt", "9 ", "7 ", "line 2: '7 BasketballDunk' repeats a number or name"),
        ("Class_Index_Detection.txt", "BasketballDunk", "BaseballPitch", "line 2: '9 BaseballPitch' repeats"),
        ("Class_Index_Detection.txt", "9 ", "0 ", "takes 0, which is Ambiguous"),
        ("Class_Index_Detection.txt", "7 BaseballPitch\n9 BasketballDunk\n", "", "names no class"),
    ],
)
def test_bad_annotations_are_refused(small, file, old, new, message):
    text = (small / file).read_text()
    assert old in text
    (small / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        thumos.thumos14(small)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "x", ""])
@pytest.mark.parametrize("column", ["count", "sample_count"])
def test_bad_frame_counts_are_refused(small, column, value):
    info = {"video": "val_1", "fps": "30.0", "sample_fps": "10.0", "count": "300.0", "sample_count": "100"}
    info[column] = value
    (small / "val_video_info.csv").write_text(f"{','.join(info)}\n{','.join(info.values())}\n")
    with pytest.raises(UserError, match=r"val_video_info\.csv, line 2: .* must be (numbers|above 0)"):
        thumos_files.thumos_frames(
            small / "val_video_info.csv", small / "val_Annotation.csv", small / "Class_Index_Detection.txt"
        )


def test_missing_annotations_are_named(small):
    for name, message in [
        ("test_Annotation.csv", r"no test_Annotation\.csv in"),
        ("Class_Index_Detection.txt", "no `Class Index_Detection.txt` in"),
        ("val_Annotation.csv", r"no val_Annotation\.csv in .* --annotations"),
    ]:
        (small / name).unlink()
        with pytest.raises(UserError, match=message):
            thumos.thumos14(small)
