"""What no rate of the loader tells: the cost of opening an index of a million videos, and whether memory grows.

`python -m genkd.benchmarks.loader_footprint index|memory JOB.json` measures in a process that does nothing else.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import write_json
from ..preprocessing.shards import FORMAT_VERSION, SCHEMA, Dataset, digest_of

INDEX, MEMORY = "index", "memory"
VIDEOS, GOPS, CLASSES, VIDEOS_A_SHARD = 1_000_000, 8, 400, 4000
LOOKS = (200, 2000)  # batches after which the memory is looked at


def measure_index(folder: Path, repeats: int, videos: int = VIDEOS) -> list[dict[str, Any]]:
    """Rows: seconds and MB of the first opening of a large index, and of the openings after it."""
    data = folder / f"index of {videos}"
    write_index(data, videos)
    job = {"data": str(data), "split": "train", "rows": 1000}
    first = [_in_process(INDEX, job, folder)]
    later = [_in_process(INDEX, job, folder) for _ in range(max(3, repeats))]
    rows = []
    for name, turns, seconds, megabytes in (("first opening", first, None, None), ("opening", later, 2.0, 300.0)):
        extra = {key: round(float(np.median([turn[key] for turn in turns])), 3) for key in turns[0]}
        extra = {"videos": videos, **{key: value for key, value in extra.items() if key not in ("seconds", "MB")}}
        rows.append(_row(INDEX, f"{name}, seconds", "s", [turn["seconds"] for turn in turns], (None, seconds), extra))
        rows.append(_row(INDEX, f"{name}, MB", "MB", [turn["MB"] for turn in turns], (None, megabytes), {}))
    return rows


def measure_memory(folder: Path, device: str) -> list[dict[str, Any]]:
    """Rows: how the memory of a process grows from the 200th to the 2,000th batch of small clips, host and GPU."""
    from .loader_data import SYNTHETIC, synthetic_set

    dataset = synthetic_set(folder, "trimmed", "h264" if device == "cuda" else "vp9", SYNTHETIC["trimmed"])
    found = _in_process(MEMORY, {"data": str(dataset.path), "split": "train", "device": device, "looks": LOOKS}, folder)
    rows = []
    for place, values in found.items():
        growth = values[-1] / values[0]
        extra = {f"MB after {batches:,} batches": round(value) for batches, value in zip(LOOKS, values, strict=True)}
        # An allocator still moves by a tenth; a clip lost with every batch would add a third.
        rows.append(_row(MEMORY, f"growth of {place} memory", "ratio", [growth], (None, 1.2), extra))
    return rows


def _row(workload: str, name: str, unit: str, values: list[float], bounds: tuple, extra: dict) -> dict[str, Any]:
    low, middle, high = (float(value) for value in np.percentile(values, [10, 50, 90]))
    return {
        "workload": workload, "name": name, "unit": unit, "median": middle, "p10": low, "p90": high, "ratio": 1.0,
        "repeats": len(values), "bounds": bounds, "extra": extra,
    }  # fmt: skip


def write_index(data: Path, videos: int) -> None:
    """A data set's dataset.json and index.parquet without any shard: rows as a conversion writes them."""
    data.mkdir()
    random = np.random.default_rng(0)
    number = np.arange(videos)
    sizes = random.integers(20_000, 40_000, (videos, GOPS))
    offsets = np.concatenate([np.full((videos, 1), 800), 800 + np.cumsum(sizes, 1)], 1)
    frames = np.tile(np.arange(GOPS + 1, dtype=np.int32) * 16, (videos, 1))
    lists = np.arange(0, (videos + 1) * (GOPS + 1), GOPS + 1, dtype=np.int32)
    shards = pa.array([f"train-{shard:05d}.tar" for shard in range(-(-videos // VIDEOS_A_SHARD))])
    labels = np.sort(random.integers(0, CLASSES, videos)).astype(np.int32)
    keys = [f"class_{label:03d}/video_{row:07d}" for row, label in enumerate(labels.tolist())]
    columns = {
        "key": pa.array(keys),
        "split": _same("train", videos, pa.string()),
        "label": pa.array(labels),
        "annotations": pa.repeat(pa.scalar([], SCHEMA.field("annotations").type), videos),
        "shard": shards.take(pa.array(number // VIDEOS_A_SHARD)),
        "offset": pa.array(number % VIDEOS_A_SHARD * 400_000 + 512),
        "size": pa.array(offsets[:, -1]),
        "header_size": _same(800, videos, pa.int64()),
        "gop_offsets": pa.ListArray.from_arrays(pa.array(lists), pa.array(offsets.ravel())),
        "gop_frames": pa.ListArray.from_arrays(pa.array(lists), pa.array(frames.ravel())),
        # Of the header, and then of each GOP.
        "gop_crc32c": pa.ListArray.from_arrays(
            pa.array(lists), pa.array(random.integers(0, 2**32, videos * (GOPS + 1), np.uint32))
        ),
        "num_frames": _same(16 * GOPS, videos, pa.int32()),
        "fps": _same(25.0, videos, pa.float64()),
        "width": _same(342, videos, pa.int32()),
        "height": _same(256, videos, pa.int32()),
        "codec": _same("h264", videos, pa.string()),
        "crc32c": pa.array(random.integers(0, 2**32, videos, np.uint32)),
        "source": pa.array([f"{key}.mp4" for key in keys]),
        "source_fps": _same(25.0, videos, pa.float64()),
        "source_frames": _same(16 * GOPS, videos, pa.int32()),
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), data / "index.parquet", compression="zstd")
    counts = {"videos": videos, "frames": 16 * GOPS * videos, "seconds": 16 * GOPS * videos / 25, "bytes": 0}
    info = {
        "name": "index", "format_version": FORMAT_VERSION, "classes": [f"class_{n:03d}" for n in range(CLASSES)],
        "video": {"codec": "h264"}, "splits": {"train": counts}, "rejected": 0,
        "index_digest": digest_of((data / "index.parquet").read_bytes()),
    }  # fmt: skip
    write_json(data / "dataset.json", info)


def _same(value: Any, count: int, kind: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), count)


def _in_process(what: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "genkd.benchmarks.loader_footprint", what, str(path)], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the measurement of {what} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def open_index(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of opening a data set, listing a split, reading all labels and some rows; MB that this adds.

    MB: peak resident memory above that of the process before, mapped pages of the index included; "own MB": what was
    written to of it, which processes that read the same index cannot share.
    """
    before, own = _status("VmRSS"), _smaps("Private_Dirty:")
    times = [time.perf_counter()]
    dataset = Dataset.open(job["data"])
    times.append(time.perf_counter())
    rows = dataset.rows(job["split"])
    times.append(time.perf_counter())
    labels = dataset.labels[rows]
    times.append(time.perf_counter())
    wanted = np.random.default_rng(1).choice(rows, job["rows"])
    found = [dataset.video(int(row)) for row in wanted]
    times.append(time.perf_counter())
    assert len(labels) == len(rows) and len(found) == len(wanted)
    steps = dict(zip(("open s", "rows s", "labels s", f"{job['rows']} videos s"), np.diff(times).tolist(), strict=True))
    peak = _status("VmHWM")
    return {
        "seconds": times[-1] - times[0], "MB": peak - before, **steps, "process MB": peak,
        "own MB": _smaps("Private_Dirty:") - own,
    }  # fmt: skip


def feed(job: dict[str, Any]) -> dict[str, list[float]]:
    """MB of the process (PSS), and of the GPU, after so many batches of one training run."""
    from ..configs.schema import DataConfig
    from ..pipelines.loader import Loader

    config = DataConfig(clip_length=4, stride=1, size=32)
    found: dict[str, list[float]] = {"host": []}
    number = 0
    with Loader(
        Dataset.open(job["data"]), job["split"], config, batch_size=2, training=True, device=job["device"]
    ) as loader:
        while number < job["looks"][-1]:
            for _ in loader:
                number += 1
                if number in job["looks"]:
                    found["host"].append(_smaps("Pss:"))
                    if job["device"] == "cuda":
                        found.setdefault("GPU", []).append(_gpu_mb())
    return found


def _gpu_mb() -> float:
    """All of the device's memory in use: DALI's is not in PyTorch's count."""
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


def _status(name: str) -> float:
    """MB of a line of /proc/self/status."""
    return _kilobytes("/proc/self/status", f"{name}:") * 1024 / 1e6


def _smaps(name: str) -> float:
    """MB of a line of /proc/self/smaps_rollup."""
    return _kilobytes("/proc/self/smaps_rollup", name) * 1024 / 1e6


def _kilobytes(path: str, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    raise UserError(f"{path} does not tell {name}; memory is measured on Linux only")


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    print(json.dumps({INDEX: open_index, MEMORY: feed}[sys.argv[1]](given)))
