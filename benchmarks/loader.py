"""Clips a second: genkd's Loader beside what people feed videos to PyTorch with today.

Every contender delivers the same clips (source frames, crop, flip, size, normalization) of the same encoded bytes as
float32 (N,3,T,H,W), as a process of its own, with the same timing inside it: see loader_contenders.py. A group of rows
is a workload and a codec. A row's `extra`: seconds from the loader's construction to its first batch, processor
milliseconds a clip over all its processes (the fair comparison on a busy machine), and the peak memory of all of them
(sum of PSS, see process.py). Files are read from the page cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..preprocessing.shards import Dataset
from . import loader_contenders, peers
from .common import compare, machine, versions
from .loader_contenders import Job
from .loader_data import (
    LONG,
    SHORT,
    SYNTHETIC,
    WORKLOADS,
    Workload,
    draw_job,
    given_codec,
    synthetic_set,
    write_archive_indexes,
    write_files,
    write_jpegs,
)  # fmt: skip
from .loader_footprint import INDEX, MEMORY, measure_index, measure_memory
from .peers import Entry
from .process import Usage, run_measured

GENKD, GENKD_PYAV, GENKD_DALI = "genkd (auto)", "genkd (pyav)", "genkd (dali)"
ON_SHORT = ", 30-second videos"  # what such a row is called beside that of the long videos
# Image files and numpy, as the original implementation; beside it, the same files with what the other peers do.
JPEG = "DataLoader + JPEG frames, numpy"
_PEERS = {
    "DataLoader + PyAV": "pyav",
    "DataLoader + decord": "decord",
    "DataLoader + torchcodec": "torchcodec-opencv",
    "DataLoader + torchcodec, its transforms": "torchcodec",
    "DataLoader + JPEG frames": "jpeg",
    JPEG: "jpeg-numpy",
    "DALI readers.webdataset + decoders.video": "dali-webdataset",
    "DALI experimental.readers.video": "dali-reader",
}
# What DALI 2.4 documents for its decoder on a CPU; on a GPU it takes every codec that genkd writes.
_DALI_ON_CPU = ("vp8", "vp9", "mjpeg")
MEASURED = 12  # batches, or two a worker where there are more workers
DEFAULT = ("16x224", "64x224", LONG, INDEX)
CHOICES = (*DEFAULT, MEMORY)


@dataclass(frozen=True)
class Turn:
    """What one contender took once, as a whole and by its own clock (see loader_contenders.deliver)."""

    usage: Usage
    told: dict[str, Any]


def run(data: Path | None, repeats: int, workloads: Sequence[str] = ()) -> dict[str, Any]:
    """Measures the workloads named (see CHOICES; none: DEFAULT), those of trimmed clips on the data set `data`.

    Without data, and for the other workloads, synthetic videos are made first. Raises UserError for an unknown name.
    """
    chosen = workloads or DEFAULT
    for name in chosen:
        if name not in CHOICES:
            raise UserError(f"unknown workload {name!r}; there are {', '.join(CHOICES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about: dict[str, Any] = {
        "device": device, "load_before": round(os.getloadavg()[0], 2), "workloads": {}, "skipped": {}, "packages": {},
    }  # fmt: skip
    result: dict[str, Any] = {
        "benchmark": "loader", "unit": "clips/s", "about": about, "machine": machine(), "versions": versions(),
        "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        for name in chosen:
            if name == INDEX:
                result["rows"] += measure_index(Path(folder), repeats)
            elif name == MEMORY:
                result["rows"] += measure_memory(Path(folder), device)
            else:
                for codec, dataset, short in _data_sets(name, data, device, Path(folder)):
                    result["rows"] += _measure(name, codec, (dataset, short), device, repeats, about)
    result["targets"] = targets(result["rows"])
    return result


def _data_sets(
    name: str, data: Path | None, device: str, folder: Path
) -> Iterator[tuple[str, Dataset, Dataset | None]]:
    """A workload's codecs, each with its data set and, for long videos, that of the short ones they are made of."""
    workload = WORKLOADS[name]
    if data is not None and workload.source == "trimmed":
        dataset = Dataset.open(data)
        yield given_codec(dataset), dataset, None
        return
    # On a CPU, DALI decodes VP9 but no H.264: a fair comparison needs both.
    for codec in ("h264",) if device == "cuda" else ("h264", "vp9"):
        dataset = synthetic_set(folder, workload.source, codec, SYNTHETIC[workload.source])
        short = synthetic_set(folder, SHORT, codec, SYNTHETIC[SHORT]) if name == LONG else None
        yield codec, dataset, short


