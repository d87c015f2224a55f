import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genkd import files
from genkd.errors import UserError
from genkd.preprocessing import plan, shards, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.video import VideoSettings
from genkd.tests.support import processes
from genkd.tests.support.processes import wait_until

SETTINGS = VideoSettings("mjpeg", short_side=48)


@pytest.fixture(scope="module")
def plain(
    videos,
    tmp_path_factory,
):
    """An undisturbed conversion."""
    out = tmp_path_factory.mktemp("plain") / "data"
    convert(sources.ucf101(videos), out, SETTINGS, workers=1)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bytes_do_not_depend_on_the_number_of_workers(videos, plain, tmp_path, workers, content):
    convert(sources.ucf101(videos), tmp_path / "data", SETTINGS, workers=workers)
    assert content(tmp_path / "data") == content(plain)


def test_the_bytes_do_not_depend_on_where_the_source_is(videos, plain, tmp_path, content):
    shutil.copytree(videos, tmp_path / "elsewhere" / videos.name)
    convert(sources.ucf101(tmp_path / "elsewhere" / videos.name), tmp_path / "data", SETTINGS, workers=2)
    assert content(tmp_path / "data") == content(plain)


def test_a_shard_holds_a_mixture_of_classes(videos, monkeypatch):
    monkeypatch.setattr(plan, "MIN_SHARDS", 8)
    assignment = plan.make_plan(sources.ucf101(videos), SETTINGS).shards
    assert len(assignment) in (8, 9, 10) and sum(map(len, assignment.values())) == 50
    for videos_of_shard in assignment.values():
        labels = [video.label for video in videos_of_shard]
        assert len(labels) >= 4 and len(set(labels)) >= len(labels) - 1


@pytest.fixture(scope="module")
def half(videos, tmp_path_factory):
    """Half of the videos, whose conversion at 112 pixels takes long enough to be disturbed."""
    root = tmp_path_factory.mktemp("half") / "half"
    for folder in sorted((videos / "UCF-101").iterdir())[:5]:
        shutil.copytree(folder, root / folder.name)
    return root


@pytest.fixture(scope="module")
def slow_plain(half, tmp_path_factory):
    """Their undisturbed conversion."""
    out = tmp_path_factory.mktemp("slow") / "data"
    convert(sources.folder(half), out, VideoSettings("vp9", short_side=112), workers=2)
    return out


def slow_command(half, out):
    return ["-m", "genkd", "shard", "folder", half, out, "--codec", "vp9", "--short-side", "112"]


def finished_shards(out):
    return len(list((out / "shards").glob("*.parquet")))


@pytest.mark.parametrize(("least", "shards"), [(3, (4, 8)), pytest.param(10, (1, 3), marks=pytest.mark.slow)])
def test_many_kills_later_the_bytes_are_the_same(half, slow_plain, tmp_path, content, least, shards):
    out = tmp_path / "data"
    command = slow_command(half, out)
    random = np.random.default_rng(5)
    kills = 0
    while not (out / "dataset.json").exists():
        goal = finished_shards(out) + int(random.integers(*shards))
        process = processes.start(*command)
        while process.poll() is None and finished_shards(out) < goal:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= least
    processes.run(*command, check=True)
    assert content(out) == content(slow_plain)


def test_ctrl_c_keeps_finished_shards_and_says_so(half, slow_plain, tmp_path, content):
    out = tmp_path / "data"
    command = slow_command(half, out)
    process = processes.start(*command, start_new_session=True)
    wait_until(lambda: finished_shards(out), pause=0.002, process=process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to continue" in told and "Traceback" not in told
    assert finished_shards(out) and not (out / "dataset.json").exists()
    assert not list(out.glob("**/.*.tmp"))
    processes.run(*command, check=True)
    assert content(out) == content(slow_plain)


def test_no_worker_outlives_a_killed_parent(half, tmp_path):
    out = tmp_path / "data"
    command = slow_command(half, out)
    process = processes.start(*command, start_new_session=True)
    wait_until(lambda: list((out / "shards").glob(".*.tmp")), process=process)
    assert group(process.pid) >= {process.pid}
    process.kill()
    process.wait()
    wait_until(lambda: not group(process.pid))


def group(leader):
    """The processes of a group that run."""
    running = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(number) == leader and state != "Z":
                running.add(int(path.parent.name))
    return running


def test_other_settings_are_refused_and_named(videos, plain):
    with pytest.raises(UserError, match=r"video\.codec: \"mjpeg\" there, \"vp9\" now"):
        convert(sources.ucf101(videos), plain, VideoSettings("vp9", short_side=48), workers=0)
    fewer = sources.SourceList("videos", videos, sources.ucf101(videos).classes, sources.ucf101(videos).videos[:40])
    with pytest.raises(UserError, match=r"10 sources changed since .* is gone.*--refresh"):
        convert(fewer, plain, SETTINGS, workers=0)


def test_a_finished_conversion_is_left_as_it_is(videos, plain, content):
    before = content(plain)
    summary = convert(sources.ucf101(videos), plain, SETTINGS, workers=1)
    assert summary.resumed_shards == len(list((plain / "shards").glob("*.tar")))
    assert content(plain) == before


def test_a_folder_with_other_things_in_it_is_refused(videos, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        convert(sources.ucf101(videos), tmp_path, SETTINGS, workers=0)


def test_two_runs_on_one_output_are_refused(videos, tmp_path):
    with files.locked(tmp_path / "data", ""), pytest.raises(UserError, match="another run is writing"):
        convert(sources.ucf101(videos), tmp_path / "data", SETTINGS, workers=0)


def test_an_output_inside_the_source_is_refused(videos, tmp_path):
    shutil.copytree(videos / "UCF-101" / "Bob", tmp_path / "root" / "Bob")
    with pytest.raises(UserError, match="lies inside the source"):
        convert(sources.folder(tmp_path / "root"), tmp_path / "root" / "out", SETTINGS, workers=0)


def bad_videos(root, videos):
    good = sorted((videos / "UCF-101" / "Bob").iterdir())
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    shutil.copy(good[0], root / "a" / "good.avi")
    shutil.copy(good[1], root / "b" / "two words & (more)!.avi")
    (root / "a" / "text.mp4").write_text("no video")
    (root / "b" / "empty.mkv").touch()
    data = good[2].read_bytes()
    (root / "b" / "cut.avi").write_bytes(data[: len(data) // 2])
    return root


def test_rejected_sources_are_in_errors_parquet_and_the_rest_is_converted(videos, tmp_path):
    root = bad_videos(tmp_path / "root", videos)
    summary = convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=2)
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "data" / "errors.parquet").to_pylist()}
    assert set(rows) == {"a/text.mp4", "b/empty.mkv", "b/cut.avi"} == {entry.path for entry in summary.rejected}
    assert rows["b/empty.mkv"]["stage"] == "open" and "empty" in rows["b/empty.mkv"]["reason"]
    assert rows["b/cut.avi"]["stage"] == "decode"
    assert Dataset.open(tmp_path / "data").table["key"].to_pylist() == ["a/good", "b/two words & (more)!"]


def test_on_error_fail_stops_at_the_first_bad_source(videos, tmp_path):
    root = bad_videos(tmp_path / "root", videos)
    with pytest.raises(UserError, match=r"(text\.mp4|empty\.mkv|cut\.avi): (open|decode): "):
        convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=2, on_error="fail")


