"""The student without a conditional VAE: alone, or with a method that adds one term to its class loss."""

from __future__ import annotations

from collections.abc import Iterator

from ...configs.schema import TrainConfig
from ...models.recognizer import ENDPOINT
from ...pipelines.loader import Batch
from .. import losses
from ..frozen import FrozenTeacher
from ..methods import METHODS
from .base import Phase, Stage, Turn


class Student(Phase):
    """Attention-weighted classifier: cross entropy, and the loss of `distill.method` against the teacher's outputs."""

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", resumed: bool = False):
        super().__init__(config, classes, modality, resumed)
        self.method = METHODS[config.distill.method]
        if self.method.needs_teacher:
            self.teacher = FrozenTeacher(config, self.card, self.method)
            self.frozen = self.teacher.modules

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        config = self.config.loss
        with self.part("student"):
            output = self.nets["recognizer"](batch.clips, dropped=turn.dropped)
        class_loss = losses.classification(
            output.logits, batch.labels, label_smoothing=config.label_smoothing, compat=self.config.compat
        )
        terms = {"total": class_loss, "class": class_loss}
        if self.method.loss is not None and self.teacher is not None:
            own = {"logits": output.logits, "features": output.features[ENDPOINT]}
            with self.part("teacher"):
                taught = self.teacher.outputs(batch, turn.draw)
            with self.part("losses"):
                followed = self.method.loss(config, own, taught)
            terms = {"total": class_loss + followed, "class": class_loss, "follow": followed}
        yield Stage("recognizer", terms)
