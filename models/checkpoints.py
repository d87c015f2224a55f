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
from .detector import Detector, EndpointVAEs, build_cvaes, detector_shapes
from .i3d import STRIDE_SPACE, STRIDE_TIME, feature_shape
from .recognizer import Recognizer, build_cvae
from .reference import ImportReport, Layout, from_reference, identify, is_torch_file, read_state, without_module

RECOGNIZER_FILE, DETECTOR_FILE, CVAE_FILE = "recognizer.safetensors", "detector.safetensors", "cvae.safetensors"
NETWORK_FILES = (RECOGNIZER_FILE, DETECTOR_FILE)
STEM = "backbone.Conv3d_1a_7x7.conv3d.weight"
_CLASSIFIERS = ("logits.", "pyramid.conf_head.", "pyramid.prop_conf_head.")

log = logging.getLogger(__name__)

__all__ = [
    "CVAE_FILE", "DETECTOR_FILE", "RECOGNIZER_FILE", "ImportReport", "ModelCard", "card_of_start", "find_weights",
    "from_reference", "initialize_from", "load_cvae", "load_detector", "load_recognizer", "other_classes", "read_card",
    "reference_card", "save_weights", "unnamed",
]  # fmt: skip


@dataclass(frozen=True)
class ModelCard:
    """What it takes to rebuild a recognizer or a detector and feed it: stored in the weights' own file.

    A detector's first class is the background.
    """

    model: ModelConfig
    classes: tuple[str, ...]
    clip_length: int
    size: int
    attention: bool
    compat: str
    data: dict[str, Any]
    modality: str = "rgb"
    task: str = "recognition"

    @property
    def network(self) -> str:
        """What the network is called, as a module and as a file."""
        return "detector" if self.task == "detection" else "recognizer"

    @property
    def in_channels(self) -> int:
        """Channels of a clip: 3 for RGB, 2 for optical flow."""
        return 2 if self.modality == "flow" else 3

    @property
    def feature_shape(self) -> tuple[int, int, int, int]:
        """(C,T,H,W) of Mixed_5c."""
        return feature_shape(self.clip_length, self.size, self.model.width)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """(C,T,H,W) of a detector's endpoints."""
        return detector_shapes(self.clip_length, self.size, self.model.width)

    def build(self) -> Recognizer | Detector:
        """The network with fresh weights."""
        if self.task == "detection":
            return Detector(
                self.model, len(self.classes) - 1, self.shapes, self.clip_length, attention=self.attention,
                compat=self.compat, in_channels=self.in_channels,
            )  # fmt: skip
        return Recognizer(
            self.model, len(self.classes), self.feature_shape, attention=self.attention, compat=self.compat,
            in_channels=self.in_channels,
        )  # fmt: skip

    def build_cvae(self) -> ConditionalVAE | EndpointVAEs:
        """The conditional VAE of its features, or the detector's two."""
        return build_cvaes(self.shapes) if self.task == "detection" else build_cvae(self.feature_shape)

    def to_json(self) -> str:
        """One line; read by from_json."""
        return json.dumps({**self.__dict__, "model": self.model.model_dump(mode="json")})

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """The card that to_json wrote."""
        values = json.loads(text)
        return cls(**{**values, "model": ModelConfig(**values["model"]), "classes": tuple(values["classes"])})


