"""Weights on disk: safetensors files that describe themselves, and imports of the original implementation's."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..configs.schema import DataConfig, ModelConfig
from ..errors import UserError
from ..files import write_atomically
from .cvae import ConditionalVAE
from .i3d import STRIDE_SPACE, STRIDE_TIME, feature_shape
from .recognizer import Recognizer, build_cvae
from .reference import ImportReport, Layout, from_reference, identify, is_torch_file, read_state, without_module

RECOGNIZER_FILE, CVAE_FILE = "recognizer.safetensors", "cvae.safetensors"
STEM = "backbone.Conv3d_1a_7x7.conv3d.weight"

log = logging.getLogger(__name__)

__all__ = [
    "CVAE_FILE", "RECOGNIZER_FILE", "ImportReport", "ModelCard", "card_of_start", "find_weights", "from_reference",
    "initialize_from", "load_cvae", "load_recognizer", "other_classes", "read_card", "reference_card", "save_weights",
]  # fmt: skip


@dataclass(frozen=True)
class ModelCard:
    """What it takes to rebuild a recognizer and feed it: stored in the weights' own file."""

    model: ModelConfig
    classes: tuple[str, ...]
    clip_length: int
    size: int
    attention: bool
    compat: str
    data: dict[str, Any]
    modality: str = "rgb"

    @property
    def in_channels(self) -> int:
        """Channels of a clip: 3 for RGB, 2 for optical flow."""
        return 2 if self.modality == "flow" else 3

    @property
    def feature_shape(self) -> tuple[int, int, int, int]:
        return feature_shape(self.clip_length, self.size, self.model.width)

    def build(self) -> Recognizer:
        """The recognizer with fresh weights."""
        return Recognizer(
            self.model, len(self.classes), self.feature_shape, attention=self.attention, compat=self.compat,
            in_channels=self.in_channels,
        )  # fmt: skip

    def to_json(self) -> str:
        """One line; read by from_json."""
        return json.dumps({**self.__dict__, "model": self.model.model_dump(mode="json")})

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """The card that to_json wrote."""
        values = json.loads(text)
        return cls(**{**values, "model": ModelConfig(**values["model"]), "classes": tuple(values["classes"])})


def save_weights(folder: Path, card: ModelCard, modules: dict[str, nn.Module]) -> None:
    """Writes recognizer.safetensors and, if there is one, cvae.safetensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        data = safetensors.torch.save(state, metadata={"genkd": card.to_json()})
        write_atomically(folder / f"{name}.safetensors", data)


def find_weights(place: str | Path, file: str = RECOGNIZER_FILE) -> Path:
    """The weights' file of a run folder, of a folder with weights, or the file itself. Raises UserError.

    A recognizer's file may have any name; its VAE is looked for beside it.
    """
    place = Path(place)
    if place.is_file() and file == RECOGNIZER_FILE:
        return place
    folder = place.parent if place.is_file() else place
    for path in (folder / "weights" / file, folder / file):
        if path.is_file():
            return path
    if (place / "config.yaml").is_file():
        raise UserError(f"{place} has no weights/{file}: that run has not finished, or is of a phase that makes none")
    raise UserError(f"{place} is neither a training run nor a folder with {file}")


def read_card(place: str | Path) -> ModelCard:
    """The model card of stored weights. Raises UserError if genkd did not write them."""
    path = find_weights(place)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return ModelCard.from_json(metadata["genkd"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("model", *first["loc"])))
        raise UserError(
            f"{path} does not fit this version of genkd: {where}: {first['msg']} (got {first['input']!r})"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} holds no weights that genkd wrote ({error}); others come in by `genkd import-checkpoint`"
        ) from None


def load_recognizer(place: str | Path) -> tuple[Recognizer, ModelCard]:
    """A recognizer with its stored weights, on the CPU, in eval mode. Raises UserError if they do not fit its card."""
    card, path = read_card(place), find_weights(place)
    recognizer = card.build()
    _load(recognizer, path, "the network that its own model card tells of")
    return recognizer.eval(), card


def load_cvae(place: str | Path, card: ModelCard | None = None) -> ConditionalVAE:
    """The conditional VAE beside a recognizer's weights, on the CPU, in eval mode.

    card: the recognizer's, where it is not there yet. Raises UserError if the two do not fit together.
    """
    path = find_weights(place, CVAE_FILE)
    cvae = build_cvae((card or read_card(place)).feature_shape)
    _load(cvae, path, "the recognizer beside it")
    return cvae.eval()


def reference_card(
    layout: Layout,
    *,
    classes: tuple[str, ...] = (),
    clip_length: int | None = None,
    size: int | None = None,
    compat: Literal["reference", "none"] = "reference",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ModelCard:
    """The card of an imported module: clips of the size that its attention head or VAE is made for, else 64 x 224 px.

    classes: names, "0" to "K-1" if there are none; mean, std: of the channels in 0..1, DataConfig's if not given.
    Raises UserError if the clip does not give the features that the module takes, or a number of values is wrong.
    """
    clip_length = clip_length or (layout.time or 8) * STRIDE_TIME
    size = size or (layout.height or 7) * STRIDE_SPACE
    _, time, height, width = feature_shape(clip_length, size, 1.0)
    wanted = (layout.time or time, layout.height or height, layout.width or width)
    if (time, height, width) != wanted:
        raise UserError(
            f"clips of {clip_length} frames of {size} px give {time} x {height} x {width} features, this {layout.kind} "
            f"takes {' x '.join(map(str, wanted))}; leave --clip-length and --size out"
        )
    if classes and len(classes) != layout.num_classes:
        raise UserError(f"there are {len(classes)} class names, the {layout.kind} has {layout.num_classes} classes")
    prefix, given = "flow_" if layout.in_channels == 2 else "", {"mean": mean, "std": std}
    for name, values in given.items():
        if values is None:
            continue
        fits = len(values) == layout.in_channels and all(map(math.isfinite, values))
        if not fits or (name == "std" and min(values) <= 0):
            raise UserError(
                f"--{name} {','.join(map(str, values))} is not {layout.in_channels} finite "
                f"{'positive ' if name == 'std' else ''}values, one for each channel of the {layout.kind}"
            )
    norm = {f"{prefix}{name}": values for name, values in given.items() if values is not None}
    # The original is tested on the middle 224 of 256 pixels.
    settings = DataConfig.model_validate({"clip_length": clip_length, "size": size, "eval_scale": 0.875, **norm})
    return ModelCard(
        layout.config, classes or numbered(layout.num_classes), clip_length, size, layout.attention, compat,
        settings.model_dump(mode="json"), "flow" if layout.in_channels == 2 else "rgb",
    )  # fmt: skip


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that have none: their numbers from 0."""
    return tuple(map(str, range(count)))


