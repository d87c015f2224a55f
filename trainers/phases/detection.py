"""Temporal action detection: the detector alone, with its conditional VAEs, and distilled from such a teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ...configs.schema import TrainConfig
from ...kernels.attention_kd import attention_kd
from ...models.detector import ENDPOINTS, Features, Represented
from ...pipelines.loader import Batch, Windows
from .. import detection_losses, losses
from ..frozen import FrozenDetector
from ..losses import Terms
from ..methods import METHODS
from .base import Phase, Stage, Turn

log = logging.getLogger(__name__)


class Detection(Phase):
    """detect-teacher: no attention. detect-representation: attention, and stage A for the VAEs before stage B.
    detect-distill: the same with a teacher, as far as the method follows it; method none has attention and no VAE.

    Windows and their spliced twins go through the backbone together.
    """

    task = "detection"

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", resumed: bool = False):
        self.uses_attention = config.phase != "detect-teacher"
        method = METHODS[config.distill.method] if config.distills else None
        self.uses_cvae = method.vae if method else config.phase == "detect-representation"
        super().__init__(config, classes, modality, resumed)
        if config.phase == "detect-representation" and not config.init:
            log.warning("no init=RUN: the teacher's backbone starts from random weights")
        self.method = method
        if method is not None and method.needs_teacher:
            self.teacher = FrozenDetector(config, self.card, method)
            self.frozen = self.teacher.modules

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        windows = batch.windows
        assert windows is not None and windows.boundaries is not None
        count = len(batch.clips)
        if turn.only == "cvae":
            with torch.no_grad(), self.part("student"):
                seen = self.network(batch.clips, detect=False)
            yield self._stage_a(seen, turn)
            return
        self._shares = (batch.count, batch.total)
        clips = self._with_spliced(batch.clips, windows)
        spliced = torch.tensor(len(clips) - count, device=clips.device)
        # Of what is averaged over this rank's spliced windows; 1 without other ranks.
        self._spliced_share = spliced / self._divisors(spliced)
        with self.part("student"):
            seen = self.nets["detector"](clips, detect=False)
        if self.uses_cvae and turn.only is None:
            yield self._stage_a(_part(seen, slice(count)), turn)
        yield self._stage_b(seen, clips, count, windows, turn)

    def _divisors(self, counts: Tensor) -> Tensor:
        """What this rank's sums are divided by so that the ranks' terms, each weighted by its share of clips, add up to
        the sums over all ranks divided by the counts over all ranks."""
        if self.ranks.world_size == 1:
            return detection_losses.one_at_least(counts)
        own, total = self._shares
        everyone = self.ranks.sum(counts.float() * (own > 0))
        # A rank without a clip of its own counts for nothing, and its terms get no weight.
        return detection_losses.one_at_least(everyone) * (own / total if own else 1.0)

    def _with_spliced(self, clips: Tensor, windows: Windows) -> Tensor:
        """Windows (N,...), then the spliced twins of those that have one."""
        if not windows.with_splice or not self.config.loss.triplet:
            return clips
        assert windows.spliced is not None
        return torch.cat([clips, windows.spliced[list(windows.with_splice)].to(clips.dtype)]).contiguous(
            memory_format=torch.channels_last_3d
        )

    def _stage_a(self, seen: Represented, turn: Turn) -> Stage:
        assert seen.attention is not None and turn.noise is not None
        features, attention = ({k: v.detach() for k, v in values.items()} for values in seen)  # type: ignore[union-attr]
        taught: Features | None = None
        if self.method is not None and self.method.follows_vae:
            with self.part("teacher"):
                taught = self.teacher.reconstruct(features, attention, turn.noise.teacher)
        with self.part("cvae"):
            models = self.nets["cvae"](features, attention, turn.noise.encoder)
        with self.part("losses"):
            total: Terms = {}
            for name in ENDPOINTS:
                model = models[name]
                terms = losses.generative(
                    self.config.loss, features[name], attention[name], model.reconstruction, model.mean, model.logvar,
                    None if taught is None else taught[name],
                )  # fmt: skip
                total = {key: total[key] + value if total else value for key, value in terms.items()}
        return Stage("cvae", total)

    def _stage_b(self, seen: Represented, clips: Tensor, count: int, windows: Windows, turn: Turn) -> Stage:
        if seen.attention is None:
            with self.part("losses"):
                terms = self._detect({k: v[:count] for k, v in seen.features.items()}, windows)
                spliced = {k: v[count:] for k, v in seen.features.items()}
                return self._sum(terms | self._triplet(spliced, windows, len(clips) - count))
        made = taught = None
        if self.uses_cvae:
            assert turn.noise is not None
            with self.part("cvae"):
                made = self.cvae.decode_frozen({k: v[:count] for k, v in seen.attention.items()}, turn.noise.prior)
        if self.method is not None and "attention" in self.method.teacher:
            with self.part("teacher"):
                taught = self.teacher.attention(clips)
        with self.part("losses"):
            front, back, followed = self._weighted(_part(seen, slice(count)), made, taught, count)
            terms = self._detect(front, windows)
            confidence = self.network.pyramid.confidence(back)
            terms["background"] = detection_losses.background(confidence, compat=self.config.compat)
            terms |= followed
            own = _part(seen, slice(count, None))
            assert own.attention is not None
            weighted = self.network.foreground(own.features, own.attention) if len(clips) > count else {}
            terms |= self._triplet(weighted, windows, len(clips) - count)
            if len(clips) > count and taught is not None:
                pairs = ((own.attention[name], taught[name][count:]) for name in ENDPOINTS)
                followed = sum((a.float() - t.float()).square().mean() for a, t in pairs)
                terms["att"] = terms["att"] + self._spliced_share * followed
        return self._sum(terms, turn)

    def _weighted(
        self, seen: Represented, made: Features | None, taught: Features | None, count: int
    ) -> tuple[Features, Features, Terms]:
        """Foreground, background, and what compares features and attention: rec and att, summed over endpoints."""
        assert seen.attention is not None
        front: Features = {}
        back: Features = {}
        terms: Terms = {}
        for name in ENDPOINTS:
            features, attention = seen.features[name], seen.attention[name]
            found = attention_kd(
                features, attention, None if taught is None else taught[name][:count],
                None if made is None else made[name], maps=self.config.compat != "reference",
            )  # fmt: skip
            if found.background is not None:
                front[name], back[name] = found.foreground, found.background
            for key, value in (("rec", found.reconstruction_loss), ("att", found.attention_loss)):
                if value is not None:
                    terms[key] = terms[key] + value if key in terms else value
        if self.config.compat == "reference":
            opposite = {name: 1 - attention for name, attention in seen.attention.items()}
            front, back = (self.network.foreground(seen.features, by) for by in (seen.attention, opposite))
        return front, back, terms

    def _detect(self, features: Features, windows: Windows) -> Terms:
        """The detector's own losses on features of the windows."""
        config, length = self.config, self.config.data.clip_length
        output = self.network.pyramid(features)
        targets = detection_losses.targets_of(windows.actions, length)
        terms = detection_losses.multi_segment(
            output, targets, length, overlap=config.loss.overlap, compat=config.compat, divisors=self._divisors
        )
        assert windows.boundaries is not None
        terms["start"], terms["end"] = detection_losses.boundaries(output, windows.boundaries)
        return terms

    def _triplet(self, features: Features, windows: Windows, count: int) -> Terms:
        """Of the spliced windows' features; 0 for a batch without any, so that every step has the same terms."""
        if not count:
            return {"triplet": torch.zeros((), device=self._device)}
        assert windows.segments is not None
        own = self.network.triplet(features, windows.segments[list(windows.with_splice)])
        return {"triplet": self._spliced_share * detection_losses.triplet(own)}

    def _sum(self, terms: Terms, turn: Turn | None = None) -> Stage:
        """Adds up what the windows say, each with its weight; a term that is not there counts nothing."""
        config = self.config.loss
        weights = {
            "loc": config.segments, "conf": 1.0, "prop_loc": config.segments, "prop_conf": 1.0, "center": 1.0,
            "start": 1.0, "end": 1.0, "background": config.background, "triplet": config.triplet,
            "rec": losses.reconstruction_weight(config, turn.epoch) if turn else 0.0, "att": config.attention,
        }  # fmt: skip
        total = sum(
            (weights[name] * value for name, value in terms.items()), start=torch.zeros((), device=self._device)
        )
        return Stage("detector", {"total": total, **terms})

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def _part(seen: Represented, which: slice) -> Represented:
    """Some of the samples."""
    attention = None if seen.attention is None else {name: value[which] for name, value in seen.attention.items()}
    return Represented({name: value[which] for name, value in seen.features.items()}, attention)
