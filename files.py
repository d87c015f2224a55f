"""Files that are whole or absent, and folders that one process at a time may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError, explain_os_error

_HOST = socket.gethostname().replace(".", "-")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written and closed in the block, then fsynced and renamed to it.

    A reader sees all of the file or nothing of it, also after a power cut; if the block raises, nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Puts data at path, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """value as an indented JSON file, written atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove_leftovers(folder: Path, stems: Collection[str] = ("",)) -> None:
    """Deletes what a killed process left half written by replacing(), of files whose names begin with a stem."""
    begun = tuple(f".{stem}" for stem in stems)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(begun) and path.name.endswith(".tmp") and not _is_being_written(path.name):
                path.unlink(missing_ok=True)


def _is_being_written(name: str) -> bool:
    """Whether the process in a temporary name is another one that lives on this machine."""
    host, _, process = name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
    alive = host == _HOST and process.isdigit() and int(process) != os.getpid()
    return alive and os.path.exists(f"/proc/{process}")


@contextlib.contextmanager
def locked(folder: Path, busy: str, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Makes the folder and locks it against other processes; the lock goes with the process, however it ends.

    shared: only against those that lock it unshared. Raises UserError with the text `busy` if it is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(explain_os_error(error, f"creating {folder}")) from None
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
