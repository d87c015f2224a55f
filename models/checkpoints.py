"""Weights on disk: safetensors files that describe themselves, and imports of the original implementation's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..errors import UserError
from ..files import write_atomically
from .cvae import ConditionalVAE
from .i3d import feature_shape
from .recognizer import Recognizer, build_cvae

RECOGNIZER_FILE, CVAE_FILE = "recognizer.safetensors", "cvae.safetensors"

_REFERENCE_RECOGNIZER = {
    "backbone._model.logits.conv3d": "logits",
    "backbone._model": "backbone",
    "deconv1.0": "attention.reduce.0",
    "deconv1.1": "attention.reduce.1",
    "Att_Head_5c.0.conv1d": "attention.conv",
    "Att_Head_5c.1": "attention.norm",
    "Att_Head_5c.3": "attention.linear",
}
_REFERENCE_CVAE = {
    "cencoder.con1": "encoder.conv",
    "cencoder.fc1": "encoder.mlp.0",
    "cencoder.fc2": "encoder.mlp.2",
    "cencoder.fc3": "encoder.mlp.4",
    "cdecoder.fc1": "decoder.mlp.0",
    "cdecoder.fc2": "decoder.mlp.2",
    "cdecoder.fc3": "decoder.mlp.4",
    "cdecoder.deconv": "decoder.deconv",
}


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


@dataclass(frozen=True)
class ImportReport:
    """What an import did: which module it recognized, and each key it used, did not use, or missed."""

    kind: str
    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())


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
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no weights that genkd wrote ({error})") from None


def load_recognizer(place: str | Path) -> tuple[Recognizer, ModelCard]:
    """A recognizer with its stored weights, on the CPU, in eval mode."""
    card = read_card(place)
    recognizer = card.build()
    recognizer.load_state_dict(_read_state(find_weights(place)))
    return recognizer.eval(), card


def load_cvae(place: str | Path) -> ConditionalVAE:
    """The conditional VAE beside a recognizer's weights, on the CPU, in eval mode."""
    cvae = build_cvae(read_card(place).feature_shape)
    cvae.load_state_dict(_read_state(find_weights(place, CVAE_FILE)))
    return cvae.eval()


def initialize_from(recognizer: Recognizer, place: str | Path) -> list[str]:
    """Copies stored weights into a recognizer; returns the modules that were not there and keep their fresh weights.

    Only a missing attention head is allowed to keep fresh weights. Raises UserError for any other difference.
    """
    path = find_weights(place)
    state, own = _read_state(path), recognizer.state_dict()
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing = [key for key in own if key not in state and not key.startswith("attention.")]
    if wrong or missing:
        what = (
            f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
            if wrong
            else f"no {missing[0]}"
        )
        raise UserError(f"{path} does not fit this model ({what}): temporal, width or the number of classes differ")
    recognizer.load_state_dict(state, strict=False)
    return sorted({key.split(".")[0] for key in own if key not in state})


def from_reference(state: dict[str, Tensor]) -> tuple[nn.Module, ImportReport]:
    """A module with the weights of the original implementation's recognition teacher, student or CVAE.

    The kind is told by keys and shapes; a leading "module." is ignored. Halves that recognition never uses are left
    out and reported. Raises UserError for anything else.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "cencoder.con1.0.weight" in state:
        weight = state["cencoder.con1.0.weight"]
        module: nn.Module = build_cvae((weight.shape[0], 1, weight.shape[3], weight.shape[4]))
        return _imported(module, state, _REFERENCE_CVAE, "recognition cvae")
    if "deconv1.0.weight" in state and "backbone._model.logits.conv3d.weight" in state:
        stem = state["backbone._model.Conv3d_1a_7x7.conv3d.weight"]
        temporal: Literal["full", "top_heavy"] = "full" if stem.shape[2] == 7 else "top_heavy"
        head, time = state["deconv1.0.weight"], state["Att_Head_5c.3.weight"].shape[0]
        module = Recognizer(
            ModelConfig(temporal=temporal, stem="strided"),
            state["backbone._model.logits.conv3d.weight"].shape[0],
            (head.shape[1], time, head.shape[3], head.shape[4]),
            compat="reference",
            in_channels=stem.shape[1],
        )
        kind = "recognition teacher" if temporal == "full" else "recognition student"
        return _imported(module, state, _REFERENCE_RECOGNIZER, kind)
    raise UserError("these weights are neither a recognition teacher or student of the reference nor its CVAE")


def _imported(
    module: nn.Module, state: dict[str, Tensor], names: dict[str, str], kind: str
) -> tuple[nn.Module, ImportReport]:
    mapped: dict[str, Tensor] = {}
    used = []
    own = module.state_dict()
    for key, value in state.items():
        for old, new in names.items():
            if key.startswith(old + "."):
                target = new + key[len(old) :]
                if target in own and own[target].shape == value.shape:
                    mapped[target] = value
                    used.append(key)
                break
    missing = tuple(key for key in own if key not in mapped)
    if missing:
        raise UserError(f"the weights look like a {kind} but lack {len(missing)} of its entries, e.g. {missing[0]}")
    module.load_state_dict(mapped)
    unused = tuple(key for key in state if key not in set(used))
    return module.eval(), ImportReport(kind, tuple(used), unused)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or unreadable ({error})") from None
