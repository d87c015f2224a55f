"""Teacher: plain classification, without attention."""

from __future__ import annotations

from collections.abc import Iterator

from ...pipelines.loader import Batch
from .. import losses
from .base import Phase, Stage, Turn


class Teacher(Phase):
    """Backbone and classifier, trained with cross entropy."""

    uses_attention = False

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        with self.part("student"):
            output = self.nets["recognizer"](batch.clips, dropped=turn.dropped)
        loss = losses.classification(
            output.logits, batch.labels, label_smoothing=self.config.loss.label_smoothing, compat=self.config.compat
        )
        yield Stage("recognizer", {"total": loss, "class": loss})
