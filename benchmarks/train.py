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
from ..trainers import optimizers, phases
from ..trainers.distributed import Ranks, choose_device, precision
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
        contenders = {name: _Step(config, place, steps) for name, config in kinds.items()}
    config = kinds["teacher"]
    about = {
        "preset": preset, "clip_length": config.data.clip_length, "size": config.data.size, "width": config.model.width,
        "batch_size": config.batch_size, "device": device.type,
    }  # fmt: skip
    return compare("train", "clips/s", contenders, repeats, about)


class _Step:
    """A phase with its optimizers, called for a few steps at a time."""

    def __init__(self, config: TrainConfig, place: Ranks, steps: int):
        self.phase = phases.build(config, CLASSES)
        self.phase.place(place)
        self.phase.train()
        self.optimizers = {
            name: optimizers.build(config.cvae_optimizer if name == "cvae" else config.optimizer, module, place.device)
            for name, module in self.phase.modules.items()
        }
        self.dtype = precision(config.precision, place.device)
        self.steps, self.device = steps, place.device
        n, data = config.batch_size, config.data
        clips = torch.randn(n, 3, data.clip_length, data.size, data.size, device=place.device)
        clips = clips.to(memory_format=torch.channels_last_3d)
        labels = torch.randint(len(CLASSES), (n,), device=place.device)
        self.batch = Batch(clips, labels, torch.arange(n), n, n)
        channels, time_steps, _, _ = self.phase.card.feature_shape
        self.noise = torch.randn(n, time_steps, channels, device=place.device)
        self._take(1)

    def __call__(self) -> tuple[float, dict]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self._take(self.steps)
        elapsed = time.perf_counter() - started
        notes = {}
        if self.device.type == "cuda":
            notes["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return self.steps * self.batch.count / elapsed, notes

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            stages = self.phase.stages(self.batch, 1, self.noise)
            while True:
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    stage = next(stages, None)
                if stage is None:
                    break
                self.optimizers[stage.module].zero_grad(set_to_none=True)
                stage.terms["total"].backward()
                self.optimizers[stage.module].step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
