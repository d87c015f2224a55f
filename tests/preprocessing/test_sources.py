import os
from pathlib import Path

import pytest

from genkd.errors import UserError
from genkd.preprocessing import sources


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_folder_takes_classes_from_folders_and_keys_from_paths(tmp_path):
    found = sources.folder(tree(tmp_path, "walk/b.mp4", "walk/deep/a.AVI", "run/c.mkv"))
    assert found.classes == ("run", "walk")
    assert [(v.key, v.label, v.split) for v in found.videos] == [
        ("run/c", 0, "train"),
        ("walk/b", 1, "train"),
        ("walk/deep/a", 1, "train"),
    ]


def test_folder_reads_split_folders(tmp_path):
    found = sources.folder(tree(tmp_path, "train/a/1.mp4", "test/a/2.mp4", "test/b/3.mp4", "train/b/4.mp4"))
    assert found.classes == ("a", "b")
    assert {v.key: v.split for v in found.videos}["test/b/3"] == "test"


def test_test_fold_keeps_groups_together(tmp_path):
    names = [f"{c}/{c}{n:03d}.mp4" for c in ("x", "y") for n in range(50)]
    folds = []
    for fold in range(1, 6):
        found = sources.folder(tree(tmp_path, *names), test_fold=f"{fold}/5", group_by=r"(\d+)\d$")
        test = {v.key for v in found.videos if v.split == "test"}
        assert len(test) == 20
        assert {key[-3:-1] for key in test} == {f"0{fold - 1}"}
        folds.append(test)
    assert len(set().union(*folds)) == 100


