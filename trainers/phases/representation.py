"""Feature representation: the network learns attention while a conditional VAE learns its features."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ...configs.schema import TrainConfig
from ...kernels.attention_kd import attention_kd
from ...models.recognizer import ENDPOINT, RecognizerOutput
from ...pipelines.loader import Batch
from .. import losses
from .base import Phase, Stage, Turn

log = logging.getLogger(__name__)


class Representation(Phase):
    """Stage A for the VAE, stage B for backbone and attention: on every batch, from one forward of the backbone, or
    each in a pass over the data of its own, as `alternate` says."""

    uses_cvae = True

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", resumed: bool = False):
        super().__init__(config, classes, modality, resumed)
        if config.phase == "representation" and not config.init:
            log.warning("no init=RUN: the teacher's backbone starts from random weights")

    def teacher_reconstruction(self, features: Tensor, attention: Tensor, noise: Tensor) -> Tensor | None:
        """The teacher VAE's reconstruction of these features, for stage A; none in this phase."""
        return None

    def teacher_attention(self, batch: Batch, turn: Turn) -> Tensor | None:
        """The teacher's attention for these clips, for stage B; none in this phase."""
        return None

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        if turn.only == "cvae":
            with torch.no_grad(), self.part("student"):  # batch norm's statistics move, as in the original
                output = self.network(batch.clips, classify=False)
            yield self._stage_a(output, turn)
            return
        with self.part("student"):
            # The classifier comes after the VAE, in stage B, so that the features are read once for all of its terms.
            # DDP reduces gradients as they arrive, so its parameters may be used outside of the wrapped forward.
            output = self.nets["recognizer"](batch.clips, classify=False)
        if turn.only is None:
            yield self._stage_a(output, turn)
        yield self._stage_b(output, batch, turn)  # with the VAE as stage A has just left it

    def _stage_a(self, output: RecognizerOutput, turn: Turn) -> Stage:
        assert output.attention is not None and turn.noise is not None
        features, attention = output.features[ENDPOINT].detach(), output.attention.detach()
        taught = self.teacher_reconstruction(features, attention, turn.noise.teacher)
        with self.part("cvae"):
            model = self.nets["cvae"](features, attention, turn.noise.encoder)
        with self.part("losses"):
            terms = losses.generative(
                self.config.loss, features, attention, model.reconstruction, model.mean, model.logvar, taught
            )
        return Stage("cvae", terms)

    def _stage_b(self, output: RecognizerOutput, batch: Batch, turn: Turn) -> Stage:
        assert output.attention is not None and turn.noise is not None
        config = self.config.loss
        with self.part("cvae"):
            reconstruction = self.cvae.decode_frozen(output.attention, turn.noise.prior)
        taught = self.teacher_attention(batch, turn)
        with self.part("losses"):
            found = attention_kd(
                output.features[ENDPOINT], output.attention, taught, reconstruction,
                per_batch=self.config.compat == "reference",
            )  # fmt: skip
            class_loss = losses.classification(
                self.network.classify(found.foreground, turn.dropped), batch.labels,
                label_smoothing=config.label_smoothing, compat=self.config.compat,
            )  # fmt: skip
            assert found.reconstruction_loss is not None
            terms = losses.weigh(config, class_loss, turn.epoch, found.reconstruction_loss, found.attention_loss)
        return Stage("recognizer", terms)
