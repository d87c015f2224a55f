"""The one exception that is meant for people: its text names what is wrong and what to do about it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input, configuration or surroundings. The command line prints the text and exits with 1."""


class Stopped(Exception):
    """Work that was asked to stop and has saved its state. exit_code: 130 after Ctrl-C, 0 after SIGTERM."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Raises an operating system error of the block as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(explain_os_error(error, doing)) from None


def explain_os_error(error: OSError, doing: str) -> str:
    """One sentence for an operating system error met while `doing` something, with the remedy where one is known."""
    where = f" ({error.filename})" if error.filename and str(error.filename) not in doing else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk while {doing}{where}: free some space, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission while {doing}{where}: {error.strerror}; check the owner and mode of that path"
    return f"{error.strerror or error} while {doing}{where}"
