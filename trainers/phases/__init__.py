"""The phases of training: each says which modules it trains and what their losses are; the loop does the rest."""

from __future__ import annotations

from ...configs.schema import TrainConfig
from ..methods import METHODS
from .base import Noise, Phase, Stage, Turn
from .detection import Detection
from .distillation import Distillation
from .representation import Representation
from .student import Student
from .teacher import Teacher

__all__ = ["Noise", "Phase", "Stage", "Turn", "build"]


def build(config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", *, resumed: bool = False) -> Phase:
    """The phase that a configuration asks for, its modules built and initialized, on the CPU.

    modality: of the data; resumed: its weights will come from a checkpoint, so those of init= are not looked for.
    """
    kind: type[Phase]
    if config.detects:
        return Detection(config, classes, modality, resumed)
    if config.phase == "distill":
        kind = Distillation if METHODS[config.distill.method].vae else Student
    else:
        kind = Teacher if config.phase == "teacher" else Representation
    return kind(config, classes, modality, resumed)
