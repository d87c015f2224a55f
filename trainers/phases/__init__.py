"""The phases of training: each says which modules it trains and what their losses are; the loop does the rest."""

from __future__ import annotations

from ...configs.schema import TrainConfig
from ..methods import METHODS
from .base import Noise, Phase, Stage, Turn
from .distillation import Distillation
from .representation import Representation
from .student import Student
from .teacher import Teacher

__all__ = ["Noise", "Phase", "Stage", "Turn", "build"]


def build(config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb") -> Phase:
    """The phase that a configuration asks for, its modules built and initialized, on the CPU. modality: of the data."""
    if config.phase == "teacher":
        return Teacher(config, classes, modality)
    if config.phase == "representation":
        return Representation(config, classes, modality)
    vae = METHODS[config.distill.method].vae
    return Distillation(config, classes, modality) if vae else Student(config, classes, modality)
