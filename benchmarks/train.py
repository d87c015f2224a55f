"""Clips a second of distillation, and of the other phases, beside the original implementation's schedule.

Every contender is a process of its own that trains on the same synthetic videos through genkd's loader: a clip counts
once for all that an epoch does with it. See train_contender.py for what happens inside, and for the columns of `extra`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..configs.load import load
from ..errors import UserError
from ..models.checkpoints import save_weights
from ..pipelines.streams import is_flow
from ..preprocessing import sources
from ..preprocessing.convert import convert
from ..preprocessing.shards import Dataset
from ..preprocessing.synthetic import SynthSettings, synthesize
from ..preprocessing.video import VideoSettings
from ..trainers import phases
from .common import compare, named
from .process import run_measured

REFERENCE, GENKD = "original schedule, distilled", "genkd, distilled"
# Contenders besides the original's schedule: phase and overrides.
OURS: dict[str, tuple[str, list[str]]] = {
    GENKD: ("distill", []),
    "genkd, distilled, stages by epoch": ("distill", ["alternate=epoch"]),
    "genkd, distilled, teacher's outputs cached": ("distill", ["data.fixed_views=1"]),
    "genkd, student alone": ("distill", ["method=none"]),
    "genkd, representation": ("representation", []),
    "genkd, teacher": ("teacher", []),
}
ON_GPU: dict[str, tuple[str, list[str]]] = {
    "genkd, distilled, fp32": ("distill", ["precision=fp32"]),
    "genkd, distilled, compiled": ("distill", ["compile=default"]),
    "genkd, distilled, compiled, CUDA graphs": ("distill", ["compile=default", "cuda_graphs=true"]),
}


def run(
    data: Path | None,
    repeats: int,
    *,
    preset: str | None = None,
    batches: int | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures the `small` preset (16 x 112) on a CPU, `ucf101-modern` (64 x 224) on a GPU.

    data: a shard data set; None for synthetic videos. batches: timed ones of each measurement. names: texts in the
    names of the contenders beside the original's schedule; none for all of them. Raises UserError for a text in none.
    """
    on_gpu = torch.cuda.is_available()
    preset = preset or ("ucf101-modern" if on_gpu else "small")
    batches = batches or (20 if on_gpu else 4)
    chosen = named(list({**OURS, **ON_GPU} if on_gpu else OURS), names, "contender")
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        root = Path(folder)
        config = load(preset, "distill", ["method=none"])
        place = data or _synthetic(root, config.batch_size * (batches + 1), config.data.size)
        dataset = Dataset.open(place)
        videos = len(dataset.rows(config.data.train_split))
        if videos < batches * config.batch_size:
            raise UserError(
                f"{place} has {videos} videos in {config.data.train_split!r}; {batches} batches of {config.batch_size} "
                "are timed, so use a larger data set"
            )
        modality = "flow" if is_flow(dataset) else "rgb"
        teacher = phases.build(load(preset, "representation"), tuple(dataset.classes), modality)
        save_weights(root / "teacher", teacher.card, teacher.modules)
        about = {
            "preset": preset, "clip_length": config.data.clip_length, "size": config.data.size,
            "width": config.model.width, "batch_size": config.batch_size, "batches": batches,
            "device": "cuda" if on_gpu else "cpu", "data": str(data) if data else "synthetic",
        }  # fmt: skip
        contenders: dict[str, Callable[[], tuple[float, dict]]] = {
            name: partial(_measure, root, place, preset, batches, name) for name in (REFERENCE, *chosen)
        }
        result = compare("train", "clips/s", contenders, repeats, about)
    goal = 4.0 if on_gpu else 1.5
    result["targets"] = [
        {"name": "distillation beside the original's schedule, by epoch", "measured": row["ratio"], "at_least": goal,
         "at_most": None, "met": row["ratio"] >= goal}
        for row in result["rows"] if row["name"] == GENKD
    ]  # fmt: skip
    return result


def _synthetic(root: Path, count: int, size: int) -> Path:
    """Enough videos for an epoch, a little larger than the clips."""
    side = (size * 8 // 7 + 15) // 16 * 16
    each = max(-(-count * 2 // 10), 8)  # ten classes, half of them in the training split
    settings = SynthSettings(videos_per_class=each, width=side * 4 // 3 // 2 * 2, height=side, test_share=0.25)
    synthesize(root / "videos", settings, workers=len(os.sched_getaffinity(0)))
    convert(sources.ucf101(root / "videos"), root / "data", VideoSettings("h264", short_side=side), workers=2)
    return root / "data"


def _measure(root: Path, data: Path, preset: str, batches: int, name: str) -> tuple[float, dict]:
    job = {"name": name, "preset": preset, "data": str(data), "teacher": str(root / "teacher"), "batches": batches,
           "cache": str(root / "cache")}  # fmt: skip
    (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "genkd.benchmarks.train_contender", str(root / "job.json"), str(root / "out.json")]
    usage = run_measured(command, os.environ, root / "log.txt")
    found = json.loads((root / "out.json").read_text(encoding="utf-8"))
    rate = found.pop("clips_per_s")
    return rate, {**found, "peak_mb": usage.peak_mb}
