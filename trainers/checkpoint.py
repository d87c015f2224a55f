"""Training state on disk: written atomically beside the training, with a digest, rotated, read with weights_only."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, explain_os_error
from ..files import replacing

log = logging.getLogger(__name__)

_MARK = b"\ngenkd sha256 "  # then 32 bytes, of all that is before


class Writer:
    """Saves checkpoints in a thread of its own, one at a time, from a copy on the host, while training goes on.

    What goes wrong there is raised by the next call. check() it now and then; finish() it, or close() where that no
    longer matters.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="genkd-checkpoint")
        self._pending: Future | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Waits for the one before, copies the state, and returns. Raises UserError as save() does."""
        self.finish()
        self._pending = self._thread.submit(save, self._folder, step, _copied(state), self._keep)

    def check(self) -> None:
        """Raises UserError if what was given could not be written, as far as is known yet."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Until what was given is on the disk. Raises UserError as save() does."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the thread without asking how it fared."""
        self._thread.shutdown()


def _copied(state: Any) -> Any:
    """The same with tensors of its own, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


class _Hashing:
    """A file to write to that knows its content's SHA-256."""

    def __init__(self, file: Any):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes step-N.pt so that it is whole or absent, and removes all but the `keep` newest.

    Raises UserError when the disk is full; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            hashing: Any = _Hashing(file)
            torch.save(state, hashing)
            file.write(_MARK + hashing.digest.digest())  # behind the archive's end, where torch does not look
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns the system's error into a RuntimeError with the original one as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise UserError(explain_os_error(cause, f"writing checkpoint {path}")) from None
        raise
    for _, old in _checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def _refuse_damaged(path: Path) -> None:
    """Raises ValueError for a file whose content is not what its digest was made of."""
    digest, size = hashlib.sha256(), path.stat().st_size - len(_MARK) - 32
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
        if file.read() != _MARK + digest.digest():
            raise ValueError("its content is not what was written")


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoint of a step, if there is one, so that no run continues from it."""
    path = folder / f"step-{step:08d}.pt"
    if path.exists():
        path.rename(path.with_name(path.name + ".diverged"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint's file, if there is any."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose content is what was written; None if there is no checkpoint at all.

    Damaged ones are renamed to *.damaged with a warning. Raises UserError if none can be read.
    """
    found = _checkpoints(folder)
    for _, path in reversed(found):
        try:
            _refuse_damaged(path)
            return path
        except ValueError as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, error)
            path.rename(path.with_name(path.name + ".damaged"))
        except OSError as error:  # of the disk, or of the network to it
            log.warning("checkpoint %s cannot be read (%s); trying the one before it", path, error.strerror or error)
    if found:
        raise UserError(f"no checkpoint in {folder} can be read; delete the run folder to begin again")
    return None


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU. Raises UserError if it cannot be read."""
    try:
        _refuse_damaged(path)  # on another host than the one that found it sound, too
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {repr(error)[:300]}") from None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)
