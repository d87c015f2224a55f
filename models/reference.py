"""Weights of the original implementation and of the public Kinetics I3D: read, told apart, put into genkd's modules."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..errors import UserError, explain_os_error
from .detector import Detector, build_cvaes, detector_shapes
from .i3d import STRIDE_SPACE, STRIDE_TIME
from .recognizer import Recognizer, build_cvae

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".pth.tar")
# What a state dict may be wrapped in, outermost first.
_WRAPPERS = ("state_dict", "model")
_CHANNELS = 1024
_STEM = "Conv3d_1a_7x7.conv3d.weight"
_LOGITS = "logits.conv3d."
_TRUNK = "backbone._model."
_CVAE_CONV, _CVAE_HALF = "cencoder.con1.0.weight", "cencoder_832.con2.0.weight"
_DETECTION = ("coarse_pyramid_detection.", "deconv2.", "Att_Head_4f.")
_FINE, _COARSE = "Att_Head_4f.3.weight", "Att_Head_5c.3.weight"
_CONF = "coarse_pyramid_detection.conf_head.conv1d.weight"

# How keys begin there and here; the first that fits is taken.
_I3D_NAMES = {_LOGITS: "logits.", "": "backbone."}
_RECOGNIZER_NAMES = {
    _TRUNK + _LOGITS: "logits.",
    _TRUNK: "backbone.",
    "deconv1.0.": "attention.reduce.0.",
    "deconv1.1.": "attention.reduce.1.",
    "Att_Head_5c.0.conv1d.": "attention.conv.",
    "Att_Head_5c.1.": "attention.norm.",
    "Att_Head_5c.3.": "attention.linear.",
}
_DETECTOR_NAMES = {
    _TRUNK: "backbone.",
    "coarse_pyramid_detection.pyramids.0.0.conv3d.": "pyramid.levels.0.0.",
    "coarse_pyramid_detection.pyramids.1.0.conv3d.": "pyramid.levels.1.0.",
    "coarse_pyramid_detection.pyramids.": "pyramid.levels.",
    "coarse_pyramid_detection.loc_heads.": "pyramid.loc_scales.",
    **{
        f"coarse_pyramid_detection.{side}_proposal_branch.{old}.": f"pyramid.{side}_branch.{new}."
        for side in ("loc", "conf")
        for old, new in (("cur_point_conv", "point"), ("lr_conv", "sides"), ("roi_conv", "frames"),
                         ("proposal_conv", "merge"))
    },
    **{f"coarse_pyramid_detection.deconv.{3 * block + part}.": f"pyramid.frames.{block}.{part}."
       for block in range(3) for part in range(2)},
    "coarse_pyramid_detection.": "pyramid.",
    **{
        f"{old}.": f"attention.{endpoint}.{new}."
        for endpoint, number, head in (("Mixed_5c", 1, "5c"), ("Mixed_4f", 2, "4f"))
        for old, new in ((f"deconv{number}.0", "reduce.0"), (f"deconv{number}.1", "reduce.1"),
                         (f"Att_Head_{head}.0.conv1d", "conv"), (f"Att_Head_{head}.1", "norm"),
                         (f"Att_Head_{head}.3", "linear"))
    },
}  # fmt: skip
_CVAE_NAMES = {
    "cencoder.con1.": "encoder.conv.",
    "cencoder.fc1.": "encoder.mlp.0.",
    "cencoder.fc2.": "encoder.mlp.2.",
    "cencoder.fc3.": "encoder.mlp.4.",
    "cdecoder.fc1.": "decoder.mlp.0.",
    "cdecoder.fc2.": "decoder.mlp.2.",
    "cdecoder.fc3.": "decoder.mlp.4.",
    "cdecoder.deconv.": "decoder.deconv.",
}
# Both halves, of the two endpoints.
_DETECTION_CVAE_NAMES = {
    **{old: f"Mixed_5c.{new}" for old, new in _CVAE_NAMES.items()},
    **{
        old.replace("coder.", "coder_832.").replace("con1.", "con2."): f"Mixed_4f.{new}"
        for old, new in _CVAE_NAMES.items()
    },
}


@dataclass(frozen=True)
class ImportReport:
    """What an import did: the module it recognized, and the keys it used, did not use, or missed and left at 0."""

    kind: str
    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Layout:
    """The module that a state dict belongs to. height and width are Mixed_5c's; time is its length, 0 if not fixed.

    detection: the module belongs to a detector, whose modules are of two endpoints.
    """

    kind: str
    cvae: bool = False
    attention: bool = False
    temporal: Literal["full", "top_heavy"] = "full"
    in_channels: int = 3
    num_classes: int = 0
    time: int = 0
    height: int = 0
    width: int = 0
    detection: bool = False

    @property
    def named(self) -> str:
        """The kind with its article."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    @property
    def config(self) -> ModelConfig:
        """The network's configuration; the original's top-heavy stem skips every other frame."""
        return ModelConfig(temporal=self.temporal)

    @property
    def names(self) -> dict[str, str]:
        """How keys begin there -> here."""
        if self.detection:
            return _DETECTION_CVAE_NAMES if self.cvae else _DETECTOR_NAMES
        return _CVAE_NAMES if self.cvae else _RECOGNIZER_NAMES if self.attention else _I3D_NAMES

    def build(self) -> nn.Module:
        """The module without storage, on the meta device, for load_state_dict(assign=True)."""
        with torch.device("meta"):
            if self.detection:
                return self._build_detection()
            if self.cvae:
                return build_cvae((_CHANNELS, 1, self.height, self.width))
            shape = (_CHANNELS, self.time or 8, self.height or 7, self.width or 7)
            return Recognizer(
                self.config, self.num_classes, shape, attention=self.attention, compat="reference",
                in_channels=self.in_channels,
            )  # fmt: skip

    def _build_detection(self) -> nn.Module:
        clip_length, size = self.time * STRIDE_TIME, self.height * STRIDE_SPACE
        if self.cvae:
            return build_cvaes(detector_shapes(256, size, 1.0))
        return Detector(
            self.config, self.num_classes, detector_shapes(clip_length, size, 1.0), clip_length, compat="reference",
            in_channels=self.in_channels,
        )  # fmt: skip

    def may_lack(self, name: str) -> bool:
        """Whether a parameter or buffer of genkd's module may be absent, and is 0 then.

        Files from before PyTorch 0.4.1 count no batches, and a plain I3D may come without the classifier's bias.
        """
        return name.endswith(".num_batches_tracked") or (name == "logits.bias" and not self.attention)


