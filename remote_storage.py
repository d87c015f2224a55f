"""Folders behind fsspec URLs, among them object stores."""

from __future__ import annotations

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
from .files import is_leftover, process_lives, temporary_name
from .storage import TURN, Storage

# Object stores show an object only once its upload is complete; elsewhere a temporary name and a rename do that.
_ATOMIC_PROTOCOLS = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"])
_STALE_SECONDS = 120.0  # a remote lock whose holder has not renewed it for so long belongs to a dead run
_BEAT_SECONDS = 20.0
_SETTLE_SECONDS = 0.5  # after which of two remote writers both can see who was the later one
_SCRATCH = "genkd-scratch-"  # then the process, in the folder for temporary files


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
        if self._living(TURN):
            time.sleep(_SETTLE_SECONDS)
            yield False
        elif holder := self._claim(TURN):
            with self._renewing(TURN, holder):
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
