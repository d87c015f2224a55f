"""What all phases share: the modules, their card, and how they are put on devices."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ...configs.schema import TrainConfig
from ...models import checkpoints
from ...pipelines.loader import Batch
from ..distributed import Ranks
from ..frozen import same_preprocessing
from ..losses import Terms

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One optimizer step: the module it updates, and its loss terms with `total`."""

    module: str
    terms: Terms


class Noise(NamedTuple):
    """Standard normal (N,T,C) each: for the VAE's encoder, for the teacher's VAE beside it, for decoding the prior.

    Of a detector, one of each for each endpoint, by name.
    """

    encoder: Any
    teacher: Any
    prior: Any


class Turn(NamedTuple):
    """Where a step stands. epoch counts from 1; draw, the loader's epoch, from 0; only: the one module whose stage is
    wanted, where the stages take turns by epoch; dropped: the recognizer's dropout, (N,C,T')."""

    epoch: int
    draw: int
    noise: Noise | None
    only: str | None
    dropped: torch.Tensor | None = None


class Phase:
    """Builds the modules of a phase. `modules` are trained, `frozen` only run; both are keyed by name.

    Subclasses implement stages(). The card describes the network that comes out, a recognizer or a detector.
    part(name) surrounds "student" (the network that is trained), "teacher", "cvae" and "losses", for who wants to time
    them.
    """

    uses_attention = True
    uses_cvae = False
    task = "recognition"

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], modality: str = "rgb", resumed: bool = False):
        self.config = config
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.part: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext
        data = config.data
        self.card = checkpoints.ModelCard(
            model=config.model, classes=classes, clip_length=data.clip_length, size=data.size,
            attention=self.uses_attention, compat=config.compat, data=data.model_dump(mode="json"),
            modality=modality, task=self.task,
        )  # fmt: skip
        # The weights depend on the seed alone, so that runs of one seed start from the same network.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network: Any = self.card.build()
            self.modules: dict[str, nn.Module] = {self.card.network: self.network}
            if self.uses_cvae:
                self.cvae: Any = self.card.build_cvae()
                self.modules["cvae"] = self.cvae
        self.frozen: dict[str, nn.Module] = {}
        self.teacher: Any = None  # a FrozenTeacher, or a FrozenDetector
        self.freezes_bn = config.model.freeze_bn == "always" or (
            config.model.freeze_bn == "auto" and self.task == "detection" and bool(config.init)
        )
        self.nets = dict(self.modules)
        self._synchronized: list[DistributedDataParallel] = []
        if config.init and not resumed:
            self._initialize(config.init)

    def _initialize(self, place: str) -> None:
        """Weights of the same classes are taken whole; of another data set, as pretraining, all but the classifier."""
        card, own, source = checkpoints.card_of_start(place), self.card, f"init={place}"
        pretraining = checkpoints.other_classes(source, card.classes, own.classes)
        if pretraining:
            log.info("%s knows %d other classes: pretraining, without its classifier", source, len(card.classes))
        # Flow may start from RGB, whose clips are normalized by other values.
        if (card.modality, own.modality) != ("rgb", "flow"):
            same_preprocessing(source, card, own, pretraining=pretraining)
        fresh = checkpoints.initialize_from(self.network, place, classifier=not pretraining)
        log.info("started from %s; fresh weights: %s", place, ", ".join(fresh) or "none")

    def place(self, ranks: Ranks) -> None:
        """Moves everything to the rank's device and wraps what is trained for DDP."""
        self.ranks = ranks
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(ranks.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            for weight in module.parameters():
                if weight.ndim == 5 and weight.shape[2:].numel() == 1:
                    # Strides as their gradients have them, or DDP would copy each into its bucket.
                    weight.data = weight.data.flatten(1)[..., None, None, None]
        # A detector's spliced windows come and go; parts of a batch and compiled graphs have reductions of their own.
        static = self.task == "recognition" and not self.config.micro_batch and self.config.compile == "off"
        wrapped = {name: ranks.wrap(module, static=static) for name, module in self.modules.items()}
        self._synchronized = [module for module in wrapped.values() if isinstance(module, DistributedDataParallel)]
        self.nets = {name: self._compiled(module) for name, module in wrapped.items()}
        if self.config.compile != "off":
            for module in self.frozen.values():
                module.compile(**self._compile_options)

    def _compiled(self, module: nn.Module) -> nn.Module:
        # Around DDP and not inside of it, so that its graph is cut where buckets of gradients are complete. Evaluation
        # calls the bare modules, whose batches have other sizes.
        return (
            module if self.config.compile == "off" else cast(nn.Module, torch.compile(module, **self._compile_options))
        )

    @property
    def _compile_options(self) -> dict[str, Any]:
        options = {"max_autotune": self.config.compile == "max-autotune", "triton.cudagraphs": self.config.cuda_graphs}
        return {"dynamic": False, "options": options}

    def train(self) -> None:
        """Trained modules to training mode; frozen ones stay in eval mode."""
        for module in self.modules.values():
            module.train()
        if self.freezes_bn:
            for layer in self.network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    @contextlib.contextmanager
    def steady_statistics(self) -> Iterator[None]:
        """Batch norm of the network keeps its statistics as they are, in training mode too."""
        layers = [layer for layer in self.network.modules() if isinstance(layer, _BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 0.0
        try:
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum

    def unsynchronized(self) -> contextlib.AbstractContextManager:
        """Gradients are added up here without being reduced over the ranks."""
        stack = contextlib.ExitStack()
        for module in self._synchronized:
            stack.enter_context(module.no_sync())
        return stack

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        """The optimizer steps of one batch in turn; each is taken before the next is asked for."""
        raise NotImplementedError
