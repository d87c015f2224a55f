"""Feature representation: the network learns attention while a conditional VAE learns its features."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor

from ...configs.schema import TrainConfig
from ...models.recognizer import ENDPOINT
from ...pipelines.loader import Batch
from .. import losses
from .base import Phase, Stage

log = logging.getLogger(__name__)


class Representation(Phase):
    """Alternates on every batch, from one backbone forward: stage A for the VAE, stage B for backbone and attention."""

    uses_cvae = True

    def __init__(self, config: TrainConfig, classes: tuple[str, ...]):
        super().__init__(config, classes)
        if config.phase == "representation" and not config.init:
            log.warning("no init=RUN: the teacher's backbone starts from random weights")

    def teach(
        self, batch: Batch, features: Tensor, attention: Tensor, noise: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's reconstruction of these features, and its attention for these clips; none in this phase."""
        return None, None

    def stages(self, batch: Batch, epoch: int, noise: Tensor | None) -> Iterator[Stage]:
        assert noise is not None, "the loop draws noise for phases with a VAE"
        config = self.config.loss
        output = self.nets["recognizer"](batch.clips)
        features, attention = output.features[ENDPOINT], output.attention
        fixed_features, fixed_attention = features.detach(), attention.detach()
        teacher_reconstruction, teacher_attention = self.teach(batch, fixed_features, fixed_attention, noise)

        model = self.nets["cvae"](fixed_features, fixed_attention, noise)
        yield Stage(
            "cvae",
            losses.generative(
                config, fixed_features, fixed_attention, model.reconstruction, model.mean, model.logvar,
                teacher_reconstruction,
            ),
        )  # fmt: skip

        class_loss = losses.classification(
            output.logits, batch.labels, label_smoothing=config.label_smoothing, compat=self.config.compat
        )
        # The VAE as stage A has just left it.
        reconstruction = self.cvae.decode_frozen(attention, noise)
        yield Stage(
            "recognizer",
            losses.distillation(config, class_loss, epoch, features, reconstruction, attention, teacher_attention),
        )
