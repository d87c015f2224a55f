"""One training step: every stage of a phase on one batch, with autocast, gradient scaling and clipping."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..configs.schema import OptimizerConfig, TrainConfig
from ..pipelines import plan
from ..pipelines.loader import Batch
from . import optimizers
from .distributed import Ranks, precision
from .ema import Averages
from .metrics import Meter
from .phases import Noise, Phase, Stage, Turn


class Stepper:
    """The optimizers of a phase and how they are stepped. The phase must be on its device already.

    shared: surrounds what the ranks do together, for who wants to time it.
    """

    def __init__(
        self, config: TrainConfig, phase: Phase, place: Ranks, steps_per_pass: int,
        shared: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):  # fmt: skip
        self.shared = shared
        self.config, self.phase, self.place, self.steps_per_pass = config, phase, place, steps_per_pass
        self.optimizers = {
            name: optimizers.build(self.settings(name), module, place.device) for name, module in phase.modules.items()
        }
        self.dtype = precision(config.precision, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.dtype == torch.float16)
        self.averages = Averages(phase.modules, config.ema) if config.ema else None

    def settings(self, module: str) -> OptimizerConfig:
        """The optimizer's configuration of a module."""
        return self.config.cvae_optimizer if module == "cvae" else self.config.optimizer

    @property
    def results(self) -> dict[str, nn.Module]:
        """The modules to evaluate and save: the trained ones, or their moving averages."""
        return self.phase.modules if self.averages is None else self.averages.modules

    def take(self, batch: Batch, draw: int, step: int, meter: Meter) -> None:
        """All optimizer steps of one batch; draw, the loader's epoch, and step count from 0. The losses go to the
        meter."""
        config, passes = self.config, self.config.passes
        if config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.place.progress("computes", step, 6)
        if self.dtype == torch.float32:
            batch = dataclasses.replace(batch, clips=batch.clips.float())
        own = step - (draw - draw // passes) * self.steps_per_pass  # steps of a module's own, before this one
        only = None if passes == 1 else ("cvae", self.phase.card.network)[draw % passes]
        # Shares differ by a clip at the most; the ranks go the same way, as DDP agrees on things in between.
        share = -(-batch.total // self.place.world_size)
        if not config.micro_batch or share <= config.micro_batch:
            stages = self.phase.stages(batch, self._turn(batch, draw, only))
            while (stage := self._next(stages)) is not None:
                self._begin(stage.module, own)
                self._backward(stage, batch, step)
                self._finish(stage.module, own)
                meter.update(stage.module, stage.terms, batch.count, step)
        else:
            parts = batch.split(config.micro_batch)
            for module in sorted(self.phase.modules, key=lambda name: name != "cvae") if only is None else (only,):
                self._accumulate(module, parts, draw, own, step, meter)
        self.scaler.update()

    def _accumulate(self, module: str, parts: list[Batch], draw: int, own: int, step: int, meter: Meter) -> None:
        """One module's step from the gradients of all parts of a batch, which are reduced with the last one.

        A stage at a time, so that the VAE's step precedes the network's stage and no part's activations are kept: the
        features are computed once more for it. Batch norm sees a part at a time, and moves with the network's stage.
        """
        self._begin(module, own)
        for number, part in enumerate(parts):
            with contextlib.ExitStack() as stack:
                if number < len(parts) - 1:
                    stack.enter_context(self.phase.unsynchronized())
                if module == "cvae" and self.config.passes == 1:
                    stack.enter_context(self.phase.steady_statistics())
                stage = self._next(self.phase.stages(part, self._turn(part, draw, module)))
                assert stage is not None and stage.module == module
                self._backward(stage, part, step)
            meter.update(module, stage.terms, part.count, step)
        self._finish(module, own)

    def _turn(self, batch: Batch, draw: int, only: str | None) -> Turn:
        epoch = draw // self.config.passes + 1
        return Turn(epoch, draw, self._noise(batch, draw), only, self._dropped(batch, draw))

    def _next(self, stages: Iterator[Stage]) -> Stage | None:
        with torch.autocast(self.place.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return next(stages, None)

    def _begin(self, module: str, own: int) -> None:
        optimizer, config = self.optimizers[module], self.config
        rate = optimizers.learning_rate(
            self.settings(module), own, self.steps_per_pass, config.epochs * self.steps_per_pass
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
            for weight in group["params"]:
                weight.grad = None  # by hand, as Apex's zero_grad() takes other arguments than PyTorch's

    def _backward(self, stage: Stage, batch: Batch, step: int) -> None:
        # Every clip of the global batch weighs the same however unevenly its ranks, and their parts, share it.
        weight = batch.count * self.place.world_size / batch.total
        self.place.progress("adds up gradients with the others", step, 7 if stage.module == "cvae" else 8)
        with self.phase.part("cvae" if stage.module == "cvae" else "student"), self.shared():
            self.scaler.scale(stage.terms["total"] * weight).backward()

    def _finish(self, module: str, own: int) -> None:
        optimizer = self.optimizers[module]
        with self.phase.part("optimizer"):
            if self.config.grad_clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.phase.modules[module].parameters(), self.config.grad_clip)
            self.scaler.step(optimizer)
        if self.averages is not None:
            self.averages.update(module, own)

    def _dropped(self, batch: Batch, draw: int) -> Tensor | None:
        """Dropout of each clip's own, so that it is the same however many ranks and parts share a batch."""
        share = self.config.model.dropout
        if self.phase.card.task == "detection" or not share:
            return None
        values = plan.dropout(self.config.seed, draw + 1, batch.ids.tolist(), self.phase.network.pooled_shape, share)
        return torch.from_numpy(values).to(self.place.device, non_blocking=True)

    def _noise(self, batch: Batch, draw: int) -> Noise | None:
        if "cvae" not in self.phase.modules:
            return None
        card, ids = self.phase.card, batch.ids

        def of(shape: tuple[int, int, int, int], number: int) -> Tensor:
            channels, time, _, _ = shape
            values = plan.noise(self.config.seed, draw + 1, ids.tolist(), (time, channels), number)
            return torch.from_numpy(values).to(self.place.device, non_blocking=True)

        def drawn(number: int) -> Tensor | dict[str, Tensor]:
            if card.task != "detection":
                return of(card.feature_shape, number)
            return {name: of(shape, number + 3 * place) for place, (name, shape) in enumerate(card.shapes.items())}

        if batch.windows is not None:  # each window of a video has its own
            ids = ids * 2**20 + batch.windows.offsets
        # One noise for all three says where student and teacher differ; the original draws each anew.
        first = drawn(0)
        return Noise(first, drawn(1), drawn(2)) if self.config.compat == "reference" else Noise(first, first, first)
