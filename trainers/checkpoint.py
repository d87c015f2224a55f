"""Training state on disk: written atomically, rotated, read with weights_only."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, explain_os_error
from ..files import replacing

log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes step-N.pt so that it is whole or absent, and removes all but the `keep` newest.

    Raises UserError when the disk is full; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns the system's error into a RuntimeError with the original one as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise UserError(explain_os_error(cause, f"writing checkpoint {path}")) from None
        raise
    for _, old in _checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoint of a step, if there is one, so that no run continues from it."""
    path = folder / f"step-{step:08d}.pt"
    if path.exists():
        path.rename(path.with_name(path.name + ".diverged"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint's file, if there is any."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest readable checkpoint, on the CPU; None if there is no checkpoint at all.

    Damaged ones are renamed to *.damaged with a warning. Raises UserError if all are damaged.
    """
    found = _checkpoints(folder)
    for _, path in reversed(found):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, repr(error)[:200])
            path.rename(path.with_name(path.name + ".damaged"))
    if found:
        raise UserError(f"no checkpoint in {folder} can be read; delete the run folder to begin again")
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)
