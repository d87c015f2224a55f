"""The phases of training: each says which modules it trains and what their losses are; the loop does the rest."""

from __future__ import annotations

from ...configs.schema import TrainConfig
from .base import Phase, Stage
from .distillation import Distillation, PlainStudent
from .representation import Representation
from .teacher import Teacher

__all__ = ["Phase", "Stage", "build"]


def build(config: TrainConfig, classes: tuple[str, ...]) -> Phase:
    """The phase that a configuration asks for, its modules built and initialized, on the CPU."""
    if config.phase == "teacher":
        return Teacher(config, classes)
    if config.phase == "representation":
        return Representation(config, classes)
    return PlainStudent(config, classes) if config.method == "none" else Distillation(config, classes)
