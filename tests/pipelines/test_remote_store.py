"""Clips straight from object storage (a real S3 server in a process of its own): ranges, cache, retries."""

import os
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from genkd import remote_storage
from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines.cache import BLOCK, BlockCache
from genkd.pipelines.loader import Loader
from genkd.pipelines.store import ClipStore
from genkd.preprocessing.shards import Corrupt, Dataset
from genkd.remote_storage import RemoteStorage

CONFIG = DataConfig(clip_length=8, stride=2, size=32, scales=(1.0, 0.75))


@pytest.fixture(scope="module")
def remote(bucket, shard_sets):
    """The VP9 data set in a bucket."""
    local = shard_sets("vp9")
    url = f"{bucket}/loaded"
    fsspec.filesystem("s3").put(str(local.path), url, recursive=True)
    return Dataset.open(url)


@pytest.fixture
def requests(monkeypatch):
    """Every range that is asked for, as (name, start, stop)."""
    seen = []
    read = RemoteStorage.read_range

    def counted(self, name, start, stop, retries=0):
        seen.append((name, start, stop))
        return read(self, name, start, stop, retries)

    monkeypatch.setattr(RemoteStorage, "read_range", counted)
    return seen


def clips_of(dataset, **update):
    config = CONFIG.model_copy(update=update)
    with Loader(dataset, "train", config, batch_size=4, training=True) as batches:
        return torch.cat([batch.clips for batch in batches])


def test_clips_from_a_bucket_are_those_from_a_disk(remote, shard_sets, requests, tmp_path):
    local = clips_of(shard_sets("vp9"))
    assert not requests
    assert torch.equal(clips_of(remote), local)
    assert torch.equal(clips_of(remote, cache_dir=str(tmp_path / "cache")), local)
    assert torch.equal(clips_of(remote, read_ahead=0), local)


def test_only_the_ranges_of_a_clip_are_fetched(remote, shard_sets, requests, monkeypatch):
    from genkd.pipelines import store

    video = remote.video(3)
    part = ClipStore(remote).read(video, 17, 22)
    want = ClipStore(shard_sets("vp9")).read(video, 17, 22)
    assert np.array_equal(part.data, want.data) and part.base == want.base == 16
    # A header that is near comes along; one that is far is a request of its own.
    assert requests == [(f"shards/{video.shard}", video.offset, video.offset + int(video.gop_offsets[3]))]
    requests.clear()
    monkeypatch.setattr(store, "_NEAR", 0)
    assert np.array_equal(ClipStore(remote).read(video, 17, 22).data, want.data)
    start, stop = (video.offset + int(video.gop_offsets[number]) for number in (2, 3))
    name = f"shards/{video.shard}"
    assert requests == [(name, video.offset, video.offset + video.header_size), (name, start, stop)]