def identify(state: Mapping[str, Tensor]) -> Layout:
    """Which module of the original implementation a state dict belongs to, by its keys and shapes.

    Keys come without "module.". Raises UserError for anything but a plain I3D, a network of recognition or detection,
    or its VAE.
    """
    if _CVAE_CONV in state:
        height, width = _shape(state, _CVAE_CONV, 5)[3:]
        half = _shape(state, _CVAE_HALF, 5)[3] if _CVAE_HALF in state else 0
        if (height, width) == (3, 3):  # of 96 pixels, the only size that the original's detection has
            return Layout("detection cvae", cvae=True, detection=True, height=height, width=width)
        owner = {14: "teacher ", 6: "student "}.get(half, "")
        return Layout(f"recognition {owner}cvae", cvae=True, height=height, width=width)
    if any(key.startswith(_DETECTION) for key in state):
        return _detector(state)
    for prefix in (_TRUNK, ""):
        if prefix + _STEM in state and prefix + _LOGITS + "weight" in state:
            return _network(state, prefix)
    raise UserError(
        "these weights are none that can be imported: plain I3D with its classifier, or the original implementation's "
        "teacher, student or CVAE of recognition or detection"
    )


def _detector(state: Mapping[str, Tensor]) -> Layout:
    for key in (_TRUNK + _STEM, "deconv1.0.weight", _COARSE, _FINE, _CONF):
        if key not in state:
            raise UserError(f"the weights look like a detection network but lack its {key}")
    _, channels, extent, _, _ = _shape(state, _TRUNK + _STEM, 5)
    temporal: Literal["full", "top_heavy"] = "full" if extent == 7 else "top_heavy"
    return Layout(
        "detection teacher" if temporal == "full" else "detection student", attention=True, detection=True,
        temporal=temporal, in_channels=channels, num_classes=_shape(state, _CONF, 3)[0] - 1,
        time=_shape(state, _COARSE, 2)[0], height=_shape(state, "deconv1.0.weight", 5)[3],
        width=_shape(state, "deconv1.0.weight", 5)[4],
    )  # fmt: skip


def _network(state: Mapping[str, Tensor], prefix: str) -> Layout:
    _, channels, extent, _, _ = shape = _shape(state, prefix + _STEM, 5)
    if channels not in (2, 3) or extent not in (1, 7):
        raise UserError(f"{prefix + _STEM} has shape {shape}, an I3D of RGB or flow (64, 3 or 2, 7 or 1, 7, 7)")
    temporal: Literal["full", "top_heavy"] = "full" if extent == 7 else "top_heavy"
    classes = _shape(state, prefix + _LOGITS + "weight", 5)[0]
    if not prefix:
        kind = f"{'' if temporal == 'full' else 'top-heavy '}i3d {'rgb' if channels == 3 else 'flow'}"
        return Layout(kind, temporal=temporal, in_channels=channels, num_classes=classes)
    kind = "recognition teacher" if temporal == "full" else "recognition student"
    for key in ("deconv1.0.weight", "Att_Head_5c.3.weight"):
        if key not in state:
            raise UserError(f"the weights look like a {kind} but lack its attention head's {key}")
    height, width = _shape(state, "deconv1.0.weight", 5)[3:]
    time = _shape(state, "Att_Head_5c.3.weight", 2)[0]
    return Layout(kind, False, True, temporal, channels, classes, time, height, width)


