import os
from pathlib import Path

import pytest

from genkd.errors import UserError
from genkd.preprocessing import layouts


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def frames(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "image_00001.jpg").write_bytes(b"x")
    return folder


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def counts(found, *splits: str) -> list[int]:
    return [sum(video.split == split for video in found.videos) for split in splits]


# ---------------------------------------------------------------------------------------------------------- HMDB51


@pytest.fixture(scope="module")
def hmdb51_root(real_data, tmp_path_factory):
    """Every video that the official lists name, as an empty file."""
    root = tmp_path_factory.mktemp("hmdb51")
    for listing in (real_data / "splits" / "hmdb51").glob("*_test_split1.txt"):
        folder = root / listing.name.removesuffix("_test_split1.txt")
        folder.mkdir()
        for line in listing.read_text().splitlines():
            (folder / line.rsplit(maxsplit=1)[0]).touch()
    return root


@pytest.mark.real
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_the_official_hmdb51_lists_are_read(real_data, hmdb51_root, fold):
    found = layouts.hmdb51(hmdb51_root, fold=fold, annotations=real_data / "splits" / "hmdb51")
    # 70 training and 30 test videos of each of 51 classes (Kuehne et al., ICCV 2011)
    assert counts(found, "train", "test") == [3570, 1530]
    assert (len(found.classes), found.classes[0], found.classes[-1]) == (51, "brush_hair", "wave")
    per_class = [sum(v.label == label and v.split == "test" for v in found.videos) for label in range(51)]
    assert per_class == [30] * 51
    assert not found.rejected
    assert all(v.key.startswith(found.classes[v.label] + "/") for v in found.videos)


@pytest.mark.real
def test_odd_names_of_hmdb51_are_kept(real_data, hmdb51_root):
    found = layouts.hmdb51(hmdb51_root, fold=1, annotations=real_data / "splits" / "hmdb51")
    split_of = {video.key: video.split for video in found.videos}
    assert split_of["brush_hair/Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!_brush_hair_h_cm_np1_fr_goo_0"] == "test"
    assert split_of["cartwheel/Geena_und_die_Radschl_ge___;-)_cartwheel_f_cm_np1_fr_med_2"] == "train"
    assert split_of["chew/#2_Gum_chew_h_nm_np1_fr_med_0"] == "train"
    assert "chew/#2_Gum_chew_h_nm_np1_fr_med_1" not in split_of  # marked 0


def test_hmdb51_records_what_its_lists_and_folders_disagree_on(tmp_path):
    root = tree(tmp_path, "hmdb51_org/run/a b & (c)!.avi", "hmdb51_org/run/unused.avi", "hmdb51_org/run/new.avi")
    frames(root / "hmdb51_org" / "flat")
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    write(lists / "run_test_split2.txt", "a b & (c)!.avi 2 \nunused.avi 0 \ngone.avi 1 \nflat.avi 1")
    found = layouts.hmdb51(root, fold=2, source_fps=30)
    assert [(v.key, v.split, v.fps) for v in found.videos] == [
        ("flat", "train", 30), ("run/a b & (c)!", "test", None),
    ]  # fmt: skip
    assert {r.path: r.reason for r in found.rejected} == {
        "run/gone.avi": "listed in run_test_split2.txt, but there is no such file",
        "run/new.avi": "not in a list of split 2",
    }


def test_hmdb51_refuses_lists_that_make_no_sense(tmp_path):
    root = tree(tmp_path, "run/a.avi")
    with pytest.raises(UserError, match=r"no CLASS_test_split4\.txt.*--annotations"):
        layouts.hmdb51(root, fold=4)
    write(root / "run_test_split1.txt", "a.avi 1\na.avi\n")
    with pytest.raises(UserError, match=r"run_test_split1\.txt, line 2: expected `NAME\.avi 0\|1\|2`, found 'a\.avi'"):
        layouts.hmdb51(root)
    write(root / "run_test_split1.txt", "b.avi 1\n")
    with pytest.raises(UserError, match="is ROOT the right folder"):
        layouts.hmdb51(root)


