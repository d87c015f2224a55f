"""The commands around data sets as a user runs them, one after the other's results."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from genkd.preprocessing.shards import Dataset

SMALL = ("--codec", "mjpeg", "--short-side", 48)


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory):
    """Two classes of UCF101's layout with lists of their own, numbered as the official ones are."""
    root = tmp_path_factory.mktemp("few") / "UCF101"
    names = ("Bob", "Orbit")
    for name in names:
        shutil.copytree(videos / "UCF-101" / name, root / name)
    (root / "classInd.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    files = sorted(f"{path.parent.name}/{path.name}" for path in root.glob("*/*.avi"))
    for fold in (1, 2, 3):
        (root / f"trainlist{fold:02d}.txt").write_text("".join(f"{f} 1\n" for f in files if "_g01_" in f))
        (root / f"testlist{fold:02d}.txt").write_text("".join(f"{f}\n" for f in files if "_g01_" not in f))
    return root


@pytest.fixture(scope="module")
def data(few, tmp_path_factory):
    from genkd.preprocessing import sources
    from genkd.preprocessing.convert import convert
    from genkd.preprocessing.video import VideoSettings

    out = tmp_path_factory.mktemp("data") / "ucf"
    convert(sources.ucf101(few), out, VideoSettings("vp9", short_side=48, gop=8), workers=0)
    return out


def test_flow_of_a_data_set_has_its_keys_and_is_refused_twice(data, tmp_path, genkd):
    genkd("flow", data, tmp_path / "flow", "--method", "dis")
    rgb, flow = Dataset.open(data), Dataset.open(tmp_path / "flow")
    for column in ("key", "split", "label", "num_frames", "fps", "height"):
        assert flow.table[column].equals(rgb.table[column]), column
    assert flow.table["width"].to_pylist() == [2 * width for width in rgb.table["width"].to_pylist()]
    assert flow.info["modality"] == "flow" and flow.info["video"]["bound"] == 20.0
    told = genkd("flow", tmp_path / "flow", tmp_path / "again", check=False)
    assert told.returncode == 1 and "holds flow already" in told.stderr
    told = genkd("shard", "dataset", tmp_path / "flow", tmp_path / "small", "--short-side", 32, check=False)
    assert told.returncode == 1 and "flow cannot be scaled" in told.stderr
    genkd("shard", "dataset", tmp_path / "flow", tmp_path / "copied", "--codec", "mjpeg")
    copied = Dataset.open(tmp_path / "copied")
    assert copied.info["modality"] == "flow" and copied.table["width"].equals(flow.table["width"])
    assert "flow, h264" in genkd("inspect", tmp_path / "flow").stdout


def test_frames_then_lists_then_shards_again(few, data, tmp_path, genkd):
    frames = tmp_path / "frames"
    told = genkd("frames", few, frames, "--height", 48).stdout
    assert "10 videos, 400 frames" in told
    folder = next(path for path in sorted((frames / "Bob").iterdir()))
    assert (folder / "n_frames").read_text() == "40" and len(list(folder.glob("image_*.jpg"))) == 40
    genkd("lists", "ucf101", frames, tmp_path / "lists", "--annotations", few, "--fold", 1)
    lines = (tmp_path / "lists" / "val_rgb_split1.txt").read_text().splitlines()
    official = (few / "testlist01.txt").read_text().split()
    assert [line.split()[0] for line in lines] == [name.split("/")[1].removesuffix(".avi") for name in official]
    assert {line.split()[1] for line in lines} == {"40"}
    told = genkd("shard", "ucf101", frames, tmp_path / "again", "--annotations", few, *SMALL, check=False)
    assert told.returncode == 1 and "--source-fps" in told.stderr and not (tmp_path / "again").exists()
    genkd("shard", "ucf101", frames, tmp_path / "again", "--annotations", few, "--source-fps", 25, *SMALL)
    again = Dataset.open(tmp_path / "again")
    assert again.table["key"].equals(Dataset.open(data).table["key"])
    assert set(again.table["num_frames"].to_pylist()) == {40} and set(again.table["fps"].to_pylist()) == {25.0}


def test_arrays_and_their_flow_become_shards_with_annotations(videos, tmp_path, genkd):
    root = tmp_path / "thumos"
    (root / "validation").mkdir(parents=True)
    (root / "test").mkdir()
    sources = sorted((videos / "UCF-101" / "Bob").iterdir())
    for number, (split, long) in enumerate((("val", "validation"), ("test", "test"))):
        name = f"video_{long}_0000001"
        shutil.copy(sources[number], root / long / f"{name}.avi")
        with open(root / f"{split}_Annotation.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["video", "type", "type_idx", "start", "end", "startFrame", "endFrame"])
            rows.writerow([name, "Billiards", 12, 0.2, 0.9, 6, 27])
            rows.writerow([name, "Ambiguous", 0, 1.0, 1.2, 30, 36])
    (root / "Class Index_Detection.txt").write_text("7 BaseballPitch\n12 Billiards\n")
    arrays = tmp_path / "arrays"
    assert "2 videos, 32 frames" in genkd("npy", root, arrays).stdout  # 1.6 s at 10 frames a second, twice
    found = sorted(arrays.rglob("*.npy"))
    assert [np.load(path).shape for path in found] == [(16, 112, 112, 3)] * 2
    genkd("npy", arrays, tmp_path / "flows", "--flow", "farneback")
    assert [np.load(path).shape for path in sorted((tmp_path / "flows").rglob("*.npy"))] == [(16, 112, 112, 2)] * 2
    genkd("shard", "thumos14", root, tmp_path / "data", "--codec", "mjpeg")
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.classes == ["Background", "BaseballPitch", "Billiards"]
    assert dataset.table["annotations"].to_pylist() == [[{"start_s": 0.2, "end_s": 0.9, "label": 2}]] * 2
    assert {(row["width"], row["height"], row["fps"]) for row in dataset.table.to_pylist()} == {(112, 112, 10.0)}
    told = json.loads(genkd("shard", "thumos14", arrays, tmp_path / "again", "--annotations", root, "--source-fps", 10,
                            "--codec", "mjpeg", "--json").stdout)  # fmt: skip
    assert {split: entry["frames"] for split, entry in told["splits"].items()} == {"test": 16, "val": 16}


def test_untrimmed_videos_become_shards(tmp_path, genkd):
    told = genkd(
        "synth", "videos", "--untrimmed", "--validation-videos", 2, "--test-videos", 1, "--seconds", "9-10",
        "--size", "64x48", "--classes", "Slide,Spin,Pulse", "--actions-per-minute", 20, "--action-seconds", "1-2",
        "--gap-seconds", 0.5, "--mixed-share", 0, "--workers", 0,
    ).stdout  # fmt: skip
    # 3 actions in each video, whose class is that of its number: Pulse, then Slide.
    assert "3 classes, 2 validation videos with 6 actions and 1 test videos with 3 actions" in told
    assert "note: no validation video has Spin\nnote: no test video has Slide, Spin\n" in told
    told = genkd("shard", "thumos14", "videos", "data", "--codec", "mjpeg").stdout
    assert "videos test 1, val 2; 4 classes" in told and "note: no video of class Spin could be used" in told
    found = json.loads(genkd("inspect", "data", "--json").stdout)
    assert found["actions"] == {
        "Background": {"test": 0, "val": 0}, "Pulse": {"test": 3, "val": 3}, "Slide": {"test": 0, "val": 3},
        "Spin": {"test": 0, "val": 0},
    }  # fmt: skip
    assert (found["width"]["max"], found["fps"]["max"]) == (112, 10)
    shown = genkd("inspect", "data").stdout
    assert "actions" in shown and "Slide" in shown
    genkd("show", "data", "--key", "video_test_0000001", "--epoch", 1, "data.clip_length=32", "data.size=96")
    assert (tmp_path / "clips.png").stat().st_size > 10_000


def test_csv_and_list_files(few, tmp_path, genkd):
    names = sorted(f"{path.parent.name}/{path.name}" for path in few.glob("*/*.avi"))
    (tmp_path / "mine.csv").write_text("path,label,start,end\n" + "".join(
        f"{name},{name.split('/')[0]},0.4,1.2\n" for name in names))  # fmt: skip
    genkd("shard", "csv", few, tmp_path / "cut", "--list", tmp_path / "mine.csv", *SMALL)
    cut = Dataset.open(tmp_path / "cut")
    assert cut.classes == ["Bob", "Orbit"] and set(cut.table["num_frames"].to_pylist()) == {20}
    (tmp_path / "test.txt").write_text("".join(f"{name} 0\n" for name in names[:3]))
    genkd("shard", "list", few, tmp_path / "listed", "--list", tmp_path / "test.txt", *SMALL)
    assert Dataset.open(tmp_path / "listed").info["splits"]["test"]["videos"] == 3


def test_a_data_set_is_copied_and_exported(data, tmp_path, genkd):
    told = genkd("shard", "dataset", data, tmp_path / "copy", "--codec", "copy").stdout
    assert "10 of 10 videos were copied" in told
    copy, original = Dataset.open(tmp_path / "copy"), Dataset.open(data)
    for column in ("key", "split", "label", "num_frames", "gop_frames", "codec", "width"):
        assert copy.table[column].equals(original.table[column]), column
    genkd("export-parquet", data, tmp_path / "parquet")
    duckdb = pytest.importorskip("duckdb", reason="needs the package duckdb")
    query = f"select label, count(*) from '{tmp_path}/parquet/data/*.parquet' group by 1 order by 1"
    assert duckdb.sql(query).fetchall() == [(0, 5), (1, 5)]
    table = pq.read_table(tmp_path / "parquet" / "data")
    assert sorted(table["key"].to_pylist()) == sorted(original.table["key"].to_pylist())


def test_what_does_not_fit_is_encoded_and_counted(few, tmp_path, genkd):
    told = genkd("shard", "ucf101", few, tmp_path / "data", "--codec", "copy").stdout
    assert "0 of 10 videos were copied, the others encoded as h264: 10 for codec" in told
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert sum(info["reencoded"].values()) == 10
    assert set(Dataset.open(tmp_path / "data").table["codec"].to_pylist()) == {"h264"}