def _shape(state: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    shape = tuple(state[key].shape)
    if len(shape) != axes:
        raise UserError(f"{key} has shape {shape}, not one of {axes} axes")
    return shape


def without_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the leading "module." of nn.DataParallel taken off its keys."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def from_reference(state: Mapping[str, Tensor]) -> tuple[nn.Module, ImportReport]:
    """A module in eval mode with the weights of a plain I3D, or of a teacher, student or CVAE.

    The kind is told by keys and shapes; a leading "module." is ignored. A plain I3D becomes a Recognizer without
    attention, a detection CVAE a ModuleDict of both endpoints' ConditionalVAEs. The 832-channel halves of
    recognition's CVAEs, which are never used, are left out and reported as unused. Tensors are copied, as float32.
    Raises UserError for other modules, wrong shapes, sparse tensors, and missing or non-finite weights.
    """
    state = without_module(state)
    layout = identify(state)
    module = layout.build()
    own = module.state_dict()
    taken: dict[str, Tensor] = {}
    used: list[str] = []
    for key, value in state.items():
        name = _renamed(key, layout.names)
        if name not in own:
            continue
        if value.shape != own[name].shape:
            raise UserError(f"{key} has shape {tuple(value.shape)}, {layout.named} {tuple(own[name].shape)} there")
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{key} is no plain tensor but a sparse or quantized one; save it as a dense float tensor")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{key} holds values that are not finite; the weights are damaged")
        taken[name] = value.to(own[name].dtype, copy=True).contiguous()
        used.append(key)
    back = {new: old for old, new in layout.names.items()}
    absent = {name: _renamed(name, back) for name in own if name not in taken}
    needed = [key for name, key in absent.items() if not layout.may_lack(name)]
    if needed:
        raise UserError(f"the weights look like {layout.named} but lack {len(needed)} of its entries, e.g. {needed[0]}")
    zeros = {name: torch.zeros(own[name].shape, dtype=own[name].dtype) for name in absent}
    module.load_state_dict({**taken, **zeros}, assign=True)
    unused = tuple(key for key in state if key not in set(used))
    return module.eval(), ImportReport(layout.kind, tuple(used), unused, tuple(absent.values()))


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def is_torch_file(place: str | Path) -> bool:
    """Whether a path is a file that torch.save may have written, by its name."""
    return Path(place).name.endswith(TORCH_SUFFIXES) and Path(place).is_file()


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth or .ckpt file, bare or under "state_dict" or "model", or of a .safetensors file.

    Nothing in the file is executed. Raises UserError for a file that would need that, and for an unreadable one.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if not path.name.endswith(TORCH_SUFFIXES):
            raise UserError(f"{path} is none of {', '.join(TORCH_SUFFIXES)} and .safetensors; rename it to what it is")
        value = _read_torch(path)
    except OSError as error:
        raise UserError(explain_os_error(error, f"reading {path}")) from None
    for wrapper in _WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
    tensors = (
        {key: entry for key, entry in value.items() if isinstance(key, str) and isinstance(entry, Tensor)}
        if isinstance(value, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no state dict, bare or under 'state_dict' or 'model', but {_told(value)}")
    return tensors


def _told(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"a value of type {type(value).__name__}"
    return f"a dict of {', '.join(map(repr, list(value)[:4]))}" if value else "an empty dict"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            own = "genkd" in (file.metadata() or {})
        if own:
            raise UserError(f"{path} is genkd's own file already; name it as it is where weights are asked for")
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None


def _read_torch(path: Path) -> Any:
    try:
        # Only what is used of a large archive is then read; files from before PyTorch 1.6 are no archives.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # the pickle of a damaged or foreign file can make the unpickler raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: loading it would run code of {refused[1]}; where you trust it, save its state "
                "dict alone, as plain tensors, and import that"
            ) from None
        told = re.search(r"WeightsUnpickler error: (.+)", str(error))
        reason = (told[1] if told else str(error)).strip().split("\n")[0].split(". ")[0][:200]
        # Other errors have no text for people: a KeyError only holds the byte that the unpickler does not know.
        speaks = isinstance(error, pickle.UnpicklingError | RuntimeError) and reason != "Weights only load failed"
        refuses = isinstance(error, pickle.UnpicklingError)
        what = "is damaged, or needs code to load" if refuses else "is damaged or no file of torch.save"
        raise UserError(f"{path} {what} ({reason})" if speaks and reason else f"{path} {what}") from None
