"""Folders of whole files, on a local disk or behind any fsspec URL, that one run at a time may write."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import (
    json_bytes,
    locked,
    remove_leftovers,
    replacing,
    write_atomically,
)

TURN = ".lock-plan"


def storage_at(place: str | Path) -> Storage:
    """The storage for a path or an fsspec URL. Raises UserError for an unknown protocol or a missing package."""
    text = str(place)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" not in text:
        return LocalStorage(Path(text).absolute())
    from .remote_storage import RemoteStorage  # which is built upon this module

    return RemoteStorage(text)


def refuse_inside(out: Storage, source: Storage) -> None:
    """Raises UserError if `out` is the folder `source` or lies in it, by whichever links either is named."""
    if isinstance(out, LocalStorage) and isinstance(source, LocalStorage):
        inside = Path(os.path.realpath(out.path)).is_relative_to(os.path.realpath(source.path))
    else:
        inside = f"{out}/".startswith(f"{source}/")
    if inside:
        raise UserError(f"{out} lies inside the source {source}; choose a folder outside it")


def refuse_private(storage: Storage, workers: int | None) -> None:
    """Raises UserError for a place that other processes cannot see, if there are to be any."""
    if storage.private and workers != 0:
        raise UserError(
            f"{storage} is memory of this process, which no worker process sees; use --workers 0 or another place"
        )


class Storage(abc.ABC):
    """A folder of files with names like shards/train-00000.tar. A file is there as a whole or not at all.

    private: whether only this process sees it.
    """

    private = False

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError."""

    @abc.abstractmethod
    def read_range(self, name: str, start: int, stop: int, retries: int = 0) -> bytes:
        """Bytes start..stop-1 of a file, fewer where it ends before. retries: further tries of a remote read that
        fails, after waits that double from 0.2 s to 10 s. Raises FileNotFoundError, UserError when no try succeeds."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """A file's length in bytes; None if there is no such file."""

    @abc.abstractmethod
    def downloaded(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A file as a local path, for the length of the block. Raises FileNotFoundError."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Puts data in place, whole or not at all."""

    @abc.abstractmethod
    def uploading(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write; what is there when the block ends well is put in place, whole."""

    @abc.abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder, sorted; none for a folder that does not exist."""

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file if it is there."""

    @abc.abstractmethod
    def remove_leftovers(self, folder: str, stems: Collection[str] = ("",)) -> None:
        """Deletes what killed runs left half written in a folder, of files whose names begin with one of the stems."""

    @abc.abstractmethod
    def locked(self, part: str = "") -> contextlib.AbstractContextManager[None]:
        """Makes the folder and keeps other runs out of it. Runs with different `part`s may work side by side, but
        not beside one without. Raises UserError if the folder is taken."""

    @abc.abstractmethod
    def turn(self) -> contextlib.AbstractContextManager[bool]:
        """For what runs that hold a `part` must do one at a time: whether it is this one's turn, for the length of the
        block; if not, to be asked again after a look at what the other one has done."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def write_json(self, name: str, value: Any) -> None:
        """value as an indented JSON file."""
        self.write(name, json_bytes(value))


class LocalStorage(Storage):
    """A folder of this machine or of a file system that it mounts."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, stop: int, retries: int = 0) -> bytes:
        with open(self.path / name, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def downloaded(self, name: str) -> Iterator[Path]:
        os.stat(self.path / name)
        yield self.path / name

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, data)

    def uploading(self, name: str) -> contextlib.AbstractContextManager[Path]:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        return replacing(self.path / name)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_leftovers(self, folder: str, stems: Collection[str] = ("",)) -> None:
        remove_leftovers(self.path / folder, stems)

    @contextlib.contextmanager
    def locked(self, part: str = "") -> Iterator[None]:
        """By flock: the lock goes with the process, however it ends."""
        busy = f"another run is writing {self}; wait for it, or stop it first"
        with locked(self.path, busy, shared=bool(part)):
            if not part:
                yield
                return
            with locked(self.path, busy, name=f".lock-{part}"):
                yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        with locked(self.path, "", name=TURN, wait=True):
            yield True
