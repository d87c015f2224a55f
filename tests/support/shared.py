"""Folders that are made once in a test session, by whichever worker asks first, and read by all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class SharedFolders:
    """root: the same folder for all workers of the session."""

    def __init__(self, root: Path):
        self.root, self._used = root, set()
        root.mkdir(exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder that make(folder) makes, once; tests read it and must not write to it."""
        folder, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that died
                make(folder)
                done.write_text(json.dumps(_state(folder)))
        self._used.add(name)
        return folder

    def assert_untouched(self) -> None:
        """Raises AssertionError where a file was added, changed or removed since the folder was made."""
        for name in sorted(self._used):
            before, now = json.loads((self.root / f"{name}.done").read_text()), _state(self.root / name)
            changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
            assert not changed, f"a test has written into the shared folder {name}: {', '.join(changed[:5])}"


def _state(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, but for lock files, which say nothing."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")}
    return {str(path.relative_to(folder)): [stat.st_size, stat.st_mtime_ns] for path, stat in files.items()}