def save_weights(folder: Path, card: ModelCard, modules: dict[str, nn.Module]) -> None:
    """Writes each module as NAME.safetensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        data = safetensors.torch.save(state, metadata={"genkd": card.to_json()})
        write_atomically(folder / f"{name}.safetensors", data)


def find_weights(place: str | Path, file: str = "") -> Path:
    """The network's file of a run folder, of a folder with weights, or the file itself. Raises UserError.

    file: another one, beside it, such as its VAE's. A network's file may have any name.
    """
    place = Path(place)
    if place.is_file() and not file:
        return place
    folder = place.parent if place.is_file() else place
    files = (file,) if file else NETWORK_FILES
    for path in (folder / part / name for part in ("weights", "") for name in files):
        if path.is_file():
            return path
    if (place / "config.yaml").is_file():
        raise UserError(
            f"{place} has no weights/{' or '.join(files)}: that run has not finished, or is of a phase that makes none"
        )
    raise UserError(f"{place} is neither a training run nor a folder with {' or '.join(files)}")


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
    card = read_card(place)
    if card.task != "recognition":
        raise UserError(
            f"{place} holds a detector; recognition needs the weights of a recognizer, `genkd detect` takes this"
        )
    network = _load_network(place, card)
    assert isinstance(network, Recognizer)
    return network, card


def load_detector(place: str | Path) -> tuple[Detector, ModelCard]:
    """A detector with its stored weights, on the CPU, in eval mode. Raises UserError if they do not fit its card."""
    card = read_card(place)
    if card.task != "detection":
        raise UserError(f"{place} holds a recognizer; detection needs the weights of a detect- phase")
    network = _load_network(place, card)
    assert isinstance(network, Detector)
    return network, card


def _load_network(place: str | Path, card: ModelCard) -> nn.Module:
    network = card.build()
    _load(network, find_weights(place), "the network that its own model card tells of")
    return network.eval()


def load_cvae(place: str | Path, card: ModelCard | None = None) -> ConditionalVAE | EndpointVAEs:
    """The conditional VAE beside a network's weights, on the CPU, in eval mode.

    card: the network's, where it is not there yet. Raises UserError if the two do not fit together.
    """
    path = find_weights(place, CVAE_FILE)
    card = card or read_card(place)
    cvae = card.build_cvae()
    _load(cvae, path, f"the {card.network} beside it")
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
    """The card of an imported module: clips of the size that its attention head or VAE is made for, else 64 x 224 px,
    for detection 256 x 96.

    classes: names, "0" to "K-1" if there are none, a detector's with the background first; mean, std: of the channels
    in 0..1, DataConfig's if not given.
    Raises UserError if the clip does not give the features that the module takes, or a number of values is wrong.
    """
    clip_length = clip_length or (layout.time or (32 if layout.detection else 8)) * STRIDE_TIME
    size = size or (layout.height or 7) * STRIDE_SPACE
    _, time, height, width = feature_shape(clip_length, size, 1.0)
    wanted = (layout.time or time, layout.height or height, layout.width or width)
    if (time, height, width) != wanted:
        raise UserError(
            f"clips of {clip_length} frames of {size} px give {time} x {height} x {width} features, this {layout.kind} "
            f"takes {' x '.join(map(str, wanted))}; leave --clip-length and --size out"
        )
    count = layout.num_classes + layout.detection  # the background is a detector's first
    if classes and len(classes) != count:
        raise UserError(f"there are {len(classes)} class names, the {layout.kind} has {count} classes")
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
    # The original is tested on the middle 224 of 256 pixels, its detector on the middle 96 of 112.
    usual: dict[str, Any] = {"eval_scale": 0.875}
    if layout.detection:
        usual = {"eval_scale": 0.857, "padding": "zero", "mean": (0.5,) * 3, "std": (0.5,) * 3, "flow_std": (0.5,) * 2}
    settings = DataConfig.model_validate({"clip_length": clip_length, "size": size, **usual, **norm})
    names = numbered(count)
    if layout.detection and names:
        names = ("Background", *names[1:])
    return ModelCard(
        layout.config, classes or names, clip_length, size, layout.attention, compat, settings.model_dump(mode="json"),
        "flow" if layout.in_channels == 2 else "rgb", "detection" if layout.detection else "recognition",
    )  # fmt: skip


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that have none: their numbers from 0."""
    return tuple(map(str, range(count)))


def unnamed(classes: tuple[str, ...]) -> bool:
    """Whether classes are numbers alone, but for a detector's background."""
    return classes in (numbered(len(classes)), ("Background", *numbered(len(classes))[1:]))


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
    if unnamed(stored) and len(stored) == len(own):
        raise UserError(
            f"{place} has as many classes as the data set, {len(own)}, but no names for them: if they are the same, "
            "give it names with `genkd import-checkpoint FILE OUT --classes DATASET` and start from OUT"
        )
    return True


def initialize_from(network: Recognizer | Detector, place: str | Path, *, classifier: bool = True) -> list[str]:
    """Copies weights into a network; returns its modules that keep their fresh weights.

    place: what find_weights takes, or a .pt, .pth or .ckpt file that from_reference takes. Attention heads and a
    detector's pyramid that are not there stay fresh, and so does the classifier with classifier=False, for other
    classes. All else is copied, batch norm's statistics too. Two differences are bridged, and logged:

    - flow from RGB: the first convolution's kernels are averaged over their input channels, for x and for y;
    - top-heavy from full (and between stems): kernels of another temporal extent are summed over time; the paired
      stem gets half of the sum for each of its two frames. On a still clip both answer alike.

    Raises UserError, naming the key and both shapes, for any other difference.
    """
    own = network.state_dict()
    if is_torch_file(place):
        with _named(place):
            state = from_reference(read_state(Path(place)))[0].state_dict()
    else:
        state = _read_state(find_weights(place))
    fitted: dict[str, Tensor] = {}
    averaged, summed = [], []
    for key, fresh in own.items():
        module = key.split(".")[0]
        if key.startswith(_CLASSIFIERS) and not classifier:
            continue
        if key not in state:
            # A detector has an attention head for each endpoint.
            part = ".".join(key.split(".")[: 2 if isinstance(network, Detector) and module == "attention" else 1])
            if module in ("attention", "pyramid") and not any(name.startswith(f"{part}.") for name in state):
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
    network.load_state_dict({**own, **fitted})
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
