"""Clips a second of one training step of each phase, on clips that are already on the device."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..configs.load import load
from ..configs.schema import TrainConfig
from ..models.checkpoints import save_weights
from ..pipelines.loader import Batch
from ..trainers import phases
from ..trainers.distributed import Ranks, choose_device
from ..trainers.metrics import Meter
from ..trainers.step import Stepper
from .common import compare

CLASSES = tuple(f"class {number}" for number in range(101))


def run(data: Path | None, repeats: int) -> dict[str, Any]:
    """Measures the `small` preset on a CPU and the `ucf101` preset on a GPU; `data` is not used."""
    device = choose_device("auto")
    preset, steps = ("ucf101", 10) if device.type == "cuda" else ("small", 2)
    place = Ranks(0, 1, device)
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        teacher = phases.build(load(preset, "representation"), CLASSES)
        save_weights(Path(folder), teacher.card, teacher.modules)
        kinds = {
            "teacher": load(preset, "teacher"),
            "representation": load(preset, "representation"),
            "student alone": load(preset, "distill", ["method=none"]),
            "student, distilled": load(preset, "distill", [f"teacher={folder}"]),
        }
        contenders = {name: _Steps(config, place, steps) for name, config in kinds.items()}
    config = kinds["teacher"]
    about = {
        "preset": preset, "clip_length": config.data.clip_length, "size": config.data.size, "width": config.model.width,
        "batch_size": config.batch_size, "device": device.type,
    }  # fmt: skip
    return compare("train", "clips/s", contenders, repeats, about)


class _Steps:
    """A phase and a batch on the device; a call takes a few training steps."""

    def __init__(self, config: TrainConfig, place: Ranks, steps: int):
        self.phase = phases.build(config, CLASSES)
        self.phase.place(place)
        self.phase.train()
        self.stepper = Stepper(config, self.phase, place, steps)
        self.meter, self.steps, self.device = Meter(place), steps, place.device
        n, data = config.batch_size, config.data
        clips = torch.randn(n, 3, data.clip_length, data.size, data.size, device=place.device)
        clips = clips.to(memory_format=torch.channels_last_3d)
        labels = torch.randint(len(CLASSES), (n,), device=place.device)
        self.batch = Batch(clips, labels, torch.arange(n), n, n)
        self.stepper.take(self.batch, 0, 0, self.meter)

    def __call__(self) -> tuple[float, dict]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for step in range(self.steps):
            self.stepper.take(self.batch, 0, step, self.meter)
        self.meter.take()  # waits for the device
        rate = self.steps * self.batch.count / (time.perf_counter() - started)
        return rate, {"peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if on_gpu else {}
