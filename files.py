"""Files that are whole or absent, and folders that one process at a time may write."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import socket
import time
import zlib
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
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Puts data at path, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """value as an indented JSON file, written atomically."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """value as the text of an indented JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value of a JSON file, which may be gzipped. Raises UserError."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path} is cut off or damaged: it cannot be unpacked") from None
    except OSError as error:
        raise UserError(explain_os_error(error, f"reading {path}")) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file that are not blank, with their numbers, stripped."""
    if not path.is_file():
        raise UserError(f"there is no list file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028 and others
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def temporary_name(name: str) -> str:
    """What a file is called while this process writes it."""
    return f".{name}.{_HOST}-{os.getpid()}.tmp"


def remove_leftovers(folder: Path, stems: Collection[str] = ("",)) -> None:
    """Deletes what a killed process left half written by replacing(), of files whose names begin with a stem."""
    if folder.is_dir():
        for path in folder.iterdir():
            if is_leftover(path.name, stems):
                path.unlink(missing_ok=True)


def is_leftover(name: str, stems: Collection[str]) -> bool:
    """Whether a name is a temporary one that begins with a stem, and not of another live process of this machine."""
    if not name.startswith(tuple(f".{stem}" for stem in stems)) or not name.endswith(".tmp"):
        return False
    host, _, process = name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
    other = host == _HOST and process.isdigit() and int(process) != os.getpid()
    return not (other and process_lives(int(process)))


def prepare_folder(folder: Path) -> None:
    """Makes a folder and tries a file in it, before work whose results will go there. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_file(folder / "probe")
    except (FileExistsError, NotADirectoryError):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        raise UserError(f"{place} is a file; name a folder") from None
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing into {folder}")) from None


def prepare_file(path: Path) -> None:
    """Makes a file's folder and tries whether it can be written there, before work whose result it will hold.

    Also removes what killed processes left half written of it. Raises UserError.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    prepare_folder(path.parent)
    remove_leftovers(path.parent, (f"{path.name}.",))
    try:
        _try_file(path)
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {path}")) from None


def process_lives(process: int) -> bool:
    """Whether a process of this machine still runs. One that is dead but was never waited for, as under a container's
    init that collects nothing, does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[:1] not in (["Z"], ["X"])


@contextlib.contextmanager
def locked(
    folder: Path, busy: str, name: str = ".lock", shared: bool = False, wait: bool = False, patience: float = 0.0
) -> Iterator[None]:  # fmt: skip
    """Makes the folder and locks it against other processes; the lock goes with the process, however it ends.

    shared: only against those that lock it unshared. A lock that is held is waited for, or for `patience` seconds, and
    is a UserError with the text `busy` then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(explain_os_error(error, f"creating {folder}")) from None
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(busy) from None
                time.sleep(0.5)
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be locked ({error.strerror}); mount its file system with locks, Lustre with the "
                    "option flock, or choose a folder on another one"
                ) from None
        yield
    finally:
        os.close(handle)


def _try_file(path: Path) -> None:
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.write_bytes(b"\0")  # an empty file would fit on a full disk
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
