"""Side-by-side measurements: contenders take turns in one run, and the result is one JSON value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError


def run_benchmark(
    what: str,
    data: Path | None,
    repeats: int,
    workloads: Sequence[str] = (),
    *,
    tune: bool = False,
    batches: int | None = None,
    preset: str | None = None,
    target: str | None = None,
    assume: Sequence[str] = (),
    plot: Path | None = None,
) -> dict[str, Any]:
    """Runs the benchmark `what`: "loader", "shard", "train", "kernels", "detect" or "scaling"; data: None measures on
    synthetic videos, and for "detect" on a synthetic ground truth.

    workloads: of the loader benchmark, or texts in the names of detection's workloads, of the kernels' cases, of the
    contenders in training or of scaling's cases; none are the default ones. tune: look for the loader's fastest
    settings instead. batches: timed ones of training. preset, target, assume, plot: see scaling.run. Raises UserError
    where another benchmark has none of these.
    """
    # Here and not above: a process that measures one thing should not hold the packages of the others.
    from . import detect, kernels, loader, loader_tune, scaling, shard, train

    if what == "loader" and tune:
        if len(workloads) > 1:
            raise UserError("--tune is for one --workload")
        return loader_tune.run(data, repeats, *workloads)
    if what == "loader":
        return loader.run(data, repeats, workloads)
    if tune or (workloads and what not in ("train", "kernels", "detect", "scaling")):
        raise UserError(f"genkd bench {what} has no --{'tune' if tune else 'workload'}; `genkd bench loader` has")
    if batches and what not in ("train", "scaling"):
        raise UserError(f"--batches is for `genkd bench train` and `scaling`; `genkd bench {what}` has none")
    if what == "scaling":
        return scaling.run(
            data, repeats, preset=preset, target=target, names=workloads, assume=assume, plot=plot, batches=batches
        )
    for name, given in {"preset": preset, "target": target, "assume": assume, "plot": plot}.items():
        if given:
            raise UserError(f"--{name} is for `genkd bench scaling`; `genkd bench {what}` has none")
    if what == "train":
        return train.run(data, repeats, batches=batches, names=workloads)
    if what == "kernels":
        if data is not None:
            raise UserError("genkd bench kernels measures on random tensors; it takes no --data")
        return kernels.run(repeats, names=workloads)
    if what == "detect":
        return detect.run(data, repeats, workloads)
    return shard.run(data, repeats)
