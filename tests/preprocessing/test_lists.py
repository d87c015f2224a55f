import dataclasses

import pytest

from genkd.errors import UserError
from genkd.preprocessing import shards, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.interop import dataset_sources, write_frames
from genkd.preprocessing.lists import frame_counter, hmdb51_lists, ucf101_lists
from genkd.preprocessing.video import VideoSettings


@pytest.fixture
def data(shard_sets):
    return shard_sets("mjpeg")


def some(videos, *numbers):
    """Synthetic videos as a source list."""
    source = sources.ucf101(videos)
    return dataclasses.replace(source, videos=tuple(source.videos[number] for number in numbers))


def lines_of(path):
    return path.read_text().splitlines()


@pytest.fixture
def ucf_splits(real_data):
    return real_data / "splits" / "ucf101"


@pytest.fixture
def ucf_counts(ucf_splits):
    """The reference's frame counts by video name."""
    lines = [line.split() for kind in ("train", "val") for line in lines_of(ucf_splits / f"{kind}_rgb_split1.txt")]
    return {name: int(frames) for name, frames, _ in lines}


@pytest.mark.real
def test_ucf101_lists_are_those_of_the_reference(ucf_splits, ucf_counts, tmp_path):
    lists = ucf101_lists(ucf_counts, ucf_splits, tmp_path / "out")
    assert [(entry.path.name, entry.videos) for entry in lists] == [
        ("train_rgb_split1.txt", 9537), ("val_rgb_split1.txt", 3783), ("train_rgb_split2.txt", 9586),
        ("val_rgb_split2.txt", 3734), ("train_rgb_split3.txt", 9624), ("val_rgb_split3.txt", 3696),
    ]  # fmt: skip
    for name in ("train_rgb_split1.txt", "val_rgb_split1.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (ucf_splits / name).read_bytes()


@pytest.mark.real
def test_ucf101_lists_from_a_folder_of_frames(ucf_splits, ucf_counts, tmp_path):
    for number, line in enumerate(lines_of(ucf_splits / "testlist01.txt")):
        name = line.removesuffix(".avi")
        # Alternately CLASS/NAME and NAME, both of which the original's tools make.
        folder = tmp_path / "frames" / (name if number % 2 else name.rpartition("/")[2])
        folder.mkdir(parents=True)
        (folder / "n_frames").write_text(str(ucf_counts[name.rpartition("/")[2]]))
    lists = ucf101_lists(tmp_path / "frames", ucf_splits, tmp_path / "out", folds=[1], skip_missing=True)
    assert (tmp_path / "out" / "val_rgb_split1.txt").read_bytes() == (ucf_splits / "val_rgb_split1.txt").read_bytes()
    assert lists[0].videos == 0 and len(lists[0].missing) == 9537


def test_lists_from_frames_from_a_data_set_and_from_images_without_n_frames(videos, data, tmp_path):
    official = videos / "ucfTrainTestlist"
    ucf101_lists(data, official, tmp_path / "from-data", folds=[1])
    write_frames(dataset_sources(data), tmp_path / "frames", height=0, workers=0)
    ucf101_lists(tmp_path / "frames", official, tmp_path / "from-frames", folds=[1])
    for path in (tmp_path / "frames").rglob("n_frames"):
        path.unlink()
    ucf101_lists(tmp_path / "frames", official, tmp_path / "from-images", folds=[1], modality="flow")
    first = (tmp_path / "from-data" / "train_rgb_split1.txt").read_text()
    assert first.splitlines()[0] == f"{(official / 'trainlist01.txt').read_text().split('/')[1].split('.')[0]} 40 0"
    assert (tmp_path / "from-frames" / "train_rgb_split1.txt").read_text() == first
    assert (tmp_path / "from-images" / "train_flow_split1.txt").read_text() == first


def test_source_frames_or_stored_frames_of_a_data_set(videos, tmp_path):
    convert(some(videos, 0, 1), tmp_path / "data", VideoSettings("mjpeg", short_side=48, fps=12.5), workers=1)
    data = shards.Dataset.open(tmp_path / "data")
    key = data.table["key"][0].as_py()
    assert frame_counter(data)(key) == 40 and frame_counter(data, "num_frames")(key) == 20
    with pytest.raises(UserError, match="not in 'label'"):
        frame_counter(data, "label")


def test_missing_videos_are_refused_by_number_and_name(videos, tmp_path):
    official = videos / "ucfTrainTestlist"
    names = [line.split()[0][:-4] for line in lines_of(official / "trainlist01.txt")]
    counts = dict.fromkeys(names[2:], 7)
    with pytest.raises(UserError, match=rf"^2 of {len(names)} videos .*trainlist01.txt.*{names[0]}.*--skip-missing"):
        ucf101_lists(counts, official, tmp_path / "out", folds=[1])
    assert not (tmp_path / "out").exists()
    lists = ucf101_lists(counts, official, tmp_path / "out", folds=[1], skip_missing=True)
    assert lists[0].missing == tuple(names[:2]) and lists[0].videos == len(names) - 2


def test_user_errors_of_lists(videos, tmp_path):
    official = videos / "ucfTrainTestlist"
    with pytest.raises(UserError, match="there is no folder of frames"):
        ucf101_lists(tmp_path / "nowhere", official, tmp_path / "out")
    with pytest.raises(UserError, match=r"no list file .*trainlist09.txt"):
        ucf101_lists({}, official, tmp_path / "out", folds=[9])
    with pytest.raises(UserError, match=r"no CLASS_test_split1.txt in"):
        hmdb51_lists({}, tmp_path, tmp_path / "out")
    (tmp_path / "frames" / "v").mkdir(parents=True)
    (tmp_path / "frames" / "v" / "n_frames").write_text("many")
    with pytest.raises(UserError, match="holds no number of frames"):
        frame_counter(tmp_path / "frames")("v")
    (tmp_path / "clap_test_split1.txt").write_text("a.avi 3\n")
    with pytest.raises(UserError, match=r"clap_test_split1.txt, line 1: expected `NAME.avi 0\|1\|2`"):
        hmdb51_lists({}, tmp_path, tmp_path / "out")


@pytest.mark.real
def test_hmdb51_lists_of_the_official_splits(real_data, tmp_path):
    splits = real_data / "splits" / "hmdb51"
    marks = {}
    for path in sorted(splits.glob("*_test_split1.txt")):
        for line in lines_of(path):
            name, mark = line.split()
            marks[f"{path.name[: -len('_test_split1.txt')]}/{name[:-4]}"] = int(mark)
    counts = {name: 30 + number % 70 for number, name in enumerate(marks)}
    lists = hmdb51_lists(counts, splits, tmp_path)
    sizes = {entry.path.name: entry.videos for entry in lists}
    for fold in (1, 2, 3):
        assert (sizes[f"train_rgb_split{fold}.txt"], sizes[f"val_rgb_split{fold}.txt"]) == (3570, 1530)
    assert (sizes["hmdb51_train.txt"], sizes["hmdb51_test.txt"]) == (3570, 1530)
    assert sizes["hmdb51_val.txt"] == len(marks) - 5100
    classes = (splits / "class_list.txt").read_text().split()
    for kind, wanted in (("train", 1), ("test", 2), ("val", 0)):  # what the original's script does with frame folders
        lines = [
            f"{name} {label}"
            for label, class_name in enumerate(sorted(classes))
            for name in sorted(name for name in marks if name.startswith(f"{class_name}/"))
            if marks[name] == wanted
        ]
        assert (tmp_path / f"hmdb51_{kind}.txt").read_text().splitlines() == lines
    first = lines_of(tmp_path / "train_rgb_split1.txt")[0].rsplit(" ", 2)
    official = [line.split()[0] for line in lines_of(splits / "brush_hair_test_split1.txt") if line.split()[1] == "1"]
    assert first == [official[0][:-4], str(counts[f"brush_hair/{official[0][:-4]}"]), "0"]


def test_hmdb51_names_keep_their_dots_and_unused_videos_may_be_absent(tmp_path):
    (tmp_path / "wave_test_split2.txt").write_text("b. c(1)_wave.avi 1 \nunused.avi 0\na!&.avi 1 \nt.avi 2\n")
    (tmp_path / "clap_test_split2.txt").write_text("x.avi 2\n")
    counts = {"wave/b. c(1)_wave": 5, "wave/a!&": 6, "t": 7, "clap/x": 8}
    lists = hmdb51_lists(counts, tmp_path, tmp_path / "out", folds=[2], fold=2)
    read = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert read == {
        "train_rgb_split2.txt": "b. c(1)_wave 5 1\na!& 6 1\n",
        "val_rgb_split2.txt": "x 8 0\nt 7 1\n",
        "hmdb51_train.txt": "wave/a!& 1\nwave/b. c(1)_wave 1\n",
        "hmdb51_test.txt": "clap/x 0\nwave/t 1\n",
        "hmdb51_val.txt": "",
    }
    assert lists[-1].missing == ("wave/unused",)