def test_a_second_epoch_comes_from_the_cache(remote, requests, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    clips_of(remote, **options)
    first = len(requests)
    assert first > 0
    requests.clear()
    clips_of(remote, **options)
    assert not requests


def test_a_remote_index_is_memory_mapped_from_the_cache(remote, tmp_path, bucket, monkeypatch):
    asked = []
    read = RemoteStorage.read
    monkeypatch.setattr(RemoteStorage, "read", lambda self, name: asked.append(name) or read(self, name))
    url = str(remote.storage)
    first = Dataset.open(url, cache_dir=str(tmp_path))
    (copy,) = (tmp_path / "indexes").iterdir()
    assert first.table.equals(remote.table) and asked == ["dataset.json"]  # index.arrow was copied as it is
    asked.clear()
    copy.write_bytes(b"damaged")
    fsspec.filesystem("s3").copy(url, f"{bucket}/plain", recursive=True)
    fsspec.filesystem("s3").rm_file(f"{bucket}/plain/index.arrow")
    second = Dataset.open(f"{bucket}/plain", cache_dir=str(tmp_path))
    assert second.table.equals(remote.table) and asked == ["dataset.json", "index.parquet"]
    before = pa.total_allocated_bytes()
    third = Dataset.open(url, cache_dir=str(tmp_path))
    assert third.table.equals(remote.table) and pa.total_allocated_bytes() - before < 4096


def test_a_damaged_cache_is_read_again_and_a_damaged_object_is_named(remote, tmp_path, bucket):
    cache = BlockCache(tmp_path / "cache", 10**9)
    video = remote.video(int(remote.rows("train")[3]))
    want = ClipStore(remote, cache).read(video, 0, 7).data.copy()
    for folder, _, names in os.walk(tmp_path / "cache"):
        for name in names:
            path = os.path.join(folder, name)
            for size in (os.path.getsize(path), 2000, 0):
                with open(path, "wb") as file:
                    file.write(bytes(size))
                assert np.array_equal(ClipStore(remote, cache).read(video, 0, 7).data, want)
                assert os.path.getsize(path) > 2000
    fs = fsspec.filesystem("s3")
    url = f"{bucket}/damaged"
    fs.copy(f"{bucket}/loaded", url, recursive=True)
    content = bytearray(fs.cat_file(f"{url}/shards/{video.shard}"))
    content[video.offset + video.header_size + 5] ^= 1
    fs.pipe_file(f"{url}/shards/{video.shard}", bytes(content))
    for some in (None, cache):
        with pytest.raises(Corrupt, match="checksum of GOP 0"):
            ClipStore(Dataset.open(url), some).read(video, 0, 7)
    fs.rm_file(f"{url}/shards/{video.shard}")
    fs.invalidate_cache()
    with pytest.raises(Corrupt, match=f"shard {video.shard} is missing from {url}"):
        ClipStore(Dataset.open(url)).read(video, 0, 7)
    with pytest.raises(UserError, match="lacks 1 of its shards"):
        clips_of(Dataset.open(url))
    fs.pipe_file(f"{url}/shards/{video.shard}", bytes(content[: video.offset + 100]))
    fs.invalidate_cache()
    with pytest.raises(UserError, match=r"the index needs .* cut off"):
        clips_of(Dataset.open(url))


def test_reads_are_tried_again_with_growing_waits(remote, monkeypatch):
    waits, failures = [], [3]
    monkeypatch.setattr(remote_storage.time, "sleep", waits.append)
    cat = remote.storage._fs.cat_file

    def failing(path, **options):
        if failures[0]:
            failures[0] -= 1
            raise TimeoutError("the network is away")
        return cat(path, **options)

    monkeypatch.setattr(remote.storage._fs, "cat_file", failing)
    video = remote.video(0)
    ClipStore(remote, retries=3).read(video, 0, 7)
    assert len(waits) == 3
    for number, wait in enumerate(waits):
        assert 0.1 * 2**number <= wait <= 0.2 * 2**number
    failures[0], waits[:] = 3, []
    with pytest.raises(UserError, match=r"s3://.*TimeoutError: the network is away"):
        ClipStore(remote, retries=2).read(video, 0, 7)
    assert len(waits) == 2


def test_a_torn_answer_is_asked_for_again(remote, monkeypatch):
    video = remote.video(0)
    want = ClipStore(remote).read(video, 0, 7).data
    cat, torn = remote.storage._fs.cat_file, []

    def tearing(path, **options):
        data = cat(path, **options)
        if not torn:
            torn.append(path)
            return spoil(data)
        return data

    monkeypatch.setattr(remote.storage._fs, "cat_file", tearing)
    for spoil in (lambda data: data[:-10], lambda data: bytes(len(data))):  # noqa: B007 (tearing() looks it up)
        torn.clear()
        assert np.array_equal(ClipStore(remote).read(video, 0, 7).data, want) and torn


def test_several_writers_keep_to_the_limit_together(tmp_path):
    caches = [BlockCache(tmp_path, 64_000) for _ in range(8)]
    for number in range(100):
        for writer, cache in enumerate(caches):
            cache.put(f"file {writer}", number, bytes(1000))
            total = sum(entry.stat().st_size for entry in tmp_path.rglob("*") if entry.is_file())
            assert total <= 64_000 + len(caches) * 2000


def test_the_cache_forgets_what_was_used_least_lately(tmp_path):
    cache = BlockCache(tmp_path, 10 * 1000)
    for number in range(10):
        cache.put("a", number, bytes(1000))
        path = cache._path("a", number)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    assert cache.get("a", 0) == bytes(1000)  # now the latest
    cache.put("a", 10, bytes(1000))
    left = [number for number in range(11) if cache.get("a", number) is not None]
    assert left == [0, 3, 4, 5, 6, 7, 8, 9, 10]  # nine tenths are kept
    again = BlockCache(tmp_path, 5 * 1000)  # another process with a smaller limit
    assert sum(again.get("a", number) is not None for number in range(11)) == 4
    assert again.get("b", 0) is None


def test_threads_may_share_a_cache(tmp_path):
    cache = BlockCache(tmp_path, 20 * 100)
    wrong = []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(200):
            number = int(random.integers(30))
            found = cache.get("a", number)
            if found is None:
                cache.put("a", number, bytes([number]) * 100)
            elif found != bytes([number]) * 100:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < sum(len(names) for _, _, names in os.walk(tmp_path)) <= 21  # of 30 that were written


def test_a_cache_that_cannot_be_written_is_a_sentence(remote, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="writing the cache"):
        clips_of(remote, cache_dir=str(tmp_path / "file" / "cache"))


def test_blocks_are_whole_parts_of_a_shard(remote, requests, tmp_path):
    cache = BlockCache(tmp_path, 10**9)
    video = remote.video(3)
    ClipStore(remote, cache).read(video, 17, 22)
    ((_, start, stop),) = requests
    assert start % BLOCK == 0 and stop % BLOCK == 0 and start <= video.offset