def test_a_source_of_bad_videos_alone_is_refused(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"none of the 1 videos.*a/x\.mp4.*errors\.parquet"):
        convert(sources.folder(tmp_path / "root"), tmp_path / "data", SETTINGS, workers=0)
    assert pq.read_table(tmp_path / "data" / "errors.parquet").num_rows == 1


def test_an_unused_class_is_named(videos, tmp_path):
    root = bad_videos(tmp_path / "root", videos)
    (root / "a" / "good.avi").unlink()
    assert convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=0).unused_classes == ["a"]


def _convert_as_nobody(root, out, queue):
    os.setgroups([])
    os.setuid(65534)
    try:
        queue.put([(r.path, r.reason) for r in convert(sources.folder(root), out, SETTINGS, workers=0).rejected])
    except BaseException as error:
        queue.put(repr(error))


def test_a_file_without_permission_is_rejected_with_that_reason(videos):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user who may not read a file")
    with tempfile.TemporaryDirectory() as folder:  # the folders above tmp_path are closed to others
        Path(folder).chmod(0o755)
        assert ("a/secret.avi", "no permission to read the file") in _rejected_by_nobody(Path(folder), videos)


def _rejected_by_nobody(folder, videos):
    root = bad_videos(folder / "root", videos)
    (root / "a" / "text.mp4").unlink()
    shutil.copy(root / "a" / "good.avi", root / "a" / "secret.avi")
    (root / "a" / "secret.avi").chmod(0)
    (folder / "out").mkdir()
    (folder / "out").chmod(0o777)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_convert_as_nobody, args=(root, folder / "out", queue))
    process.start()
    rejected = queue.get(timeout=60)
    process.join()
    return rejected


def test_a_full_disk_gives_one_sentence_and_a_clean_resume(videos, plain, small_disk, tmp_path, genkd, content):
    disk = small_disk("300k")
    command = ["shard", "ucf101", videos, disk / "data", "--codec", "mjpeg", "--short-side", 48]
    told = genkd(*command, check=False)
    assert told.returncode == 1
    assert "no space left" in told.stderr and "run the same command again" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (disk / "data" / "dataset.json").exists() and not list(disk.glob("data/**/.*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    genkd(*command)
    assert content(disk / "data") == content(plain)


def test_a_disk_that_fails_at_any_write_rejects_no_source(videos, tmp_path, monkeypatch):
    """FFmpeg may report a sink's failure as its own; it must never be taken for a fault of the video."""
    everything = sources.ucf101(videos)
    few = dataclasses.replace(everything, videos=everything.videos[:2])
    for moment in (0, 1, 2, 3, 10, 41, 42, 43, 60, 84, 85):
        left = [moment]

        class Failing(io.BufferedRandom):
            def write(self, data, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        def opened(self, path):
            self._file = Failing(io.FileIO(path, "w+"))

        with monkeypatch.context() as patch:
            patch.setattr(shards.ShardWriter, "__init__", opened)
            with pytest.raises(UserError, match="no space left"):
                convert(few, tmp_path / f"data-{moment}", SETTINGS, workers=0)
        assert not convert(few, tmp_path / f"data-{moment}", SETTINGS, workers=0).rejected


def test_the_summary_is_json_on_demand(videos, tmp_path, genkd):
    root = bad_videos(tmp_path / "root", videos)
    done = genkd("shard", "folder", root, tmp_path / "data", "--codec", "mjpeg", "--short-side", 48, "--json")
    summary = json.loads(done.stdout)
    assert summary["splits"]["train"]["videos"] == 2
    assert {entry["path"] for entry in summary["rejections"]} == {"a/text.mp4", "b/empty.mkv", "b/cut.avi"}
