"""Format version 1: a data set as tar shards of fragmented MP4 with a GOP table. Writes, opens and verifies it."""

from __future__ import annotations

import contextlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..storage import LocalStorage, Storage, storage_at
from .index import (  # noqa: F401 (this module stands for all of the format)
    ERROR_SCHEMA,
    FORMAT_VERSION,
    SCHEMA,
    Corrupt,
    arrow_bytes,
    description,
    digest_of,
    index_table,
    parquet_bytes,
    read_index,
    read_parquet,
)

MAX_PAYLOAD = 8 << 30  # bytes; what a plain tar header can say


class Sink(Protocol):
    """Where encoded bytes go, in order; reset forgets all of them."""

    def write(self, data: bytes) -> int: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Encoded:
    """What was written. gop_frames: first frame of each GOP, then the number of frames.

    reencoded: why a source that was to be copied was encoded instead.
    """

    width: int
    height: int
    fps: float
    num_frames: int
    gop_frames: tuple[int, ...]
    codec: str
    source_fps: float
    source_frames: int
    reencoded: str | None = None


class ShardWriter:
    """Appends videos to a tar file while they are being encoded, so that no payload is ever whole in memory."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[Payload]:
        """A tar member of a size not yet known. If the block raises, the shard is as it was before."""
        start = self._file.tell()
        info = _tar_info(name)
        self._file.write(_header(info))
        payload = Payload(self._file, self._file.tell())
        try:
            yield payload
        except BaseException:
            self._file.seek(start)
            self._file.truncate()
            raise
        info.size = payload.size
        self._file.write(bytes(-payload.size % tarfile.BLOCKSIZE))
        end = self._file.tell()
        self._file.seek(start)
        self._file.write(_header(info))
        self._file.seek(end)

    def finish(self) -> None:
        """Writes the tar's end mark and everything that is still in memory."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.close()

    def close(self) -> None:
        """Releases the file; without finish() before, the shard is not usable."""
        # What is still in the buffer of a failed shard may not fit on the disk either.
        with contextlib.suppress(OSError):
            self._file.close()


class Payload:
    """A sink for one member's bytes that keeps their checksum."""

    def __init__(self, file: BinaryIO, offset: int):
        self._file, self.offset, self.size, self.crc32c = file, offset, 0, 0
        self.error: OSError | None = None  # why a write failed, which a muxer may report as a fault of its own

    def write(self, data: bytes) -> int:
        data = bytes(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)
        self.crc32c = int(google_crc32c.extend(self.crc32c, data))
        return len(data)

    def reset(self) -> None:
        """Forgets what was written, so that the member can be written again."""
        self._file.seek(self.offset)
        self._file.truncate()
        self.size, self.crc32c = 0, 0

    def checksums(self, offsets: Sequence[int]) -> list[int]:
        """CRC-32C of the header and of each GOP, for the GOP table's offsets: what a reader of a part can check."""
        end, found = self._file.tell(), []
        for start, stop in itertools.pairwise([0, *offsets]):
            self._file.seek(self.offset + start)
            found.append(checksum_of(self._file.read(stop - start)))
        self._file.seek(end)
        return found

    def boxes(self) -> list[tuple[str, int, int]]:
        """(type, offset from the payload's start, size) of the top-level MP4 boxes (ISO/IEC 14496-12)."""
        end = self._file.tell()
        found, at = [], 0
        while at < self.size:
            self._file.seek(self.offset + at)
            head = self._file.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            found.append((head[4:8].decode("latin-1"), at, size))
            if size < 8:
                raise Corrupt(f"an MP4 box of {size} bytes at {at}")
            at += size
        self._file.seek(end)
        return found


def gop_table(boxes: list[tuple[str, int, int]], size: int) -> tuple[int, list[int]]:
    """(header size, offset of each fragment and then the payload's end) of a fragmented MP4's top-level boxes."""
    offsets = [at for kind, at, _ in boxes if kind == "moof"]
    if not offsets or any(kind not in ("moof", "mdat") for kind, at, _ in boxes if at >= offsets[0]):
        raise Corrupt(f"not a fragmented MP4 of header and fragments: {[kind for kind, _, _ in boxes][:12]}")
    return offsets[0], [*offsets, size]