def _measure(
    name: str, codec: str, data: tuple[Dataset, Dataset | None], device: str, repeats: int, about: dict
) -> list[dict[str, Any]]:
    """The rows of a workload and a codec. data: as _data_sets gives them."""
    workload, group = WORKLOADS[name], f"{name} {codec}"
    dataset, short = data
    cores = len(os.sched_getaffinity(0))
    batches = max(2, cores), max(MEASURED, 2 * cores), 2 * cores
    job = draw_job(dataset, workload, batches, device)
    turns: dict[str, list[Turn]] = {}

    def measured(label: str, entry: Entry) -> Callable[[], tuple[float, dict]]:
        def measure() -> tuple[float, dict]:
            turn = take_turn(*entry)
            turns.setdefault(label, []).append(turn)
            return turn.told["rate"], {}

        return measure

    with prepared(dataset, job) as ready:
        entries = {**_peer_entries(name, codec, ready, about), **_genkd_entries(codec, ready)}
        if short:  # in turns with the long ones, as only their ratio matters
            others = _genkd_entries(codec, draw_job(short, workload, batches, device))
            entries.update({label + ON_SHORT: entry for label, entry in others.items()})
        about["workloads"][group] = _about(workload, dataset, job)
        contenders = {label: measured(label, entry) for label, entry in entries.items()}
        rows = compare(group, "clips/s", contenders, repeats, {})["rows"]
    for row in rows:
        row.update(workload=group, extra=_extra(turns[row["name"]]))
    return rows


def _about(workload: Workload, dataset: Dataset, job: Job) -> dict[str, Any]:
    config = workload.config
    return {
        "clip_length": config.clip_length, "stride": config.stride, "size": config.size, "batch_size": workload.batch,
        "data": dataset.info["name"], "videos": len(dataset.rows(job.split)), "clips": len(job.clips),
        "warm_up_batches": job.warm, "measured_batches": job.measured, "workers": job.workers,
    }  # fmt: skip


@contextlib.contextmanager
def prepared(dataset: Dataset, job: Job) -> Iterator[Job]:
    """The job with the files that peers read, made in a temporary folder before anything is measured."""
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as name:
        folder = Path(name)
        write_files(dataset, job, folder / "files")
        write_jpegs(job, folder / "files", folder / "frames")
        archives, order = write_archive_indexes(dataset, job, folder / "indexes")
        yield replace(
            job, files=str(folder / "files"), frames=str(folder / "frames"), archives=archives, archived=order
        )


def _genkd_entries(codec: str, job: Job) -> dict[str, Entry]:
    by_pyav = Entry("genkd", replace(job, config={**job.config, "decoder": "pyav"}))
    entries = {GENKD: Entry("genkd", job)}
    if job.device == "cuda" or codec in _DALI_ON_CPU:
        entries[GENKD_PYAV] = by_pyav
    if job.device == "cuda":  # where auto depends on the frames' size
        entries[GENKD_DALI] = Entry("genkd", replace(job, config={**job.config, "decoder": "dali"}))
    return entries


def _peer_entries(name: str, codec: str, job: Job, about: dict) -> dict[str, Entry]:
    """The peers of a workload; about gets why some are left out, and what packages the others have."""
    entries = {}
    for label, contender in _PEERS.items():
        reason = _unfit(contender, codec, job)
        found = reason or find_peer(contender)
        if isinstance(found, str):
            about["skipped"][f"{label}, {name} {codec}" if reason else label] = found
            continue
        python, packages = found
        about["packages"].update({f"{label}: {package}": version for package, version in packages.items()})
        entries[label] = Entry(contender, job, python)
    return entries


