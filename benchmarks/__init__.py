"""Side-by-side measurements: contenders take turns in one run, and the result is one JSON value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import loader, shard, train


def run_benchmark(what: str, data: Path | None, repeats: int) -> dict[str, Any]:
    """Runs the benchmark `what` ("loader", "shard" or "train"); data: None measures on synthetic videos."""
    return {"loader": loader.run, "shard": shard.run, "train": train.run}[what](data, repeats)
