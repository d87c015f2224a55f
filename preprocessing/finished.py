"""Shards that are complete: their own Parquet files, with the rows and the notes of the conversion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from ..storage import Storage
from .index import SCHEMA, Corrupt, parquet_bytes, read_parquet
from .sources import Rejection

SUFFIXES = ("tar", "idx", "parquet")
_FINGERPRINT, _ERRORS, _REENCODED = b"genkd.fingerprint", b"genkd.errors", b"genkd.reencoded"


def shard_bytes(rows: list[dict], fingerprint: str, errors: list[list[str]], reencoded: Counter[str]) -> bytes:
    """A shard's Parquet file. errors: path, stage, reason of what was left out; reencoded: reason -> videos."""
    notes = {
        _FINGERPRINT: fingerprint,
        _ERRORS: json.dumps(errors, ensure_ascii=False),
        _REENCODED: json.dumps(dict(sorted(reencoded.items()))),
    }
    return parquet_bytes(pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(notes))


def shard_rows(data: bytes) -> pa.Table:
    """What shard_bytes wrote. Raises Corrupt, whose text goes behind the file's name, for anything else."""
    table = read_parquet(data, SCHEMA)
    notes = table.schema.metadata or {}
    try:
        errors, reencoded = json.loads(notes[_ERRORS]), json.loads(notes[_REENCODED])
        sound = (
            notes[_FINGERPRINT].isalnum() and isinstance(errors, list)
            and all(isinstance(part, str) for entry in errors for part in [*entry, *[None] * (len(entry) != 3)])
            and all(isinstance(count, int) for count in reencoded.values())
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise Corrupt("has lost its notes on the conversion")
    return table


def finished(storage: Storage, prints: dict[str, str]) -> dict[str, pa.Table]:
    """The rows of the shards that are complete and as planned. prints: name -> fingerprint by the plan."""
    there = set(storage.names("shards"))

    def rows(name: str) -> pa.Table | None:
        if not {f"{name}.{suffix}" for suffix in SUFFIXES} <= there:
            return None
        try:
            table = shard_rows(storage.read(f"shards/{name}.parquet"))
        except (OSError, Corrupt):
            return None
        return table if is_planned(table, prints[name]) else None

    with ThreadPoolExecutor(16) as pool:
        found = zip(prints, pool.map(rows, prints), strict=True)
        return {name: table for name, table in found if table is not None}


def is_planned(table: pa.Table, fingerprint: str) -> bool:
    """Whether a shard was made as the plan with this fingerprint says."""
    return table.schema.metadata[_FINGERPRINT] == fingerprint.encode()


def rejections(tables: Iterable[pa.Table]) -> list[Rejection]:
    """The sources that finished shards had to leave out."""
    return [Rejection(*entry) for table in tables for entry in json.loads(table.schema.metadata[_ERRORS])]


def reencoded_videos(tables: Iterable[pa.Table]) -> Counter[str]:
    """How many videos of finished shards could not be copied, by reason."""
    total: Counter[str] = Counter()
    for table in tables:
        total.update(json.loads(table.schema.metadata[_REENCODED]))
    return total


def strays(names: Iterable[str], planned: Collection[str]) -> list[str]:
    """Files of the shards folder that are of no planned shard; hidden ones, which are being written, left out."""
    ours = {f"{name}.{suffix}" for name in planned for suffix in SUFFIXES}
    return [name for name in names if name not in ours and not name.startswith(".")]
