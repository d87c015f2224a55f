"""Names of videos: which files count as one, how lists name them, and where a named one is found."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError

VIDEO_EXTENSIONS = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)
ARRAY_EXTENSION = ".npy"
FIRST_FRAME = "image_00001.jpg"
_FILE, _ARRAY, _FOLDER = range(3)  # in the order in which Finder prefers them


class Finder:
    """Looks up the videos that a list names; reads each folder once, when it is first asked for."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._folders: dict[str, dict[str, list[tuple[int, str]]]] = {}
        self._unreadable: dict[str, str] = {}

    def find(self, name: str) -> str | None:
        """The path of `name`, relative to the root: that file, else one with another video extension, else .npy, else
        a folder of frames; None if there is none. The extension may be left out."""
        folder, _, base = name.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._read(folder)
        by_stem = self._folders[folder]
        stem = video_stem(base)
        candidates = by_stem.get(stem, []) + (by_stem.get(base, []) if base != stem else [])
        for rank, found in sorted(candidates, key=lambda entry: (entry[0] == _FOLDER or entry[1] != base, *entry)):
            path = os.path.join(self._root, folder, found)
            if rank != _FOLDER or is_frame_folder(path):
                return path
        return None

    def why_missing(self, name: str) -> str:
        """Why `find` found nothing of that name."""
        trouble = self._unreadable.get(name.rpartition("/")[0])
        return f"its folder cannot be read: {trouble}" if trouble else "there is no such file"

    def _read(self, folder: str) -> dict[str, list[tuple[int, str]]]:
        by_stem: dict[str, list[tuple[int, str]]] = {}
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                for entry in entries:
                    if is_folder(entry):
                        stem, rank = entry.name, _FOLDER
                    else:
                        stem = video_stem(entry.name)
                        rank = _ARRAY if entry.name.endswith(ARRAY_EXTENSION) else _FILE
                    by_stem.setdefault(stem, []).append((rank, entry.name))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self._unreadable[folder] = error.strerror or str(error)
        return by_stem


def is_frame_folder(path: str | Path) -> bool:
    """Whether path is a folder of numbered JPEG frames, image_00001.jpg and on: one video."""
    return os.path.isfile(os.path.join(path, FIRST_FRAME))


def video_stem(name: str) -> str:
    """name without the extension of a video file or array; any other name as it is."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in VIDEO_EXTENSIONS or extension == ARRAY_EXTENSION else name


def is_folder(entry: os.DirEntry) -> bool:
    """Whether a directory entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def relative_name(name: str, root: Path, where: str) -> str:
    """The path that a list gives, relative to root; `where` names list and line for errors.

    Raises UserError for a path that leads out of root.
    """
    path = os.path.normpath(name) if name and "\0" not in name else "."
    if os.path.isabs(path):
        for base in (str(root), os.path.realpath(root)):
            if path.startswith(base.rstrip("/") + "/"):
                return path[len(base.rstrip("/")) + 1 :]
    elif path not in (".", "..") and not path.startswith("../"):
        return path
    raise UserError(f"{where}: {name!r} is no path below {root}; give paths relative to that folder")


def printable(name: str) -> str:
    """name as valid UTF-8 on one line: control characters, % and undecodable bytes become %XX."""
    raw = os.fsencode(name)
    try:
        text = raw.decode("utf-8")
        if "%" not in text and text.isprintable():
            return text
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
        return "".join(c if c.isascii() and c.isprintable() and c != "%" else f"%{ord(c):02X}" for c in text)
    return "".join(c if c.isprintable() and c != "%" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)
