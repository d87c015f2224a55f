"""What every benchmark needs: turns, quantiles, the machine's description, data to measure on."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..preprocessing.synthetic import SynthSettings, synthesize

_PACKAGES = ("torch", "nvidia-dali-cuda120", "av", "numpy", "numba", "pyarrow", "genkd")


def compare(
    name: str,
    unit: str,
    contenders: Mapping[str, Callable[[], tuple[float, dict]]],
    repeats: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Lets the contenders take turns `repeats` times; each call gives one rate (higher is better) and notes.

    Taking turns spreads a noisy machine's slow moments over all of them. The first contender is the ratio's base.
    """
    rates: dict[str, list[float]] = {label: [] for label in contenders}
    notes: dict[str, dict] = {}
    for _ in range(repeats):
        for label, measure in contenders.items():
            rate, notes[label] = measure()
            rates[label].append(rate)
    base = float(np.median(rates[next(iter(rates))]))
    rows = []
    for label, values in rates.items():
        low, middle, high = (float(value) for value in np.percentile(values, [10, 50, 90]))
        rows.append(
            {"name": label, "median": middle, "p10": low, "p90": high, "ratio": middle / base, "repeats": repeats,
             "extra": notes[label]}
        )  # fmt: skip
    return {"benchmark": name, "unit": unit, "about": about, "machine": machine(), "versions": versions(), "rows": rows}


def named(names: Sequence[str], texts: Sequence[str], what: str) -> list[str]:
    """The names with one of the texts in them, or all without any text. Raises UserError for a text in none of them."""
    for text in texts:
        if not any(text in name for name in names):
            raise UserError(f"no {what} has {text!r} in its name; there are {', '.join(names)}")
    return [name for name in names if not texts or any(text in name for text in texts)]


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e9, 1), "gpu": gpu}


def versions() -> dict[str, str]:
    """Python and the packages that matter for speed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def synthetic_videos(videos_per_class: int, width: int, height: int) -> Iterator[Path]:
    """A temporary synthetic data set of AVI files."""
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        settings = SynthSettings(videos_per_class=videos_per_class, width=width, height=height)
        synthesize(Path(folder, "videos"), settings, workers=len(os.sched_getaffinity(0)))
        yield Path(folder, "videos")