# ------------------------------------------------------------------------------------------------------- CSV files


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na/1.mp4,walk\n2.mkv,run\n",
        b'\xef\xbb\xbfFilename,Class\r\n\r\n"a/1.mp4","walk"\r\n2.mkv,run\r\n,\r\n',
        "a/1.mp4,walk\n2.mkv,run\n",
        "name,video\nwalk, a/1\nrun, 2\n",
    ],
)
def test_csv_rows_name_path_and_label(tmp_path, text):
    found = layouts.csv_list(tree(tmp_path / "root", "a/1.mp4", "2.mkv"), write(tmp_path / "list.csv", text))
    assert found.classes == ("run", "walk")
    assert [(v.key, v.label, v.split, v.start_s, v.end_s) for v in found.videos] == [
        ("2", 0, "train", None, None),
        ("a/1", 1, "train", None, None),
    ]


def test_csv_splits_come_from_column_option_or_file_name(tmp_path):
    root = tree(tmp_path / "root", *(f"{n}.mp4" for n in range(5)))
    with_column = write(tmp_path / "a.csv", "path,label,subset\n0.mp4,x,testing\n1.mp4,x,\n")
    val, other = write(tmp_path / "val.csv", "2.mp4,x\n"), write(tmp_path / "mine.csv", "3.mp4,x\n")

    def splits(**options):
        return [v.split for v in layouts.csv_list(root, [with_column, val, other], **options).videos]

    assert splits() == ["testing", "train", "val", "train"]
    assert splits(split="extra") == ["testing", "extra", "extra", "extra"]
    with pytest.raises(UserError, match="cannot be the name of a split"):
        splits(split="../up")


def test_csv_segments_get_keys_of_their_own(tmp_path):
    root = tree(tmp_path / "root", "a.mp4")
    listing = write(tmp_path / "l.csv", "a.mp4,x,12,22\na.mp4,y,12.5,22\na.mp4,x,,7\na.mp4,x,30\na.mp4,x\n")
    found = layouts.csv_list(root, listing)
    assert [(v.key, v.start_s, v.end_s, v.label) for v in found.videos] == [
        ("a", None, None, 0),
        ("a_000000_000007", None, 7, 0),
        ("a_000012.500_000022.000", 12.5, 22, 1),
        ("a_000012_000022", 12, 22, 0),
        ("a_000030_end", 30, None, 0),
    ]


def test_kinetics_rows_find_cut_and_whole_files(tmp_path):
    root = tree(
        tmp_path / "root",
        "-cut_1_000012_000022.mp4",
        "riding a bike/cut2_000001_000011.webm",
        "val/riding_a_bike/cut3_000002_000012.mp4",
        "val/whole.mkv",
        "whole.description",
    )
    frames(root / "val" / "cut4_000003_000013")
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    rows = ["-cut_1,12,22", "cut2,1,11", "cut3,2,12", "cut4,3,13", "whole,4,14", "gone,5,15"]
    listing = write(tmp_path / "validate.csv", header + "".join(f"riding a bike,{row},val,0\n" for row in rows))
    found = layouts.csv_list(root, listing, source_fps=5)
    assert [(v.key, v.start_s, v.end_s) for v in found.videos] == [
        ("-cut_1_000012_000022", None, None),
        ("riding a bike/cut2_000001_000011", None, None),
        ("val/cut4_000003_000013", None, None),
        ("val/riding_a_bike/cut3_000002_000012", None, None),
        ("val/whole_000004_000014", 4, 14),
    ]
    assert [(r.path, r.reason) for r in found.rejected] == [
        ("gone", "listed in validate.csv, line 7, but there is no such file")
    ]


