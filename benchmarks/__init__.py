"""Side-by-side measurements: contenders take turns in one run, and the result is one JSON value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError


def run_benchmark(what: str, data: Path | None, repeats: int, workloads: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the benchmark `what` ("loader", "shard" or "train"); data: None measures on synthetic videos.

    workloads: of the loader benchmark; none are its default ones. Raises UserError where another has none.
    """
    # Here and not above: a process that measures one thing should not hold the packages of the others.
    from . import loader, shard, train

    if what == "loader":
        return loader.run(data, repeats, workloads)
    if workloads:
        raise UserError(f"--workload chooses what `genkd bench loader` measures; `genkd bench {what}` has none")
    return {"shard": shard.run, "train": train.run}[what](data, repeats)
