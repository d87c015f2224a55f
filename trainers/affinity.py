"""Which cores a rank uses: those near its GPU, shared out among the ranks of its node that are there too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PCI = Path("/sys/bus/pci/devices")


class Cores(NamedTuple):
    """Of a process: the cores it may use, and those of them near its GPU, all where that is not known."""

    allowed: tuple[int, ...]
    near: tuple[int, ...]


def of(device: torch.device, folder: Path = _PCI) -> Cores:
    """This process's."""
    allowed = sorted(os.sched_getaffinity(0))
    near: list[int] = []
    if device.type == "cuda":
        about: Any = torch.cuda.get_device_properties(device)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            place = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
            listed = parse((folder / place / "local_cpulist").read_text(encoding="ascii"))
            near = [core for core in listed if core in allowed]
    return Cores(tuple(allowed), tuple(near or allowed))


def parse(text: str) -> list[int]:
    """The kernel's lists, such as "0-3,8". Raises ValueError for others."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def share(everyone: Sequence[tuple[str, Cores]], rank: int) -> tuple[int, ...]:
    """A rank's part of its cores. everyone: host and cores of all ranks.

    Ranks of a host that have the same cores take an equal slice each, and one core at least. Where someone has given
    them different ones already, or there are more ranks than cores, each keeps what it has.
    """
    host, own = everyone[rank]
    neighbours = [number for number, (name, _) in enumerate(everyone) if name == host]
    if len({everyone[number][1].allowed for number in neighbours}) > 1:
        return own.allowed
    sharing = [number for number in neighbours if everyone[number][1].near == own.near]
    if len(sharing) > len(own.near):
        return own.allowed
    at, count = sharing.index(rank), len(own.near)
    return own.near[at * count // len(sharing) : (at + 1) * count // len(sharing)]


def share_out(everyone: Sequence[tuple[str, Cores]], rank: int) -> None:
    """Keeps this process, and the threads it starts from here on, on its part of the cores."""
    with contextlib.suppress(OSError):  # a container may forbid it; then all use all
        os.sched_setaffinity(0, share(everyone, rank))