def test_numbers_are_class_numbers(tmp_path):
    root = tree(tmp_path / "root", "a.mp4", "b.mp4", "c.mp4")
    listing = write(tmp_path / "l.csv", "a.mp4,0\nb.mp4,2\nc.mp4,-1\n")
    found = layouts.csv_list(root, listing)
    assert found.classes == ("0", "1", "2")
    assert [v.label for v in found.videos] == [0, 2, -1]
    for text in ("run\nwalk\nsit down\n", "1 run\n2 walk\n3 sit down\n"):
        found = layouts.csv_list(root, listing, classes=write(tmp_path / "classes.txt", text))
        assert found.classes == ("run", "walk", "sit down")
    with pytest.raises(UserError, match=r"l\.csv, line 2: class number 2 is not in -1 to 1"):
        layouts.csv_list(root, listing, classes=write(tmp_path / "classes.txt", "run\nwalk\n"))


def test_a_class_file_orders_named_labels(tmp_path):
    root = tree(tmp_path / "root", "a.mp4", "b.mp4")
    listing = write(tmp_path / "l.csv", "a.mp4,run\nb.mp4,walk\n")
    found = layouts.csv_list(root, listing, classes=write(tmp_path / "classes.txt", "walk\nrun\n"))
    assert (found.classes, [v.label for v in found.videos]) == (("walk", "run"), [1, 0])
    with pytest.raises(UserError, match=r"line 1: class 'run' is not in .*classes\.txt"):
        layouts.csv_list(root, listing, classes=write(tmp_path / "classes.txt", "walk\n"))
    with pytest.raises(UserError, match="names a class twice"):
        layouts.csv_list(root, listing, classes=write(tmp_path / "classes.txt", "walk\nwalk\n"))


def test_names_may_hold_commas_newlines_and_other_signs(tmp_path):
    names = ["a, b.mp4", "line\nbreak.mp4", '"quoted".mp4', "é & [x]!.mp4", "100%.mp4"]
    root = tree(tmp_path / "root", *names)
    quoted = ['"{}",x\n'.format(name.replace('"', '""')) for name in names]
    found = layouts.csv_list(root, write(tmp_path / "l.csv", "".join(quoted)))
    assert {v.path for v in found.videos} == {str(root / name) for name in names}
    assert sorted(v.key for v in found.videos) == ['"quoted"', "100%25", "a, b", "line%0Abreak", "é & [x]!"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,start\na.mp4,x,1\na.mp4,x,soon\n", r"l\.csv, line 3: start 'soon' is no number"),
        ("a.mp4,x,-1,2\n", r"l\.csv, line 1: start '-1' is not in the video"),
        ("a.mp4,x,0,inf\n", r"line 1: end 'inf' is not in the video"),
        ("a.mp4,x,5,5\n", r"line 1: start 5 is not before end 5"),
        ("a.mp4,x,,0\n", r"line 1: start 0 is not before end 0"),
        ("label,when\nx,1\n", "no column path, video, filename or youtube_id"),
        ("a.mp4,x,1,2,3\n", "5 columns without a header"),
        ("path,label\na.mp4,\n", "line 2: no label"),
        ("a.mp4,x\na.mp4,x\n", r"a\.mp4 is listed twice"),
        ("a.mp4,x\na.avi,x\n", r"two sources have the key 'a'"),
        ("../a.mp4,x\n", r"line 1: '\.\./a\.mp4' is no path below"),
        ("/etc/passwd,x\n", "line 1: '/etc/passwd' is no path below"),
        (",x\n", "line 1: '' is no path below"),
        ("a.mp4,100000\n", "class number 100000"),
        ("path,label,split\na.mp4,x,../up\n", "line 2: '../up' cannot be the name of a split"),
        ("b.mp4,x\n", r"no listed video is below .*line 1 names 'b\.mp4'"),
        ("\n", "no video is listed"),
        (b"a.mp4,\xff\n", "not a UTF-8 text file"),
        (b"a.mp4," + b"x" * 200_000, "line 1: not CSV"),
    ],
)
def test_a_bad_csv_file_is_refused(tmp_path, text, message):
    root = tree(tmp_path / "root", "a.mp4", "a.avi")
    with pytest.raises(UserError, match=message):
        layouts.csv_list(root, write(tmp_path / "l.csv", text))
    with pytest.raises(UserError, match="there is no list file"):
        layouts.csv_list(root, tmp_path / "none.csv")


