"""Slices, changed sources, repair and dry runs of a conversion."""

import contextlib
import errno
import functools
import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from genkd import storage
from genkd.errors import UserError
from genkd.preprocessing import containers, sources
from genkd.preprocessing.convert import convert, merge
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoSettings
from genkd.tests.support import processes

SETTINGS = VideoSettings("mjpeg", short_side=48)
OPTIONS = ("--codec", "mjpeg", "--short-side", 48)


@pytest.fixture
def root(videos, tmp_path):
    """Ten videos of two classes that a test may change."""
    for name in ("Bob", "Orbit"):
        shutil.copytree(videos / "UCF-101" / name, tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture
def data(root, tmp_path):
    convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=0)
    return tmp_path / "data"


def bare(found):
    """Without the empty lock files, which say nothing."""
    return {name: data for name, data in found.items() if not name.startswith(".lock")}


def shard_times(path):
    return {entry.name: entry.stat().st_mtime_ns for entry in (path / "shards").glob("*.tar")}


def test_slices_at_the_same_time_and_a_merge_give_the_same_bytes(root, data, tmp_path, genkd, content):
    out = tmp_path / "sliced"
    jobs = [
        processes.start("-m", "genkd", "shard", "folder", root, out, *OPTIONS, "--slice", f"{part}/3")
        for part in (1, 3)
    ]
    assert [job.wait(100) for job in jobs] == [0, 0]
    early = genkd("shard", "--merge", out, check=False)
    assert early.returncode == 1 and "lacks 3 of 10 shards, e.g. train-00001" in early.stderr
    told = genkd("shard", "folder", root, out, *OPTIONS, "--slice", "2/3").stdout
    assert f"genkd shard --merge {out}" in told and not (out / "dataset.json").exists()
    assert "videos train 10" in genkd("shard", "--merge", out).stdout
    assert bare(content(out)) == bare(content(data))


def test_a_slice_of_another_form_is_refused(root, tmp_path, genkd):
    for text in ("0/3", "4/3", "3", "a/b"):
        told = genkd("shard", "folder", root, tmp_path / "x", "--slice", text, check=False)
        assert told.returncode == 1 and "K/N" in told.stderr


def test_the_same_slice_twice_and_a_whole_run_beside_a_slice_are_refused(root, tmp_path):
    from genkd.storage import storage_at

    with storage_at(tmp_path / "out").locked("slice-1-of-2"):
        for part in ((1, 2), None):
            with pytest.raises(UserError, match="another run is writing"):
                convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0, part=part)
        convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0, part=(2, 2))


def test_changed_sources_are_named_and_refreshed_alone(root, data, tmp_path):
    before = shard_times(data)
    shards = {row["key"]: row["shard"] for row in Dataset.open(data).table.select(["key", "shard"]).to_pylist()}
    victims = sorted(root.glob("Bob/*.avi"))
    changed, gone = (f"Bob/{path.stem}" for path in victims[:2])
    shutil.copy(next((root / "Orbit").iterdir()), victims[0])
    victims[1].unlink()
    shutil.copy(next((root / "Orbit").iterdir()), root / "Orbit" / "zz_new.avi")
    with pytest.raises(UserError, match=r"3 sources changed .*--refresh"):
        convert(sources.folder(root), data, SETTINGS, workers=0)
    with pytest.raises(
        UserError, match=rf"{changed} (had \d+ bytes and now has \d+|was written again).*{gone} is gone"
    ):
        convert(sources.folder(root), data, SETTINGS, workers=0)
    convert(sources.folder(root), data, SETTINGS, workers=0, refresh=True)
    after = shard_times(data)
    assert set(before) - set(after) == {shards[gone]} and len(set(after) - set(before)) == 1
    assert {name for name in set(before) & set(after) if before[name] != after[name]} == {shards[changed]}
    table = Dataset.open(data).table
    assert "Orbit/zz_new" in table["key"].to_pylist() and gone not in table["key"].to_pylist()
    assert verify(data, workers=0) == []
    # And from then on a plain run finds nothing to do.
    assert convert(sources.folder(root), data, SETTINGS, workers=0).resumed_shards == 10
    assert shard_times(data) == after


