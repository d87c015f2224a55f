"""Conversion to object storage: a real S3 server (moto) in a process of its own."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from genkd.errors import UserError
from genkd.preprocessing import engines, sources
from genkd.preprocessing.convert import convert, merge
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoSettings
from genkd.remote_storage import RemoteStorage
from genkd.storage import storage_at
from genkd.tests.support import processes

SETTINGS = VideoSettings("mjpeg", short_side=48)


@pytest.fixture(autouse=True)
def _workers_of_this_environment(monkeypatch):
    """Which leads to the bucket; that of the server that workers are forked from does not."""
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory):
    """Ten videos of two classes, a folder each."""
    root = tmp_path_factory.mktemp("few") / "few"
    for name in ("Bob", "Orbit"):
        shutil.copytree(videos / "UCF-101" / name, root / name)
    return root


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    """The same conversion on a local disk."""
    out = tmp_path_factory.mktemp("plain") / "data"
    convert(sources.folder(few), out, SETTINGS, workers=0)
    return out


def objects(url: str) -> dict[str, bytes]:
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    found = {}
    for path in fs.find(root):
        with contextlib.suppress(FileNotFoundError):  # a lock that a run gave back meanwhile
            found[path[len(root) + 1 :]] = fs.cat_file(path)
    return found


def finished_shards(url: str) -> int:
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return sum(path.endswith(".parquet") for path in fs.find(f"{root}/shards"))


def local(content, plain) -> dict[str, bytes]:
    return {name: data for name, data in content(plain).items() if name != ".lock"}


def test_the_bytes_in_a_bucket_are_those_on_a_disk(bucket, few, plain, content):
    summary = convert(sources.folder(few), f"{bucket}/data", SETTINGS, workers=2)
    assert summary.info["splits"]["train"]["videos"] == 10
    assert objects(f"{bucket}/data") == local(content, plain)
    again = convert(sources.folder(few), f"{bucket}/data", SETTINGS, workers=0)
    assert again.resumed_shards == len(list(plain.glob("shards/*.tar")))


def test_a_data_set_in_a_bucket_is_inspected_verified_and_repaired(bucket, few, plain, content, genkd):
    url = f"{bucket}/repair"
    convert(sources.folder(few), url, SETTINGS, workers=0)
    assert json.loads(genkd("inspect", url, "--json").stdout)["codecs"] == {"mjpeg": 10}
    video = Dataset.open(url).video(7)
    storage = storage_at(url)
    data = bytearray(storage.read(f"shards/{video.shard}"))
    data[video.offset + video.size - 10] ^= 1
    storage.write(f"shards/{video.shard}", bytes(data))
    assert [(problem.file, problem.key) for problem in verify(url, workers=1)] == [(video.shard, video.key)]
    with pytest.raises(UserError, match="copied to a local disk"):
        Dataset.open(url).path  # noqa: B018
    told = genkd("shard", "folder", few, url, "--codec", "mjpeg", "--short-side", 48, "--workers", 0, "--repair").stdout
    assert f"rebuilt 1 damaged shards: {video.shard.removesuffix('.tar')}" in told
    assert objects(url) == local(content, plain)


def test_killed_runs_leave_no_partial_object_and_end_with_the_same_bytes(
    bucket, few, plain, content, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = f"{bucket}/killed"
    expected = local(content, plain)
    command = ["-m", "genkd", "shard", "folder", few, url, "--codec", "mjpeg", "--short-side", 48]
    random, kills = np.random.default_rng(3), 0
    while "dataset.json" not in objects(url):
        process = processes.start(*command, start_new_session=True)
        goal = finished_shards(url) + int(random.integers(2, 5))
        while process.poll() is None and finished_shards(url) < goal:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        told = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), told
        for name, data in objects(url).items():
            assert name == ".lock" or data == expected[name], f"{name} is there, but not whole"
    assert kills >= 2 and not list(tmp_path.glob("genkd-scratch-*"))
    assert {name: data for name, data in objects(url).items() if name != ".lock"} == expected


def test_a_bucket_that_is_being_written_is_refused(bucket, few):
    with storage_at(f"{bucket}/busy").locked():
        with pytest.raises(UserError, match=r"another run \(.*process \d+\) was writing s3://bucket/busy"):
            convert(sources.folder(few), f"{bucket}/busy", SETTINGS, workers=0)
    with storage_at(f"{bucket}/busy").locked("slice-1-of-2"), storage_at(f"{bucket}/busy").locked("slice-2-of-2"):
        with pytest.raises(UserError, match="another run"):
            storage_at(f"{bucket}/busy").locked().__enter__()
    assert objects(f"{bucket}/busy") == {}


def test_the_lock_of_a_run_that_died_elsewhere_is_taken_over_when_it_is_old(bucket):
    storage = storage_at(f"{bucket}/stale")
    state = {"host": "node-7/1", "pid": 1, "token": "x", "time": time.time() - 10}
    storage.write_json(".lock", state)
    with pytest.raises(UserError, match="node-7/1, process 1"):
        storage.locked().__enter__()
    storage.write_json(".lock", {**state, "time": time.time() - 1000})
    with storage.locked():
        assert json.loads(storage.read(".lock"))["pid"] == os.getpid()


def test_slices_of_a_job_array_in_a_bucket(bucket, few, plain, content):
    url, failures = f"{bucket}/slices", []

    def job(number: int) -> None:
        try:
            done = convert(sources.folder(few), url, SETTINGS, workers=0, part=(number, 3))
            assert done.info is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=job, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ shards"):
        merge(url)
    job(3)
    merge(url)
    assert not failures and objects(url) == local(content, plain)


def test_a_place_that_cannot_be_used_is_one_sentence(bucket, few, genkd):
    told = genkd("shard", "folder", few, "s3://no-such-bucket/data", check=False)
    assert told.returncode == 1 and "bucket does not exist while writing s3://no-such-bucket/data" in told.stderr
    assert told.stderr.count("\n") == 1
    told = genkd("shard", "folder", few, "nfs9://server/data", check=False)
    assert told.returncode == 1 and "nfs9" in told.stderr and "Traceback" not in told.stderr


def test_other_file_systems_get_whole_files_by_renaming(few, plain, content, monkeypatch):
    seen = []
    storage = RemoteStorage("memory://data")
    put = storage._fs.pipe_file
    monkeypatch.setattr(
        storage._fs, "pipe_file", lambda path, data, **more: (seen.append(path), put(path, data, **more))
    )
    storage.write("a/b.json", b"text")
    assert storage.read("a/b.json") == b"text" and storage.names("a") == ["b.json"]
    assert len(seen) == 1 and seen[0].endswith(".tmp")
    convert(sources.folder(few), "memory://whole", SETTINGS, workers=0)
    assert objects("memory://whole") == local(content, plain)
    table = pq.read_table(io.BytesIO(storage_at("memory://whole").read("index.parquet")))
    assert table.num_rows == 10
