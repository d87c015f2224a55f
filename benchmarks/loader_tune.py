"""Which loader settings are fastest on this machine for a data set and a clip: one knob after the other."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.schema import DataConfig
from ..errors import UserError
from ..pipelines.graph import choose_decoder
from ..pipelines.loader import Loader
from ..pipelines.streams import kinds
from ..preprocessing.shards import Dataset
from .common import machine, versions
from .loader_data import SPLIT, SYNTHETIC, WORKLOADS, synthetic_set

WARM, MEASURED = 3, 12  # batches
SECONDS = 2.0  # that are measured at least
GAIN = 1.03  # below that another setting is noise, and the simpler one stays
Settings = Mapping[str, Any]
Rate = Callable[[Settings], float]


def run(data: Path | None, repeats: int, workload: str = "16x224") -> dict[str, Any]:
    """Measures a workload's clips from `data`, or from synthetic videos, under more and more of the best settings.

    The result has a row for every setting that was tried, and `best`: data.* overrides for `genkd train`.
    Raises UserError for a workload without a data set of its own or with too few videos.
    """
    if workload not in WORKLOADS or WORKLOADS[workload].source != "trimmed":
        names = [name for name, entry in WORKLOADS.items() if entry.source == "trimmed"]
        raise UserError(f"--tune is for one workload of {', '.join(names)}, not {workload!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, batch = WORKLOADS[workload].config, WORKLOADS[workload].batch
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        dataset = Dataset.open(data) if data else synthetic_set(Path(folder), "trimmed", "h264", SYNTHETIC["trimmed"])

        def rate(settings: Settings) -> float:
            return measure(dataset, config.model_copy(update=dict(settings)), batch, device)

        best, rows = search(knobs(dataset, device, len(os.sched_getaffinity(0))), rate, repeats)
        about = {"device": device, "workload": workload, "data": dataset.info["name"], "batch_size": batch}
    return {
        "benchmark": "loader tuning", "unit": "clips/s", "about": about, "machine": machine(), "versions": versions(),
        "rows": rows, "best": {f"data.{name}": value for name, value in best.items()},
    }  # fmt: skip


def knobs(dataset: Dataset, device: str, cores: int) -> list[list[Settings]]:
    """Groups of settings; of each group one is chosen, the first unless another is clearly faster."""
    videos = kinds(dataset, dataset.rows(SPLIT))
    decoders: list[Settings] = [{"decoder": choose_decoder("auto", videos, device)}]
    try:
        choose_decoder("dali", videos, device)
    except UserError:
        pass
    else:
        decoders = [*decoders, *({"decoder": name} for name in ("pyav", "dali") if name != decoders[0]["decoder"])]
        decoders += [{"decoder": "hybrid", "hybrid_share": share} for share in (0.1, 0.25, 0.5, 0.75)]
    threads = sorted({max(1, cores // 2), cores, 2 * cores} - {min(8, cores)})
    groups: list[list[Settings]] = [
        decoders,
        [{"decoder_threads": 0}, *({"decoder_threads": number} for number in threads)],
        [{"prefetch": number} for number in (2, 1, 4)],
    ]
    if device == "cuda":
        groups.insert(1, [{"pipelines_per_gpu": number} for number in (1, 2, 3)])
    return groups


def search(groups: list[list[Settings]], rate: Rate, repeats: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Goes through the groups and keeps of each what is fastest together with what was kept so far.

    The settings of a group take turns `repeats` times, and medians are compared. Returns the best and all rows.
    """
    best: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    base = 0.0
    for group in groups:
        rates: list[list[float]] = [[] for _ in group]
        for _ in range(repeats):
            for number, settings in enumerate(group):
                rates[number].append(rate({**best, **settings}))
        medians = [float(np.median(values)) for values in rates]
        base = base or medians[0]
        fastest = int(np.argmax(medians))
        chosen = fastest if medians[fastest] > GAIN * medians[0] else 0
        for number, (settings, values) in enumerate(zip(group, rates, strict=True)):
            low, middle, high = (float(value) for value in np.percentile(values, [10, 50, 90]))
            name = ", ".join(f"{key}={value}" for key, value in {**best, **settings}.items())
            rows.append(
                {"name": name, "median": middle, "p10": low, "p90": high, "ratio": middle / base, "repeats": repeats,
                 "extra": {"kept": True} if number == chosen else {}}
            )  # fmt: skip
        best.update(group[chosen])
    return best, rows


def measure(dataset: Dataset, config: DataConfig, batch: int, device: str) -> float:
    """Clips a second after the first batches, across epochs where a data set is small."""
    with Loader(dataset, SPLIT, config, batch_size=batch, training=True, device=device) as loader:
        number, count, started = 0, 0, 0.0
        while True:
            for part in loader:
                number += 1
                if number > WARM:
                    count += part.count
                if number == WARM or number >= WARM + MEASURED:
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds = time.perf_counter() - started
                    if number == WARM:
                        started = time.perf_counter()
                    elif seconds >= SECONDS:
                        return count / seconds