# ------------------------------------------------------------------------------------------------------ list files


def test_list_lines_of_every_form(tmp_path):
    root = tree(tmp_path / "root", "a.mp4", "b/c d 3.mp4", "tab 1.npy", "plain 7.mp4", "odd.bin", "x/e.mp4")
    for name in ("v_frames_g01", "#2_Gum_chew 1", "with 5"):
        frames(root / name)
    lines = [
        "# a comment 1",
        "a.mp4 2",
        "",
        "b/c d 3.mp4 0",
        "tab 1.npy\t1",
        "plain 7.mp4",
        "v_frames_g01 119 2",
        "#2_Gum_chew 1 80 1",
        "with 5 1",
        "odd.bin 0",
        f"{root}/x/e.mp4 0",
        "gone.mp4 44 1",
    ]
    found = layouts.list_file(root, write(tmp_path / "train_rgb_split1.txt", "\r\n".join(lines)), source_fps=25)
    assert {v.key: (v.label, v.fps) for v in found.videos} == {
        "a": (2, None), "b/c d 3": (0, None), "tab 1": (1, 25), "plain 7": (-1, None), "v_frames_g01": (2, 25),
        "#2_Gum_chew 1": (1, 25), "with 5": (1, 25), "odd.bin": (0, None), "x/e": (0, None),
    }  # fmt: skip
    assert found.classes == ("0", "1", "2")
    assert [(r.path, r.reason) for r in found.rejected] == [
        ("gone.mp4 44", "listed in train_rgb_split1.txt, line 12, but there is no such file")
    ]


def test_list_splits_come_from_option_or_file_name(tmp_path):
    root = tree(tmp_path / "root", "1.mp4", "2.mp4", "3.mp4", "4.mp4")
    files = [
        write(tmp_path / name, f"{number}.mp4 0\n")
        for number, name in enumerate(["trainlist01.txt", "val_rgb_split1.txt", "test.txt", "mine.txt"], 1)
    ]
    assert [v.split for v in layouts.list_file(root, files).videos] == ["train", "val", "test", "train"]
    assert {v.split for v in layouts.list_file(root, files, split="new").videos} == {"new"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\n../b.mp4 0\n", r"train\.txt, line 2: '\.\./b\.mp4' is no path below"),
        ("/etc/passwd 0\n", "line 1: '/etc/passwd' is no path below"),
        ("a.mp4\twalk\n", "line 1: the last field, 'walk', is no class number"),
        ("a.mp4 0\na.mp4 1\n", r"a\.mp4 is listed twice"),
        ("a.mp4 -2\n", "line 1: class number -2 is not in -1"),
        ("a.mp4 walk\n", r"no listed video is below .*line 1 names 'a\.mp4 walk'"),
        ("# ../only a comment\t-\n", "no video is listed"),
    ],
)
def test_a_bad_list_file_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        layouts.list_file(tree(tmp_path / "root", "a.mp4"), write(tmp_path / "train.txt", text))


@pytest.mark.real
def test_the_lists_of_the_reference_are_read(real_data, tmp_path):
    lists = [real_data / "splits" / "ucf101" / f"{split}_rgb_split1.txt" for split in ("train", "val")]
    root = tmp_path / "frames"
    for line in "".join(listing.read_text() for listing in lists).splitlines():
        frames(root / line.split()[0])
    found = layouts.list_file(root, lists, classes=real_data / "splits" / "ucf101" / "classInd.txt", source_fps=25)
    assert counts(found, "train", "val") == [9537, 3783]
    assert len(found.classes) == 101 and found.classes[0] == "ApplyEyeMakeup"
    assert all(video.key.split("_")[1] == found.classes[video.label] for video in found.videos[:500])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "root", "a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = layouts.list_file(root, write(tmp_path / "train.txt", "a.mp4 0\nlocked/b.mp4 0\n"))
    assert [r.reason for r in found.rejected] == [
        "listed in train.txt, line 2, but its folder cannot be read: Permission denied"
    ]
