"""An on-disk cache of blocks of remote files that forgets what was used least lately. Processes may share it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from pathlib import Path

from ..errors import UserError, explain_os_error

BLOCK = 1 << 20  # bytes; a clip of a few hundred kilobytes touches one or two
_FULL = 0.9  # what is kept when the limit is reached
_LOOKS = 64  # into the folder, while one process writes as much as the limit


class BlockCache:
    """Blocks of files as files of their own below a folder. limit: bytes that they take together, about.

    Every process that writes looks after the limit by itself, so several may share the folder; a block that another
    one has deleted is simply missing. Raises UserError if the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(explain_os_error(error, f"writing the cache {folder}")) from None
        self._room = self._make_room()

    def get(self, name: str, number: int) -> bytes | None:
        """A block, or None where it is not there."""
        path = self._path(name, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # now used
        except OSError:
            return None
        return data

    def put(self, name: str, number: int, data: bytes) -> None:
        """Keeps a block; a full disk only means that it is not kept."""
        path = self._path(name, number)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)  # whole or not at all; after a power cut its checksum tells
            finally:
                temporary.unlink(missing_ok=True)
        with self._lock:
            self._room -= len(data)
            if self._room < 0:
                self._room = self._make_room()

    def drop(self, name: str, number: int) -> None:
        """Forgets a block, as one that turned out to be damaged."""
        self._path(name, number).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self._folder / digest[:2] / f"{digest}-{number:06d}"

    def _make_room(self) -> int:
        """Deletes the blocks unused for longest if all are over the limit; returns how many bytes are free."""
        blocks = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(OSError):
                    path = os.path.join(folder, name)
                    status = os.stat(path)
                    blocks.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in blocks)
        if total > self._limit:
            for _, size, path in sorted(blocks):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size
                if total <= _FULL * self._limit:
                    break
        # Others write too, so the folder is looked at again long before this one alone could have filled it.
        return min(self._limit - total, self._limit // _LOOKS)