def card_of_start(place: str | Path) -> ModelCard:
    """The card of weights to start from: stored ones, or a file of torch.save that from_reference takes."""
    if is_torch_file(place):
        with _named(place):
            return reference_card(_recognizer_layout(without_module(read_state(Path(place)))))
    return read_card(place)


def other_classes(place: str, stored: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Whether weights to start from know other classes than the data set, so that their classifier is of no use.

    Raises UserError where a mistake is likelier: the same names in another order, or as many without names.
    """
    if stored == own:
        return False
    if sorted(stored) == sorted(own):
        raise UserError(f"{place} has the data set's classes in another order; make the data set again with that order")
    if stored == numbered(len(own)):
        raise UserError(
            f"{place} has as many classes as the data set, {len(own)}, but no names for them: if they are the same, "
            "give it names with `genkd import-checkpoint FILE OUT --classes DATASET` and start from OUT"
        )
    return True


def initialize_from(recognizer: Recognizer, place: str | Path, *, classifier: bool = True) -> list[str]:
    """Copies weights into a recognizer; returns its modules that keep their fresh weights.

    place: what find_weights takes, or a .pt, .pth or .ckpt file that from_reference takes. An attention head that is
    not there stays fresh, and so does the classifier with classifier=False, for other classes. All else is copied,
    batch norm's statistics too. Two differences are bridged, and logged:

    - flow from RGB: the first convolution's kernels are averaged over their input channels, for x and for y;
    - top-heavy from full (and between stems): kernels of another temporal extent are summed over time; the paired
      stem gets half of the sum for each of its two frames. On a still clip both answer alike.

    Raises UserError, naming the key and both shapes, for any other difference.
    """
    own = recognizer.state_dict()
    if is_torch_file(place):
        with _named(place):
            state = from_reference(read_state(Path(place)))[0].state_dict()
    else:
        state = _read_state(find_weights(place))
    fitted: dict[str, Tensor] = {}
    averaged, summed = [], []
    for key, fresh in own.items():
        module = key.split(".")[0]
        if module == "logits" and not classifier:
            continue
        if key not in state:
            if module == "attention" and not any(name.startswith("attention.") for name in state):
                continue
            raise UserError(f"{place} does not fit this model: it has no {key}")
        value = state[key]
        if key == STEM and (value.shape[1], fresh.shape[1]) == (3, 2):
            value = value.mean(1, keepdim=True).expand(-1, 2, -1, -1, -1)
            averaged.append(key)
        steps = fresh.shape[2] if module == "backbone" and fresh.ndim == value.ndim == 5 else 0
        # Kernels of one or two steps are a top-heavy network's; longer ones are never made up.
        if steps in (1, 2) and value.shape[2] != steps:
            value = (value.sum(2, keepdim=True) / steps).expand(-1, -1, steps, -1, -1)
            summed.append(key)
        if value.shape != fresh.shape:
            raise UserError(
                f"{place} does not fit this model: {key} has shape {tuple(state[key].shape)} there and "
                f"{tuple(fresh.shape)} here; use its model.temporal, model.width, data.clip_length and data.size"
            )
        fitted[key] = value
    recognizer.load_state_dict({**own, **fitted})
    if averaged:
        log.info("%s is of RGB: its first convolution was averaged over the channels, for flow's two", place)
    if summed:
        log.info("%s is of another temporal extent: %d kernels were summed over time", place, len(summed))
    return sorted({key.split(".")[0] for key in own if key not in fitted})


def _recognizer_layout(state: dict[str, Tensor]) -> Layout:
    layout = identify(state)
    if layout.cvae:
        raise UserError(f"this is a {layout.kind}, not a network to start from")
    return layout


@contextlib.contextmanager
def _named(place: str | Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with its weights."""
    try:
        yield
    except UserError as error:
        raise error if str(place) in str(error) else UserError(f"{place}: {error}") from None


def _load(module: nn.Module, path: Path, owner: str) -> None:
    state, own = _read_state(path), module.state_dict()
    for key in (*own, *state):
        there, here = (tuple(found[key].shape) if key in found else "nothing" for found in (state, own))
        if there != here:
            raise UserError(
                f"{path} does not fit {owner}: {key} is {there} in the file, {here} in the network; put back the file "
                "that training or import wrote"
            )
    module.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or unreadable ({error})") from None
