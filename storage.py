"""Folders of whole files, on a local disk or behind any fsspec URL, that one run at a time may write."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import posixpath
import random
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import (
    is_leftover,
    json_bytes,
    locked,
    process_lives,
    remove_leftovers,
    replacing,
    temporary_name,
    write_atomically,
)

# Object stores show an object only once its upload is complete; elsewhere a temporary name and a rename do that.
_ATOMIC_PROTOCOLS = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"])
_STALE_SECONDS = 120.0  # a remote lock whose holder has not renewed it for so long belongs to a dead run
_BEAT_SECONDS = 20.0
_SETTLE_SECONDS = 0.5  # after which of two remote writers both can see who was the later one
_TURN = ".lock-plan"
_SCRATCH = "genkd-scratch-"  # then the process, in the folder for temporary files


def storage_at(place: str | Path) -> Storage:
    """The storage for a path or an fsspec URL. Raises UserError for an unknown protocol or a missing package."""
    text = str(place)
    if text.startswith("file://"):
        text = text[len("file://") :]
    return RemoteStorage(text) if "://" in text else LocalStorage(Path(text).absolute())


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
        with locked(self.path, "", name=_TURN, wait=True):
            yield True


def _machine() -> str:
    """This machine and, where containers share one, this container: process numbers mean the same within it."""
    space = os.stat("/proc/self/ns/pid").st_ino if Path("/proc/self/ns/pid").exists() else 0
    return f"{socket.gethostname()}/{space}"


class RemoteStorage(Storage):
    """A folder behind an fsspec URL such as s3://bucket/folder."""

    def __init__(self, url: str):
        import fsspec

        super().__init__(url.rstrip("/"))
        try:
            self._fs, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:  # whose texts name the package to install, or the known protocols
            raise UserError(f"{url} cannot be opened ({error})") from None
        except Exception as error:  # every fsspec implementation has exceptions of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{url} is no folder that fsspec can open ({reason})") from None
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._atomic, self.private = bool(_ATOMIC_PROTOCOLS & protocols), "memory" in protocols

    def read(self, name: str) -> bytes:
        with self._explained():
            return self._fs.cat_file(self._path(name))

    def read_range(self, name: str, start: int, stop: int, retries: int = 0) -> bytes:
        for attempt in range(retries + 1):
            try:
                with self._explained():
                    return self._fs.cat_file(self._path(name), start=start, end=stop)
            except UserError:
                if attempt == retries:
                    raise
                # Spread, so that the ranks of a host do not all come back at the same moment.
                time.sleep(min(10.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    def size(self, name: str) -> int | None:
        with self._explained():
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def downloaded(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
            local = Path(folder, posixpath.basename(name))
            with self._explained():
                self._fs.get_file(self._path(name), str(local))
            yield local

    def write(self, name: str, data: bytes) -> None:
        with self._placing(name) as path:
            self._fs.pipe_file(path, data)

    @contextlib.contextmanager
    def uploading(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
            local = Path(folder, posixpath.basename(name))
            yield local
            with self._placing(name) as path:
                self._fs.put_file(str(local), path)

    def names(self, folder: str = "") -> list[str]:
        with self._explained():
            path = self._path(folder)
            self._fs.invalidate_cache(path)
            try:
                return sorted({posixpath.basename(entry.rstrip("/")) for entry in self._fs.ls(path, detail=False)})
            except (FileNotFoundError, NotADirectoryError):
                return []

    def exists(self, name: str) -> bool:
        with self._explained():
            self._fs.invalidate_cache(posixpath.dirname(self._path(name)))
            try:  # isfile() would take any error for an absent file
                return self._fs.info(self._path(name))["type"] == "file"
            except FileNotFoundError:
                return False

    def delete(self, name: str) -> None:
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_leftovers(self, folder: str, stems: Collection[str] = ("",)) -> None:
        for place in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
            process = place.name.removeprefix(_SCRATCH).split("-")[0]
            if process.isdigit() and not process_lives(int(process)):
                shutil.rmtree(place, ignore_errors=True)
        for name in [] if self._atomic else self.names(folder):
            if is_leftover(name, stems):
                self.delete(posixpath.join(folder, name))

    @contextlib.contextmanager
    def locked(self, part: str = "") -> Iterator[None]:
        """By an object that its holder renews; one that is not renewed any more is taken over."""
        name = f".lock-{part}" if part else ".lock"
        self._refuse_others(part)
        self._refuse_if_alive(name)
        holder = self._claim(name)
        try:
            if not holder:
                raise UserError(f"another run is writing {self}; wait for it, or stop it first")
            self._refuse_others(part)
        except UserError:
            self._release(name, holder)
            raise
        with self._renewing(name, holder):
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """By an object, as locked() does."""
        if self._living(_TURN):
            time.sleep(_SETTLE_SECONDS)
            yield False
        elif holder := self._claim(_TURN):
            with self._renewing(_TURN, holder):
                yield True
        else:
            yield False

    def _claim(self, name: str) -> dict[str, Any]:
        """Takes a lock that nobody held, as far as was seen, and says as whom; empty if another one took it too."""
        holder = {"host": _machine(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._beat(name, holder)
        # Of two runs that begin at once the later writer holds the lock, and the other one sees it here.
        time.sleep(_SETTLE_SECONDS)
        return holder if self._lock_state(name).get("token") == holder["token"] else {}

    @contextlib.contextmanager
    def _renewing(self, name: str, holder: dict[str, Any]) -> Iterator[None]:
        done = threading.Event()

        def renew() -> None:
            while not done.wait(_BEAT_SECONDS):
                with contextlib.suppress(OSError, UserError):
                    if self._lock_state(name).get("token", holder["token"]) == holder["token"]:
                        self._beat(name, holder)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._release(name, holder)

    def _release(self, name: str, holder: dict[str, Any]) -> None:
        if holder and self._lock_state(name).get("token") == holder["token"]:
            self.delete(name)

    def _refuse_others(self, part: str) -> None:
        for other in [".lock"] if part else [entry for entry in self.names() if entry.startswith(".lock-")]:
            self._refuse_if_alive(other)

    def _beat(self, name: str, holder: dict[str, Any]) -> None:
        with self._explained():
            self._fs.pipe_file(self._path(name), json.dumps({**holder, "time": time.time()}).encode())

    def _lock_state(self, name: str) -> dict[str, Any]:
        """Who holds a lock; empty if nobody does."""
        try:
            state = json.loads(self.read(name))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        return state if isinstance(state, dict) else {}

    def _refuse_if_alive(self, name: str) -> None:
        if state := self._living(name):
            age = time.time() - float(state.get("time", 0.0))
            raise UserError(
                f"another run ({state.get('host')}, process {state.get('pid')}) was writing {self} {age:.0f} s ago; "
                f"wait for it; if it is dead, wait {_STALE_SECONDS - age:.0f} s more or delete {self}/{name}"
            )

    def _living(self, name: str) -> dict[str, Any]:
        """Who holds a lock and may still be at work; the lock of a dead run is taken away."""
        state = self._lock_state(name)
        if not state:
            return {}
        process = state.get("pid")
        gone = state.get("host") == _machine() and isinstance(process, int) and not process_lives(process)
        if time.time() - float(state.get("time", 0.0)) < _STALE_SECONDS and not gone:
            return state
        self.delete(name)
        return {}

    @contextlib.contextmanager
    def _placing(self, name: str) -> Iterator[str]:
        """A path to write to; the file has its name only when all of it is there."""
        path = self._path(name)
        with self._explained():
            if self._atomic:
                yield path
                return
            folder, leaf = posixpath.split(path)
            self._fs.makedirs(folder, exist_ok=True)
            temporary = posixpath.join(folder, temporary_name(leaf))
            yield temporary
            self._fs.mv(temporary, path)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name).rstrip("/") if name else self._root

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What a remote file system raises, in one sentence; missing files stay FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, UserError):
            raise
        except Exception as error:  # every fsspec implementation has exceptions of its own
            if type(error).__module__.split(".")[0] == "builtins" and not isinstance(error, OSError):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"{self} cannot be used ({type(error).__name__}: {reason})") from error
