"""ClipStore: the bytes of any frame range of any video, as a small video of its own, checked on the way."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..preprocessing.shards import Corrupt, Dataset, Video, checksum_of, tar_name
from ..storage import LocalStorage
from .cache import BLOCK, BlockCache

_NEAR = 256 << 10  # bytes; remote ranges closer than that are fetched as one, as a request costs more


class Slice(NamedTuple):
    """A playable video, uint8 1-D, that holds the frames asked for, and the number of its first frame."""

    data: np.ndarray
    base: int


class ClipStore:
    """Reads header + GOP range of a video: O(clip) bytes however long the video is. Safe to use from threads.

    Local shards are memory-mapped; others are read by range, each read tried again up to `retries` times, through a
    cache where there is one. Every GOP's checksum is compared with the index each time it is read, which takes 3
    microseconds for 100 kilobytes.
    """

    def __init__(self, dataset: Dataset, cache: BlockCache | None = None, retries: int = 5):
        self._dataset = dataset
        self._shards: _Mapped | _Remote = (
            _Mapped(dataset.storage.path)
            if isinstance(dataset.storage, LocalStorage)
            else _Remote(dataset, cache, retries)
        )

    @property
    def is_remote(self) -> bool:
        """Whether a read waits for a network."""
        return isinstance(self._shards, _Remote)

    def read(self, video: Video, first: int, last: int) -> Slice:
        """The part of a video that holds frames first..last.

        Raises Corrupt if the shard is missing, shorter than the index says or holds other bytes, IndexError for frames
        that do not exist, UserError where remote storage fails for good.
        """
        if not 0 <= first <= last < video.num_frames:
            raise IndexError(f"frames {first}..{last} of {video.key}, which has {video.num_frames}")
        begin = int(np.searchsorted(video.gop_frames, first, side="right")) - 1
        end = int(np.searchsorted(video.gop_frames, last, side="right"))
        base = int(video.gop_frames[begin])
        try:
            return Slice(self._checked(video, begin, end), base)
        except _Torn as wrong:
            if self._shards.forget(video, begin, end):
                return Slice(self._checked(video, begin, end), base)
            raise wrong

    def close(self) -> None:
        """Drops the memory maps; arrays already handed out keep theirs alive."""
        self._shards.close()

    def _checked(self, video: Video, begin: int, end: int) -> np.ndarray:
        data = self._shards.slice(video, begin, end)
        bounds = [0, *(video.gop_offsets[begin : end + 1] - video.gop_offsets[begin] + video.header_size)]
        sums = [video.gop_crc32c[0], *video.gop_crc32c[begin + 1 : end + 1]]
        for number, crc32c in enumerate(sums):
            if checksum_of(data[bounds[number] : bounds[number + 1]]) != crc32c:
                part = f"GOP {begin + number - 1}" if number else "the header"
                raise _Torn(f"the checksum of {part} is not that of the index")
        return data


class _Torn(Corrupt):
    """Bytes that are not those that were written; those of a cache or a network may be right the next time."""


class _Mapped:
    """Shards of a local folder."""

    def __init__(self, folder: Path):
        self._folder = folder / "shards"
        self._maps: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def slice(self, video: Video, begin: int, end: int) -> np.ndarray:
        """Header and GOPs begin..end-1."""
        shard = self._map(video.shard)
        if video.offset + video.size > len(shard):
            raise Corrupt(f"the index points past the end of shard {video.shard}")
        start, stop = int(video.gop_offsets[begin]), int(video.gop_offsets[end])
        payload = shard[video.offset : video.offset + stop]
        return payload if begin == 0 else np.concatenate([payload[: video.header_size], payload[start:]])

    def forget(self, video: Video, begin: int, end: int) -> bool:
        """False: a file of this machine stays as it is."""
        return False

    def close(self) -> None:
        with self._lock:
            self._maps.clear()

    def _map(self, name: str) -> np.ndarray:
        with self._lock:
            if name not in self._maps:
                path = self._folder / name
                try:
                    with open(path, "rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except FileNotFoundError:
                    raise Corrupt(f"shard {path} is missing; make the data set again") from None
                except ValueError:
                    raise Corrupt(f"shard {path} is empty; make the data set again") from None
                self._maps[name] = np.frombuffer(mapped, np.uint8)
            return self._maps[name]


class _Remote:
    """Shards behind an fsspec URL, read by range."""

    def __init__(self, dataset: Dataset, cache: BlockCache | None, retries: int):
        self._storage, self._cache, self._retries = dataset.storage, cache, retries
        # The digest keeps blocks of another data set that once stood at the same place apart.
        self._prefix = f"{dataset.storage}/{dataset.info['index_digest']}"

    def slice(self, video: Video, begin: int, end: int) -> np.ndarray:
        """Header and GOPs begin..end-1."""
        start, stop = int(video.gop_offsets[begin]), int(video.gop_offsets[end])
        if start - video.header_size < _NEAR:
            whole = self._read(video, 0, stop)
            if begin == 0:
                return whole
            return np.concatenate([whole[: video.header_size], whole[start:]])
        return np.concatenate([self._read(video, 0, video.header_size), self._read(video, start, stop)])

    def forget(self, video: Video, begin: int, end: int) -> bool:
        """Drops what the cache has of a range; True, as it is worth another look."""
        if self._cache is None:
            return True
        for start, stop in ((0, video.header_size), (int(video.gop_offsets[begin]), int(video.gop_offsets[end]))):
            for number in _blocks(video.offset + start, video.offset + stop):
                self._cache.drop(f"{self._prefix}/{video.shard}", number)
        return True

    def close(self) -> None:
        pass

    def _read(self, video: Video, start: int, stop: int) -> np.ndarray:
        """Bytes start..stop of a payload."""
        start, stop = video.offset + start, video.offset + stop
        data = self._fetch(video.shard, start, stop) if self._cache is None else self._cached(video.shard, start, stop)
        if len(data) < stop - start:  # a damaged cache or a torn answer, unless it is so again
            raise _Torn(f"the index points past the end of shard {video.shard}")
        return np.frombuffer(data, np.uint8)

    def _cached(self, shard: str, start: int, stop: int) -> bytes:
        assert self._cache is not None
        name, numbers = f"{self._prefix}/{shard}", _blocks(start, stop)
        found = {number: self._cache.get(name, number) for number in numbers}
        missing = [number for number in numbers if found[number] is None]
        if missing:
            first = missing[0]
            data = self._fetch(shard, first * BLOCK, (missing[-1] + 1) * BLOCK)
            for number in missing:
                block = data[(number - first) * BLOCK : (number - first + 1) * BLOCK]
                found[number] = block
                self._cache.put(name, number, block)
        whole = b"".join(found[number] or b"" for number in numbers)
        return whole[start - numbers[0] * BLOCK : stop - numbers[0] * BLOCK]

    def _fetch(self, shard: str, start: int, stop: int) -> bytes:
        try:
            return self._storage.read_range(f"shards/{shard}", start, stop, retries=self._retries)
        except FileNotFoundError:
            raise Corrupt(f"shard {shard} is missing from {self._storage}; make the data set again") from None


def _blocks(start: int, stop: int) -> range:
    return range(start // BLOCK, -(-stop // BLOCK))


def require_readable(dataset: Dataset, rows: np.ndarray) -> None:
    """Refuses a data set whose shards are not those that its index describes, before any work starts.

    Of every shard that the rows need: it is there, long enough, and (on a local disk) the first and the last video
    stand where the index says. Raises UserError naming the first that is not.
    """
    encoded = dataset.table["shard"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    offsets, sizes = dataset.column("offset")[rows], dataset.column("size")[rows]
    codes = encoded.indices.to_numpy()
    order = np.lexsort((offsets, codes))
    first = np.flatnonzero(np.diff(codes[order], prepend=-1))
    ends = np.maximum.reduceat((offsets + sizes)[order], first)
    last = [*(first[1:] - 1), len(order) - 1]
    names = encoded.dictionary.take(pa.array(codes[order][first])).to_pylist()
    with ThreadPoolExecutor(16) as pool:
        lengths = list(pool.map(lambda name: dataset.storage.size(f"shards/{name}"), names))
    again = "run the same `genkd shard` command again"
    missing = sorted(name for name, length in zip(names, lengths, strict=True) if length is None)
    if missing:
        raise UserError(f"{dataset.storage} lacks {len(missing)} of its shards, e.g. {missing[0]}; {again}")
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        if length is not None and length < ends[number]:
            raise UserError(
                f"shard {name} of {dataset.storage} has {length} bytes, the index needs {ends[number]}: it is cut off, "
                f"or of another version; {again} with --repair"
            )
        if isinstance(dataset.storage, LocalStorage):
            for place in (first[number], last[number]):
                _require_member(dataset, int(rows[order[place]]), again)


def _require_member(dataset: Dataset, row: int, again: str) -> None:
    """That the tar member whose payload begins where a row says is that row's video."""
    shard, offset, key = (dataset.table[column][row].as_py() for column in ("shard", "offset", "key"))
    name = f"{tar_name(key)}.mp4".encode("utf-8", "surrogateescape")
    if len(name) >= 100:  # a longer name stands in a record of its own
        return
    header = dataset.storage.read_range(f"shards/{shard}", max(0, offset - 512), offset)
    if header[:100].rstrip(b"\0") != name:
        raise UserError(
            f"shard {shard} of {dataset.storage} does not hold {key} where the index says: they are of different "
            f"versions; {again} with --repair"
        )
