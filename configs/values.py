"""Values with a grammar of their own: the steps of a profile, and the places that metrics go to."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Address(NamedTuple):
    """Where a server listens; an empty host is every interface of the machine."""

    host: str
    port: int


def profile_steps(text: str) -> tuple[int, int] | None:
    """(first, behind the last) of "10:15" or "steps=10:15"; None for "". Raises ValueError."""
    if not text:
        return None
    found = re.fullmatch(r"(?:steps=)?(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if first >= last:
        raise ValueError("profile is FIRST:LAST, steps counted from 0 and without the last, e.g. profile=10:15")
    return first, last


def prometheus_target(text: str) -> str | Address:
    """The path of "PATH.prom", or the address of "HOST:PORT", ":PORT" or "[::1]:PORT". Raises ValueError."""
    if text.endswith(".prom"):
        return text
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]*)):(\d{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise ValueError(
            f"prometheus is a file, PATH.prom, or where to serve, HOST:PORT or :PORT, or a list of such, not {text!r}"
        )
    return Address(found[1] or found[2] or "", int(found[3]))


def as_profile(value: Any) -> Any:
    """A configuration's value, checked."""
    profile_steps(value if isinstance(value, str) else str(value))
    return value


def as_prometheus(value: Any) -> tuple[str, ...]:
    """A configuration's value, one target or a list of them, as a tuple. Raises ValueError."""
    if isinstance(value, list | tuple):
        targets = tuple(value)
    else:
        targets = () if value in ("", None) else (value,)
    for target in targets:
        prometheus_target(target if isinstance(target, str) else str(target))
    return targets
