"""What a soak looks for: samples lost or repeated, growth of what a rank holds, weights that differ."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

WARM = 20.0  # seconds that a rank takes to have loaded and begun everything


class Sample(NamedTuple):
    """A look at one rank: seconds since its start, memory of its own and its share of what it shares, without files
    that are mapped (MB), threads, open files."""

    seconds: float
    megabytes: float
    threads: int
    files: int


def look_at(number: int) -> Sample | None:
    """A sample of the process of that number; nothing where it has ended."""
    place = Path("/proc", str(number))
    with suppress(OSError, ValueError, IndexError):
        sizes = {name: int(rest.split()[0]) for name, _, rest in (
            line.partition(":") for line in (place / "smaps_rollup").read_text().splitlines()[1:])}  # fmt: skip
        kilobytes = sizes["Pss"] - sizes.get("Pss_File", 0)
        started = int((place / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        alive = float(Path("/proc/uptime").read_text().split()[0]) - started
        return Sample(alive, kilobytes / 1e3, len(os.listdir(place / "task")), len(os.listdir(place / "fd")))
    return None


def growth(samples: dict[int, list[Sample]]) -> dict[str, float]:
    """Of the rank that lived longest, once it had warmed up: the last fifth of its samples over the first; nothing
    where no rank lived long enough to tell. `samples` are those of each process, in the order of their starts."""
    warm = [[sample for sample in own if sample.seconds >= WARM] for own in samples.values()]
    return _last_over_first(max(warm, key=len, default=[]))


def growth_from_start_to_start(samples: dict[int, list[Sample]]) -> dict[str, float]:
    """The same from process to process: the medians of the last fifth of those that had warmed up over the first."""
    warm = [[sample for sample in own if sample.seconds >= WARM] for own in samples.values()]
    return _last_over_first([Sample(*np.median(own, axis=0)) for own in warm if own])


def _last_over_first(samples: list[Sample]) -> dict[str, float]:
    fifth = len(samples) // 5
    if not fifth:
        return {}
    early, late = (np.median(part, axis=0) for part in (samples[:fifth], samples[-fifth:]))
    return {name: round(float(late[i] / early[i]), 3) for i, name in enumerate(Sample._fields) if name != "seconds"}


def read(path: Path, behind: int = 0) -> Iterator[list[Any]]:
    """Lines of a record behind so many bytes; the first and the last may be a part of a line and are passed over
    then."""
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, behind))
            for line in file:
                with suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, list):
                        yield entry


def count_samples(record: Path, epochs: int, rows: list[int]) -> dict[str, int]:
    """Of each step, what its last attempt saw: videos that an epoch lacks, and that it has more than once."""
    last: dict[int, tuple[float, dict[int, tuple[int, list[int]]]]] = {}
    for attempt, step, draw, rank, seen in read(record):
        if step not in last or last[step][0] < attempt:
            last[step] = attempt, {}
        last[step][1][rank] = draw, seen
    counts = Counter((draw, row) for _, ranks in last.values() for draw, seen in ranks.values() for row in seen)
    wanted = {(draw, row) for draw in range(epochs) for row in rows}
    return {
        "lost": len(wanted - set(counts)),
        "repeated": sum(counts.values()) - len(counts),
        "unknown": len(set(counts) - wanted),
    }


def compare_weights(one: Path, two: Path) -> float:
    """The largest difference of any weight."""
    worst = 0.0
    for name in ("recognizer", "cvae"):
        a, b = (load_file(folder / "weights" / f"{name}.safetensors") for folder in (one, two))
        worst = max(worst, *(float(np.abs(a[key].astype(np.float64) - b[key]).max(initial=0)) for key in a))
    return worst