def _unfit(contender: str, codec: str, job: Job) -> str:
    """Why a peer cannot do a job, or nothing."""
    if not contender.startswith("dali"):
        return ""
    if job.device != "cuda" and codec not in _DALI_ON_CPU:
        return f"on a CPU, DALI decodes {', '.join(_DALI_ON_CPU)} only"
    if contender == "dali-reader" and any(clip.frames != sorted(clip.frames) for clip in job.clips):
        return "it cannot play a video in a loop, and some are shorter than the clip"
    return ""


def find_peer(contender: str) -> tuple[str, dict[str, str]] | str:
    """The interpreter that has a peer's packages, and their versions; or why no interpreter has them."""
    return peers.find_peer(loader_contenders.__file__, contender, os.environ)


def take_turn(contender: str, job: Job, python: str = sys.executable) -> Turn:
    """Runs one contender once. Raises UserError with its last words when it fails."""
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        path, result = Path(folder, "job.json"), Path(folder, "result.json")
        path.write_text(json.dumps(asdict(replace(job, result=str(result)))), encoding="utf-8")
        command = [python, loader_contenders.__file__, contender, str(path)]
        usage = run_measured(command, os.environ, Path(folder, "output.log"))
        return Turn(usage, json.loads(result.read_text(encoding="utf-8")))


def _extra(turns: list[Turn]) -> dict[str, Any]:
    peaks = [turn.usage.peak_mb for turn in turns if turn.usage.peak_mb is not None]
    first, cpu = (float(np.median([turn.told[name] for turn in turns])) for name in ("first_batch_s", "cpu_s_per_clip"))
    extra = {
        "first batch s": round(first, 2), "CPU ms/clip": round(1000 * cpu, 1),
        "peak MB": round(max(peaks)) if peaks else None,
    }  # fmt: skip
    if "gpu_mb" in turns[-1].told:
        extra["GPU MB"] = round(turns[-1].told["gpu_mb"])
    return extra


def targets(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What genkd is held to, from the rows' medians; what cannot be told without a missing row is left out."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["workload"], {})[row["name"]] = row
    found = []
    for group, named in groups.items():
        if group in (INDEX, MEMORY):
            found += [
                _target(f"{group}: {name}", row["median"], *row["bounds"])
                for name, row in named.items()
                if any(row["bounds"])
            ]
        else:
            found += _against_peers(group, named)
    return found


def _against_peers(group: str, named: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """genkd's best row against the best peer, the frames loader and itself on short videos, and its first batch."""
    ours = [name for name in named if name.startswith("genkd") and not name.endswith(ON_SHORT)]
    others = [name for name in named if not name.startswith("genkd")]
    if not ours:
        return []
    best = max(ours, key=lambda name: named[name]["median"])
    found = [_target(f"{group}: seconds to the first batch", named[best]["extra"]["first batch s"], None, 3.0)]
    if others:
        rival = max(others, key=lambda name: named[name]["median"])
        ratio = named[best]["median"] / named[rival]["median"]
        found.append(_target(f"{group}: clips/s against the best peer, {rival}", ratio, 1.2, None))
        cheapest = min(others, key=lambda name: named[name]["extra"]["CPU ms/clip"])
        cost = min(named[name]["extra"]["CPU ms/clip"] for name in ours)
        ratio = named[cheapest]["extra"]["CPU ms/clip"] / cost
        found.append(_target(f"{group}: for comparison, clips a CPU second against {cheapest}", ratio, None, None))
    if JPEG in named:
        ratio = named[best]["median"] / named[JPEG]["median"]
        found.append(_target(f"{group}: clips/s against {JPEG}", ratio, 5.0, None))
    if best + ON_SHORT in named:
        ratio = named[best]["median"] / named[best + ON_SHORT]["median"]
        found.append(_target(f"{group}: clips/s against 30-second videos", ratio, 0.8, 1.25))
    return found


def _target(name: str, measured: float, least: float | None, most: float | None) -> dict[str, Any]:
    met = None if least is most is None else measured >= (least or 0.0) and measured <= (most or float("inf"))
    return {"name": name, "measured": round(measured, 3), "at_least": least, "at_most": most, "met": met}
