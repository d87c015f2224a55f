"""Generative-based feature distillation: the student learns with a teacher's attention and generative model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...configs.schema import TrainConfig
from ...errors import UserError
from ...models import checkpoints
from ...pipelines.loader import Batch
from .base import same_preprocessing
from .representation import Representation
from .teacher import Teacher


class Distillation(Representation):
    """Representation's two stages, each with a term that follows the teacher. The teacher is frozen, in eval mode."""

    def __init__(self, config: TrainConfig, classes: tuple[str, ...]):
        if not config.teacher:
            raise UserError("the distill phase needs teacher=RUN, the folder of a finished representation run")
        teacher, card = checkpoints.load_recognizer(config.teacher)
        super().__init__(config, classes)
        self._check(card)
        self.frozen = {"teacher": teacher, "teacher_cvae": checkpoints.load_cvae(config.teacher)}
        for module in self.frozen.values():
            module.requires_grad_(False)

    def _check(self, teacher: checkpoints.ModelCard) -> None:
        place = self.config.teacher
        if not teacher.attention:
            raise UserError(f"teacher={place} has no attention head; use the run of the representation phase")
        if teacher.classes != self.card.classes:
            raise UserError(f"teacher={place} was trained on {len(teacher.classes)} other classes than the data set's")
        if (teacher.clip_length, teacher.size) != (self.card.clip_length, self.card.size):
            raise UserError(
                f"teacher={place} takes {teacher.clip_length} frames of {teacher.size} px, this student "
                f"{self.card.clip_length} of {self.card.size} px; set data.clip_length and data.size to the teacher's"
            )
        same_preprocessing(f"teacher={place}", teacher, self.card)
        if teacher.feature_shape != self.card.feature_shape:
            raise UserError(
                f"teacher and student differ at Mixed_5c: (C,T,H,W) {teacher.feature_shape} and "
                f"{self.card.feature_shape}; set model.width={teacher.model.width}"
            )

    def teach(self, batch: Batch, features: Tensor, attention: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher VAE's reconstruction of the student's features, and the teacher's attention."""
        with torch.no_grad():
            reconstruction = self.frozen["teacher_cvae"](features, attention, noise).reconstruction
            return reconstruction, self.frozen["teacher"](batch.clips).attention


class PlainStudent(Teacher):
    """The student alone: its attention-weighted classifier trained with cross entropy, for comparison."""

    uses_attention = True