def test_files_that_are_no_videos_are_recorded(tmp_path):
    found = sources.folder(tree(tmp_path, "a/1.mp4", "a/notes.txt", "a/.hidden", "loose.mp4"))
    assert [v.key for v in found.videos] == ["a/1"]
    assert sorted((r.path, r.stage) for r in found.rejected) == [("a/notes.txt", "scan"), ("loose.mp4", "scan")]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a/1.mp4", "a/1.avi"], {}, "two sources have the key 'a/1'"),
        (["a/1.mp4", "b/readme.txt"], {}, "holds no video"),
        (["1.mp4"], {}, "no class folder"),
        (["a/1.mp4"], {"test_fold": "6/5"}, "K/N"),
        (["a/1.mp4"], {"test_fold": "1/5"}, "at least 5 groups"),
        (["a/1.mp4", "a/2.mp4"], {"test_fold": "1/2", "group_by": "("}, "not a regular expression"),
        (["a/1.mp4", "a/2.mp4"], {"test_fold": "1/2", "group_by": "z"}, "does not match"),
        (["a/1.mp4"], {"group_by": "a"}, "--test-fold"),
        (["train/a/1.mp4", "test/a/2.mp4"], {"test_fold": "1/2"}, "already names its splits"),
    ],
)
def test_a_bad_folder_is_refused(tmp_path, names, options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        sources.folder(tree(tmp_path, *names), **options)


def test_a_missing_or_empty_root_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        sources.folder(tmp_path / "none")
    with pytest.raises(UserError, match="is empty"):
        sources.folder(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        sources.folder(Path(tree(tmp_path, "file"), "file"))


def test_ucf101_follows_its_lists(videos):
    found = sources.ucf101(videos)
    assert found.classes == tuple(sorted(found.classes)) and len(found.classes) == 10
    by_split = [sum(v.split == name for v in found.videos) for name in ("train", "test")]
    assert by_split == [10, 40]
    assert found.videos[0].key == "Bob/v_Bob_g01_c01"
    assert not found.rejected


def test_ucf101_records_what_its_lists_and_folders_disagree_on(tmp_path):
    root = tree(tmp_path, "A/v_A_g01_c01.avi", "A/v_A_g09_c01.avi")
    (root / "classInd.txt").write_text("1 A\n")
    (root / "trainlist01.txt").write_text("A/v_A_g01_c01.avi 1\n")
    (root / "testlist01.txt").write_text("A/v_A_g02_c01.avi\n")
    found = sources.ucf101(root)
    assert [v.key for v in found.videos] == ["A/v_A_g01_c01"]
    reasons = {r.path: r.reason for r in found.rejected}
    assert "no such file" in reasons["A/v_A_g02_c01.avi"]
    assert "not in a list" in reasons["A/v_A_g09_c01.avi"]


def frames(folder: Path, *sizes: int) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes, 1):
        (folder / f"image_{number:05d}.jpg").write_bytes(b"x" * size)
    return folder


def test_frame_folders_and_arrays_are_videos(tmp_path):
    tree(tmp_path, "run/array.npy", "run/file.mp4", "run/deep/pictures/a.jpg", "run/array.csv")
    newest = frames(tmp_path / "run" / "jpeg.v1", 3, 4) / "image_00002.jpg"
    os.utime(newest, ns=(7, 2 * 10**18))
    (newest.parent / "n_frames").write_text("2")
    tree(newest.parent, "inner.mp4")
    found = sources.folder(tmp_path, source_fps=12.5)
    assert [(v.key, v.fps, v.size) for v in found.videos] == [
        ("run/array", 12.5, 1), ("run/file", None, 1), ("run/jpeg.v1", 12.5, 7),
    ]  # fmt: skip
    assert found.videos[2].path == str(newest.parent) and found.videos[2].mtime_ns == 2 * 10**18
    assert sorted(r.path for r in found.rejected) == ["run/array.csv", "run/deep/pictures/a.jpg"]
    assert sources.is_frame_folder(newest.parent) and not sources.is_frame_folder(
        tmp_path / "run" / "deep" / "pictures"
    )


def test_a_frame_folder_is_no_class_and_no_split(tmp_path):
    tree(tmp_path, "train/a/1.mp4", "test/a/2.mp4", "test/loose.npy")
    frames(tmp_path / "val", 1)
    frames(tmp_path / "train" / "loose", 1)
    found = sources.folder(tmp_path)
    assert [(v.key, v.split) for v in found.videos] == [("test/a/2", "test"), ("train/a/1", "train")]
    assert {(r.path, r.reason) for r in found.rejected} == {
        (path, "outside any class folder") for path in ("val", "train/loose", "test/loose.npy")
    }


@pytest.mark.parametrize(
    ("there", "key", "fps"),
    [
        ("A/v_1.avi", "A/v_1", None),
        ("A/v_1.avi A/v_1.mkv A/v_1.npy A/v_1/", "A/v_1", None),
        ("A/v_1.mkv A/v_1.npy", "A/v_1", None),
        ("A/v_1.npy A/v_1/", "A/v_1", 25.0),
        ("A/v_1/", "A/v_1", 25.0),
        ("v_1/", "v_1", 25.0),
    ],
)
def test_ucf101_finds_what_stands_for_a_listed_file(tmp_path, there, key, fps):
    for name in there.split():
        if name.endswith("/"):
            frames(tmp_path / name, 1)
        else:
            tree(tmp_path, name)
    (tmp_path / "classInd.txt").write_text("1 A\n")
    (tmp_path / "trainlist01.txt").write_text("A/v_1.avi 1\r\n")
    (tmp_path / "testlist01.txt").write_text("")
    found = sources.ucf101(tmp_path, source_fps=25.0)
    first, *others = there.split()
    assert [(v.key, v.fps, v.path) for v in found.videos] == [(key, fps, str(tmp_path / first))]
    assert {(r.path, r.reason) for r in found.rejected} == {
        (other.rstrip("/"), "another file of this video is used") for other in others
    }


def test_a_list_cannot_lead_out_of_the_root(tmp_path):
    root = tree(tmp_path / "root", "A/1.avi")
    tree(tmp_path, "2.avi")
    (root / "classInd.txt").write_text("1 A\n")
    (root / "trainlist01.txt").write_text("A/1.avi 1\nA/../../2.avi 1\n")
    with pytest.raises(UserError, match=r"trainlist01\.txt, line 2: .* no path below"):
        sources.ucf101(root)


def test_ucf101_wants_its_list_files(tmp_path):
    with pytest.raises(UserError, match=r"classInd\.txt.*--annotations"):
        sources.ucf101(tree(tmp_path, "A/1.avi"))
    (tmp_path / "classInd.txt").write_text("1 A\n3 B\n")
    with pytest.raises(UserError, match="without gaps"):
        sources.ucf101(tmp_path)


def test_folders_that_cannot_be_read_or_appear_twice_are_recorded(tmp_path, monkeypatch):
    root = tree(tmp_path, "a/1.mp4", "a/locked/2.mp4")
    (root / "a" / "loop").symlink_to(root / "a")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = sources.folder(root)
    assert [v.key for v in found.videos] == ["a/1"]
    assert {(r.path, r.reason) for r in found.rejected} == {
        ("a/locked", "Permission denied"),
        ("a/loop", "a link to a folder read already"),
    }


def test_a_video_in_two_ucf101_lists_is_refused(tmp_path):
    root = tree(tmp_path, "A/v_A_g01_c01.avi")
    (root / "classInd.txt").write_text("1 A\n")
    for split in ("train", "test"):
        (root / f"{split}list01.txt").write_text("A/v_A_g01_c01.avi\n")
    with pytest.raises(UserError, match="listed twice"):
        sources.ucf101(root)


@pytest.mark.real
def test_the_official_ucf101_lists_are_read(real_data, tmp_path):
    lists = real_data / "splits" / "ucf101"
    for split in ("train", "test"):
        for line in (lists / f"{split}list01.txt").read_text().splitlines():
            path = tmp_path / line.split()[0]
            path.parent.mkdir(exist_ok=True)
            path.touch()
    found = sources.ucf101(tmp_path, annotations=lists)
    counts = [sum(v.split == name for v in found.videos) for name in ("train", "test")]
    assert (counts, len(found.classes)) == ([9537, 3783], 101)
    assert len(found.videos) == 13320
    assert found.classes[:2] == ("ApplyEyeMakeup", "ApplyLipstick")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"plain", "plain"),
        ("été &!(1)".encode(), "été &!(1)"),
        (b"a\nb", "a%0Ab"),
        (b"100%", "100%25"),
        (b"\xff", "%FF"),
    ],
)
def test_names_become_printable(raw, expected):
    assert sources.printable(os.fsdecode(raw)) == expected
