"""One training step: every stage of a phase on one batch, with autocast, gradient scaling and clipping."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..configs.schema import OptimizerConfig, TrainConfig
from ..pipelines import plan
from ..pipelines.loader import Batch
from . import optimizers
from .distributed import Ranks, precision
from .metrics import Meter
from .phases import Phase


class Stepper:
    """The optimizers of a phase and how they are stepped. The phase must be on its device already."""

    def __init__(self, config: TrainConfig, phase: Phase, place: Ranks, steps_per_epoch: int):
        self.config, self.phase, self.place, self.steps_per_epoch = config, phase, place, steps_per_epoch
        self.optimizers = {
            name: optimizers.build(self.settings(name), module, place.device) for name, module in phase.modules.items()
        }
        self.dtype = precision(config.precision, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.dtype == torch.float16)

    def settings(self, module: str) -> OptimizerConfig:
        """The optimizer's configuration of a module."""
        return self.config.cvae_optimizer if module == "cvae" else self.config.optimizer

    def take(self, batch: Batch, epoch: int, step: int, meter: Meter) -> None:
        """All optimizer steps of one batch; epoch counts from 1, step from 0. The losses go to the meter."""
        config, device = self.config, self.place.device
        torch.manual_seed(_mix(config.seed, step, self.place.rank))  # dropout's; makes resuming exact
        # Every clip of the global batch weighs the same however unevenly its ranks share it.
        weight = batch.count * self.place.world_size / batch.total
        if self.dtype == torch.float32:
            batch = dataclasses.replace(batch, clips=batch.clips.float())
        stages = self.phase.stages(batch, epoch, self._noise(batch, epoch))
        while True:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                stage = next(stages, None)
            if stage is None:
                break
            optimizer = self.optimizers[stage.module]
            rate = optimizers.learning_rate(
                self.settings(stage.module), step, self.steps_per_epoch, config.epochs * self.steps_per_epoch
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(stage.terms["total"] * weight).backward()
            if config.grad_clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.phase.modules[stage.module].parameters(), config.grad_clip)
            self.scaler.step(optimizer)
            meter.update(stage.module, stage.terms, batch.count)
        self.scaler.update()

    def _noise(self, batch: Batch, epoch: int) -> Tensor | None:
        if "cvae" not in self.phase.modules:
            return None
        channels, time, _, _ = self.phase.card.feature_shape
        drawn = plan.noise(self.config.seed, epoch, batch.ids.tolist(), (time, channels))
        return torch.from_numpy(drawn).to(self.place.device, non_blocking=True)


def _mix(*values: int) -> int:
    """One 63-bit seed out of several numbers (FNV-1a)."""
    state = 0xCBF29CE484222325
    for value in values:
        state = ((state ^ value) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return state
