"""The tables of a data set and their files: dataset.json, index.parquet, and index.arrow, a copy that opens at once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from ..errors import UserError, explain_os_error
from ..files import replacing, write_atomically
from ..storage import LocalStorage, Storage

FORMAT_VERSION = 1

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        (
            "annotations",
            pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("label", pa.int32())])),
        ),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("header_size", pa.int64()),
        ("gop_offsets", pa.list_(pa.int64())),
        ("gop_frames", pa.list_(pa.int32())),
        ("gop_crc32c", pa.list_(pa.uint32())),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("crc32c", pa.uint32()),
        ("source", pa.string()),
        ("source_fps", pa.float64()),
        ("source_frames", pa.int32()),
    ]
)
ERROR_SCHEMA = pa.schema([("path", pa.string()), ("stage", pa.string()), ("reason", pa.string())])
_COUNTS = ("videos", "frames", "seconds", "bytes")


class Corrupt(UserError):
    """Stored bytes that are not what the index says; the text names key, shard and what differs."""


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a zstd Parquet file in memory."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(data: bytes, schema: pa.Schema) -> pa.Table:
    """A Parquet file in memory as a table, read by this thread alone: pq.read_table starts threads for every file.

    Raises Corrupt, whose text goes behind the file's name, if it cannot be read or has other columns.
    """
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Corrupt(f"cannot be read ({reason[:200]})") from None
    if not table.schema.equals(schema):
        raise Corrupt(f"has other columns than format version {FORMAT_VERSION}")
    if any(column.null_count for column in table.columns):
        raise Corrupt("lacks values")
    return table


def digest_of(data: bytes) -> str:
    """The digest that dataset.json records for index.parquet."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def arrow_bytes(table: pa.Table, digest: str) -> bytes:
    """index.arrow: the rows as uncompressed Arrow IPC, marked with the index digest they belong to."""
    sink = pa.BufferOutputStream()
    table = table.cast(SCHEMA).replace_schema_metadata({"index_digest": digest})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def index_table(storage: Storage, digest: str, cache_dir: str = "") -> pa.Table:
    """The index, memory-mapped from index.arrow; that file is made anew from index.parquet when it does not match.

    cache_dir: a local folder for a copy of a remote index, which is read into memory otherwise.
    """
    if not isinstance(storage, LocalStorage):
        return _copied(storage, digest, Path(cache_dir) / "indexes") if cache_dir else read_index(storage, digest)
    cache = storage.path / "index.arrow"
    mapped = _mapped(cache, digest)
    if mapped is None:
        table = read_index(storage, digest)
        try:
            storage.write("index.arrow", arrow_bytes(table, digest))
        except OSError:  # a read-only data set still works, only slower to open
            return table
        mapped = _mapped(cache, digest)
        return table if mapped is None else mapped
    return mapped


def _copied(storage: Storage, digest: str, folder: Path) -> pa.Table:
    """A remote index, memory-mapped from a copy in a local folder that all processes of this machine share."""
    copy = folder / f"{digest.removeprefix('sha256:')[:40]}.arrow"
    mapped = _mapped(copy, digest)
    if mapped is not None:
        return mapped
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), storage.downloaded("index.arrow") as path:
            if _mapped(path, digest) is not None:
                with replacing(copy) as temporary:
                    shutil.copyfile(path, temporary)
        if _mapped(copy, digest) is None:
            write_atomically(copy, arrow_bytes(read_index(storage, digest), digest))
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing the cache {folder}")) from None
    mapped = _mapped(copy, digest)
    return read_index(storage, digest) if mapped is None else mapped


def _mapped(cache: Path, digest: str) -> pa.Table | None:
    """The rows in index.arrow without reading them; None if the file is absent, damaged or of another index."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(cache))).read_all()
        table.validate()
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    fits = table.schema.equals(SCHEMA) and (table.schema.metadata or {}).get(b"index_digest") == digest.encode()
    return table if fits else None


def read_index(storage: Storage, digest: str) -> pa.Table:
    """index.parquet as one table. Raises UserError for another digest or other columns than the format's."""
    try:
        data = storage.read("index.parquet")
        if digest_of(data) != digest:
            raise Corrupt("is not the file that dataset.json describes")
        table = read_parquet(data, SCHEMA)
    except FileNotFoundError:
        raise UserError(f"{storage} has lost its index.parquet; run the same `genkd shard` command again") from None
    except Corrupt as error:
        raise UserError(f"index.parquet in {storage} {error}; run the same `genkd shard` command again") from None
    return table.replace_schema_metadata(None).combine_chunks()


def description(storage: Storage) -> dict[str, Any]:
    """dataset.json. Raises UserError if it is missing, damaged or of another format version."""
    try:
        info = json.loads(storage.read("dataset.json"))
    except (FileNotFoundError, NotADirectoryError):
        if storage.exists("plan.json"):
            raise UserError(
                f"{storage}: the conversion is not finished; run the same `genkd shard` command again"
            ) from None
        raise UserError(f"{storage} is no genkd data set: it has no dataset.json") from None
    except (ValueError, RecursionError):
        info = None
    version = info.get("format_version") if isinstance(info, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(f"{storage} has format version {version!r}; this genkd reads version {FORMAT_VERSION}")
    if version is None or not _is_sound(info):
        raise UserError(f"dataset.json in {storage} is damaged; run the same `genkd shard` command again")
    return info


def _is_sound(info: dict[str, Any]) -> bool:
    """Whether everything that readers of dataset.json take for granted is in it."""
    kinds = {"name": str, "classes": list, "video": dict, "splits": dict, "index_digest": str}
    return (
        all(isinstance(info.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(name, str) for name in info["classes"])
        and isinstance(info["video"].get("codec"), str)
        and isinstance(info.get("rejected", 0), int)
        and all(
            isinstance(counts, dict) and all(isinstance(counts.get(name), (int, float)) for name in _COUNTS)
            for counts in info["splits"].values()
        )
    )