def test_a_source_that_only_got_a_new_time_is_noticed(root, data):
    path = next((root / "Bob").iterdir())
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=rf"Bob/{path.stem} was written again"):
        convert(sources.folder(root), data, SETTINGS, workers=0)


def test_a_refresh_that_is_interrupted_continues(root, data, tmp_path, content):
    for path in (root / "Bob").iterdir():
        os.utime(path, ns=(5, 5))

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources.folder(root), data, SETTINGS, workers=0, refresh=True, on_progress=stop)
    with pytest.raises(UserError, match="not finished"):
        Dataset.open(data)
    convert(sources.folder(root), data, SETTINGS, workers=0)
    convert(sources.folder(root), tmp_path / "fresh", SETTINGS, workers=0)
    assert content(data) == content(tmp_path / "fresh")


class Power(Exception):
    """The machine stops."""


def test_a_refresh_that_is_killed_at_any_moment_loses_nothing(root, data, tmp_path, monkeypatch, content):
    """Every write and delete of a refresh is the last one once; the next run finishes or says what to do."""
    (root / "Bob" / "zz.avi").write_bytes(next(iter(sorted(root.glob("Orbit/*.avi")))).read_bytes())
    sorted(root.glob("Bob/*.avi"))[0].unlink()
    convert(sources.folder(root), tmp_path / "whole", SETTINGS, workers=0)
    expected = sorted(Dataset.open(tmp_path / "whole").table["key"].to_pylist())
    moment, reached = 0, True
    while reached:
        out, reached, left = tmp_path / f"at-{moment}", False, [moment]
        shutil.copytree(data, out)

        def stop(self, *arguments, then, left=left):
            nonlocal reached
            if left[0] == 0:
                reached = True
                raise Power
            left[0] -= 1
            return then(self, *arguments)

        with monkeypatch.context() as patch:
            for name in ("write", "delete"):
                real = getattr(storage.LocalStorage, name)
                patch.setattr(storage.LocalStorage, name, functools.partialmethod(stop, then=real))
            with contextlib.suppress(Power):
                convert(sources.folder(root), out, SETTINGS, workers=0, refresh=True)
        try:
            convert(sources.folder(root), out, SETTINGS, workers=0)
        except UserError as error:
            assert "--refresh" in str(error)
            convert(sources.folder(root), out, SETTINGS, workers=0, refresh=True)
        assert Dataset.open(out).table["key"].to_pylist() == expected
        assert {f"{path.stem}.tar" for path in (out / "shards").iterdir()} == set(
            Dataset.open(out).table["shard"].to_pylist()
        )
        shutil.rmtree(out)
        moment += 1
    assert moment > 6


def test_a_shard_of_another_plan_is_not_merged(root, data, tmp_path, content):
    shard = sorted((data / "shards").glob("*.parquet"))[0]
    other = tmp_path / "other"
    convert(sources.folder(root), other, VideoSettings("mjpeg", short_side=32), workers=0)
    for path in (other / "shards").glob(f"{shard.stem}.*"):
        shutil.copy(path, data / "shards")
    with pytest.raises(UserError, match=f"lacks 1 of 10 shards, e.g. {shard.stem}"):
        merge(data)


def test_rejected_sources_are_tried_again_on_demand(root, tmp_path):
    whole = (root / "Bob" / sorted(os.listdir(root / "Bob"))[0]).read_bytes()
    broken = root / "Bob" / "broken.avi"
    broken.write_bytes(b"no video" + bytes(len(whole) - 8))
    os.utime(broken, ns=(7, 7))
    out = tmp_path / "retry"
    assert len(convert(sources.folder(root), out, SETTINGS, workers=0).rejected) == 1
    broken.write_bytes(whole)
    os.utime(broken, ns=(7, 7))  # as when the disk it lies on was at fault
    assert len(convert(sources.folder(root), out, SETTINGS, workers=0).rejected) == 1
    summary = convert(sources.folder(root), out, SETTINGS, workers=0, retry_rejected=True)
    assert not summary.rejected and summary.resumed_shards == 10
    assert "Bob/broken" in Dataset.open(out).table["key"].to_pylist()


