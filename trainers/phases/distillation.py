"""Generative-based feature distillation: the student learns with a teacher's attention and generative model."""

from __future__ import annotations

from torch import Tensor

from ...configs.schema import TrainConfig
from ...pipelines.loader import Batch
from ..frozen import FrozenTeacher
from ..methods import METHODS
from .base import Turn
from .representation import Representation


class Distillation(Representation):
    """Representation's two stages, each with a term that follows the teacher, as far as the method has them."""

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", resumed: bool = False):
        method = METHODS[config.distill.method]
        super().__init__(config, classes, modality, resumed)
        self.teacher = FrozenTeacher(config, self.card, method)
        self.method, self.frozen = method, self.teacher.modules

    def teacher_reconstruction(self, features: Tensor, attention: Tensor, noise: Tensor) -> Tensor | None:
        if not self.method.follows_vae or self.teacher is None:
            return None
        with self.part("teacher"):
            return self.teacher.reconstruct(features, attention, noise)

    def teacher_attention(self, batch: Batch, turn: Turn) -> Tensor | None:
        if self.teacher is None:
            return None
        with self.part("teacher"):
            return self.teacher.outputs(batch, turn.draw).get("attention")