def checksum_of(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli, RFC 3720)."""
    return int(google_crc32c.value(data))


def tar_name(key: str) -> str:
    """The tar member's stem for a key. WebDataset splits names at the first dot, so the last part's become %2E."""
    folder, separator, name = key.rpartition("/")
    return folder + separator + name.replace(".", "%2E")


@dataclass(frozen=True)
class Video:
    """One row of the index. Offsets are bytes from the payload's start; gop_frames end with num_frames.

    gop_crc32c: checksums of the header and then of each GOP.
    """

    row: int
    key: str
    label: int
    shard: str
    offset: int
    size: int
    header_size: int
    gop_offsets: np.ndarray
    gop_frames: np.ndarray
    gop_crc32c: np.ndarray
    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    crc32c: int


class Dataset:
    """An opened data set: its description and its index, memory-mapped where the data set is on a local disk."""

    def __init__(self, storage: Storage, info: dict[str, Any], table: pa.Table):
        self.storage, self.info, self.table = storage, info, table

    @classmethod
    def open(cls, place: str | Path, *, checked: bool = False, cache_dir: str = "") -> Dataset:
        """Opens DATASET, a path or fsspec URL.

        checked: takes the rows from index.parquet, whose digest is known, and not from its memory-mapped copy: for
        work that goes over all of them anyway. cache_dir: where a remote index is kept, to be memory-mapped too.
        Raises UserError if the data set is missing, incomplete, damaged or of another format version.
        """
        storage = storage_at(place)
        info = description(storage)
        digest = info["index_digest"]
        return cls(storage, info, read_index(storage, digest) if checked else index_table(storage, digest, cache_dir))

    @property
    def path(self) -> Path:
        """The folder. Raises UserError for a data set that is not on a local disk."""
        if not isinstance(self.storage, LocalStorage):
            raise UserError(f"{self.storage} has to be copied to a local disk for this")
        return self.storage.path

    @property
    def classes(self) -> list[str]:
        return self.info["classes"]

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, in key order. Raises UserError for an unknown or empty split."""
        found = np.flatnonzero(pc.equal(self.table["split"], split).to_numpy(zero_copy_only=False))
        if not len(found):
            known = ", ".join(self.info["splits"]) or "none"
            raise UserError(f"{self.storage} has no videos in a split {split!r}; its splits: {known}")
        return found

    def column(self, name: str) -> np.ndarray:
        """A fixed-width column as an array."""
        return self.table[name].to_numpy()

    @cached_property
    def num_frames(self) -> np.ndarray:
        return self.column("num_frames")

    @cached_property
    def labels(self) -> np.ndarray:
        return self.column("label")

    def video(self, row: int) -> Video:
        """One row. Raises Corrupt if it points outside the data set or contradicts itself."""
        values = {name: self.table[name][row] for name in _VIDEO_COLUMNS}
        arrays = {name: values.pop(name).values.to_numpy() for name in _LISTS}
        video = Video(row=row, **{name: value.as_py() for name, value in values.items()}, **arrays)
        if not is_shard_name(video.shard):
            raise Corrupt(f"row {row} of {self.storage}: shard name {video.shard!r} points outside the data set")
        offsets, frames = video.gop_offsets, video.gop_frames
        sound = (
            video.offset >= 0 and len(offsets) == len(frames) == len(video.gop_crc32c) > 1
            and 0 < video.header_size == offsets[0]
            and offsets[-1] == video.size and frames[0] == 0 and frames[-1] == video.num_frames
            and bool((np.diff(offsets) > 0).all()) and bool((np.diff(frames) > 0).all())
        )  # fmt: skip
        if not sound:
            raise Corrupt(
                f"row {row} of {self.storage} ({video.key}): its offsets or frame numbers contradict each other"
            )
        return video


_LISTS = ("gop_offsets", "gop_frames", "gop_crc32c")
_VIDEO_COLUMNS = [name for name in Video.__dataclass_fields__ if name != "row"]


def is_shard_name(name: str) -> bool:
    """Whether an index entry names a file of the data set's shards folder, and nothing outside it."""
    return "/" not in name and "\\" not in name and not name.startswith(".") and name.endswith(".tar")


def sidecar_bytes(row: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    """KEY.json: what a reader of the tar alone wants to know of a video, from its row of the index."""
    names = ("key", "split", "label", "annotations", "num_frames", "fps", "width", "height", "codec", "source")
    about = {name: row[name] for name in names}
    about["class"] = classes[row["label"]] if row["label"] >= 0 else None
    return json.dumps(about, ensure_ascii=False).encode()


def _header(info: tarfile.TarInfo) -> bytes:
    """GNU's form for long names and bytes beyond ASCII: DALI's reader knows it, but not POSIX's (PAX)."""
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _tar_info(name: str) -> tarfile.TarInfo:
    """Nothing of the machine or the moment goes into a member's header."""
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    return info
