"""What all phases share: the modules, their card, and how they are put on devices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...configs.schema import TrainConfig
from ...errors import UserError
from ...models import checkpoints
from ...models.recognizer import build_cvae
from ...pipelines.loader import Batch
from ..distributed import Ranks
from ..losses import Terms

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One optimizer step: the module it updates, and its loss terms with `total`."""

    module: str
    terms: Terms


def same_preprocessing(place: str, stored: checkpoints.ModelCard, own: checkpoints.ModelCard) -> None:
    """Refuses weights that were trained on otherwise normalized clips; another stride is only mentioned."""
    if stored.modality != own.modality:
        raise UserError(f"{place} is for {stored.modality} clips, this data set holds {own.modality}")
    prefix = "flow_" if own.modality == "flow" else ""
    for key in (f"{prefix}mean", f"{prefix}std"):
        if stored.data.get(key, own.data[key]) != own.data[key]:
            raise UserError(
                f"{place} was trained with data.{key}={stored.data[key]}, this run has {own.data[key]}; use the same"
            )
    if stored.data.get("stride", own.data["stride"]) != own.data["stride"]:
        log.warning(
            "%s was trained with data.stride=%s, this run has %s", place, stored.data["stride"], own.data["stride"]
        )


class Phase:
    """Builds the modules of a phase. `modules` are trained, `frozen` only run; both are keyed by name.

    Subclasses implement stages(). The card describes the recognizer that comes out.
    """

    uses_attention = True
    uses_cvae = False

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb"):
        self.config = config
        data = config.data
        self.card = checkpoints.ModelCard(
            model=config.model, classes=classes, clip_length=data.clip_length, size=data.size,
            attention=self.uses_attention, compat=config.compat, data=data.model_dump(mode="json"),
            modality=modality,
        )  # fmt: skip
        # The weights depend on the seed alone, so that runs of one seed start from the same network.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.recognizer = self.card.build()
            self.modules: dict[str, nn.Module] = {"recognizer": self.recognizer}
            if self.uses_cvae:
                self.modules["cvae"] = self.cvae = build_cvae(self.card.feature_shape)
        self.frozen: dict[str, nn.Module] = {}
        self.nets = dict(self.modules)
        if config.init:
            self._initialize(config.init)

    def _initialize(self, place: str) -> None:
        card = checkpoints.read_card(place)
        if card.classes != self.card.classes:
            raise UserError(
                f"init={place} has {len(card.classes)} other classes than the data set; train on the same one"
            )
        same_preprocessing(f"init={place}", card, self.card)
        fresh = checkpoints.initialize_from(self.recognizer, place)
        log.info("started from %s; fresh weights: %s", place, ", ".join(fresh) or "none")

    def place(self, ranks: Ranks) -> None:
        """Moves everything to the rank's device and wraps what is trained for DDP."""
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(ranks.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.nets = {name: ranks.wrap(module) for name, module in self.modules.items()}

    def train(self) -> None:
        """Trained modules to training mode; frozen ones stay in eval mode."""
        for module in self.modules.values():
            module.train()

    def stages(self, batch: Batch, epoch: int, noise: Tensor | None) -> Iterator[Stage]:
        """The optimizer steps of one batch in turn; each is taken before the next is asked for. epoch counts from 1."""
        raise NotImplementedError