def test_a_fault_of_the_machine_rejects_no_source(root, tmp_path, monkeypatch):
    def too_many(error, path, also=()):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    (root / "Bob" / "broken.avi").write_bytes(b"no video")
    monkeypatch.setattr(containers, "refuse_machine_fault", too_many)
    with pytest.raises(UserError, match=r"Too many open files while writing .*broken\.avi"):
        convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0)
    monkeypatch.undo()
    with pytest.raises(OSError, match="Stale"):
        containers.refuse_machine_fault(OSError(errno.ESTALE, ""), "x")
    containers.refuse_machine_fault(OSError(errno.EINVAL, ""), "x")


@pytest.mark.parametrize("damage", ["flip", "cut", "tar", "idx", "rows", "index", "arrow", "errors"])
def test_repair_rebuilds_what_is_damaged_and_nothing_else(root, data, content, damage):
    expected, before = content(data), shard_times(data)
    video = Dataset.open(data).video(3)
    stem = video.shard.removesuffix(".tar")
    place = {"flip": f"shards/{stem}.tar", "cut": f"shards/{stem}.tar", "tar": f"shards/{stem}.tar",
             "idx": f"shards/{stem}.idx", "rows": f"shards/{stem}.parquet", "index": "index.parquet",
             "arrow": "index.arrow", "errors": "errors.parquet"}[damage]  # fmt: skip
    whole = (data / place).read_bytes()
    if damage == "tar":
        (data / place).unlink()
    elif damage == "flip":
        at = video.offset + video.size // 2
        (data / place).write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
    else:
        (data / place).write_bytes(whole[: len(whole) // 2])
    if damage not in ("arrow", "errors"):
        try:
            assert place.removeprefix("shards/") in {problem.file for problem in verify(data, workers=0)}
        except UserError as error:
            assert damage == "index" and "index.parquet" in str(error)
    summary = convert(sources.folder(root), data, SETTINGS, workers=0, repair=True)
    assert summary.repaired == ((stem,) if damage in ("flip", "cut", "idx") else ())
    assert content(data) == expected
    touched = {name for name, time in shard_times(data).items() if time != before.get(name)}
    assert touched == ({video.shard} if damage in ("flip", "cut", "tar", "idx", "rows") else set())


def test_a_dry_run_estimates_and_writes_nothing(videos, tmp_path, genkd):
    listing = ("shard", "ucf101", videos, tmp_path / "data", "--codec", "vp9", "--short-side", 64)
    found = json.loads(genkd(*listing, "--dry-run", "--json").stdout)
    assert found["videos"] == 50 and found["splits"] == {"test": 40, "train": 10} and found["sample"]["videos"] == 12
    assert not (tmp_path / "data").exists()
    convert(sources.ucf101(videos), tmp_path / "data", VideoSettings("vp9", short_side=64), workers=2)
    size = sum(pq.read_table(tmp_path / "data" / "index.parquet")["size"].to_pylist())
    assert 0.5 < found["estimate"]["bytes"] / size < 2
    assert found["shards"] == len(list((tmp_path / "data" / "shards").glob("*.tar")))


def test_merge_stands_alone_and_needs_a_conversion(tmp_path, genkd):
    told = genkd("shard", "--merge", tmp_path, check=False)
    assert told.returncode == 1 and "no conversion that was begun" in told.stderr
    told = genkd("shard", "--merge", tmp_path, "folder", tmp_path, tmp_path, check=False)
    assert told.returncode == 2 and "stands alone" in told.stderr
