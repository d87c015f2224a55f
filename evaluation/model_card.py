"""The card of an exported model: model.json for programs, README.md for people."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from .. import __version__
from ..configs.load import read_run
from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import json_bytes, sha256_of, write_atomically
from ..models.checkpoints import ModelCard, read_card
from ..models.complexity import complexity
from ..preprocessing.shards import Dataset
from ..trainers.methods import METHODS
from . import recorded
from .formats import FORMATS, Source
from .recognition import data_config

CARD_FILE, README_FILE = "model.json", "README.md"
CARD_VERSION = 1
LICENSE = (
    "Apache-2.0 covers the software. The weights were learned from a data set, whose own terms apply to their use."
)
_SHOWN_CLASSES = 40
_EVALUATION_KEYS = (
    "split", "videos", "clips", "crops", "top1", "top5", "mean_class_accuracy", "ece", "loss",
    "decoder", "precision", "device",
)  # fmt: skip


def describe(
    source: Source, run: Path | None, folder: Path, formats: Sequence[str], check: dict[str, Any], name: str
) -> dict[str, Any]:
    """Everything that is known of the weights and of the files in `folder`, as JSON values.

    check: what the comparison with the network found. Raises UserError for a run whose files are damaged.
    """
    card, config = source.card, None if run is None else read_run(run)
    own, runtimes = check.pop("data_set"), check.pop("runtimes")
    return {
        "genkd_export": CARD_VERSION,
        "name": name,
        "description": _description(card, config),
        "task": "action recognition",
        "modality": card.modality,
        "classes": list(card.classes),
        "input": _input(card),
        "outputs": _outputs(card, source.recognizer.shape[1] - source.recognizer.pool[0] + 1),
        "architecture": _architecture(card),
        **complexity(source.recognizer, card.clip_length, card.size).to_json(),
        "data_set": own or {"place": str(card.data.get("dataset", "")), "read": False},
        "metrics": {} if run is None or config is None else _metrics(run, config, source.weights),
        "training": None if config is None else config.model_dump(mode="json"),
        "teacher": None if config is None or not config.teacher else _teacher(config),
        "check": check,
        "versions": {
            "genkd": __version__, "torch": torch.__version__, "safetensors": importlib.metadata.version("safetensors"),
            "python": platform.python_version(), **runtimes,
        },
        "files": [_file(path, formats) for path in sorted(folder.iterdir())],
        "license": LICENSE,
    }  # fmt: skip


def write(folder: Path, values: dict[str, Any]) -> None:
    """model.json and README.md."""
    write_atomically(folder / CARD_FILE, json_bytes(values))
    write_atomically(folder / README_FILE, render(values).encode())


def render(values: dict[str, Any]) -> str:
    """The card as Markdown."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "code": _code, "text": _text, "big": _big, "size": _size, "percent": lambda share: f"{100 * share:.2f} %",
        "yaml": lambda tree: yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100).strip(),
    }  # fmt: skip
    template = resources.files("genkd.evaluation").joinpath("model_card.md.j2").read_text(encoding="utf-8")
    shown = values["classes"][:_SHOWN_CLASSES]
    return environment.from_string(template).render(**values, shown=shown, more=len(values["classes"]) - len(shown))


def stranger_in(folder: Path) -> str | None:
    """The first entry of a folder that is no part of an export; None if all are."""
    try:
        values = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        known = {entry["file"] for entry in values["files"]} if values["genkd_export"] else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    known |= {CARD_FILE, README_FILE} if known else set()
    return next((path.name for path in sorted(folder.iterdir()) if path.name not in known), None)


def data_set(dataset: Dataset, place: str | Path) -> dict[str, Any]:
    """What a card tells of a data set."""
    info = dataset.info
    return {
        "place": str(place), "read": True, "name": info["name"], "modality": info.get("modality", "rgb"),
        "splits": info["splits"], "classes": len(info["classes"]), "video": info["video"],
        "index_digest": info["index_digest"],
    }  # fmt: skip


def _description(card: ModelCard, config: TrainConfig | None) -> str:
    how = ""
    if config is not None:
        how = {
            "teacher": ", trained on labels alone",
            "representation": ", trained with an attention head and a conditional VAE to be a teacher",
            "distill": f", a student trained with {METHODS[config.distill.method].title}",
        }[config.phase]
    net = "I3D" if card.model.temporal == "full" else "top-heavy I3D"
    what = "RGB video" if card.modality == "rgb" else "optical flow"
    return f"Recognizes {len(card.classes)} actions in clips of {what}: a {net}{how}."


def _input(card: ModelCard) -> dict[str, Any]:
    data = data_config(card)
    mean, std = (data.flow_mean, data.flow_std) if card.modality == "flow" else (data.mean, data.std)
    return {
        "layout": "NCTHW", "dtype": "float32",
        "channels": ["x", "y"] if card.modality == "flow" else ["red", "green", "blue"],
        "frames": card.clip_length, "stride": data.stride, "size": card.size, "crop": data.eval_scale,
        "padding": data.padding, "range": [0, 255], "mean": list(mean), "std": list(std),
    }  # fmt: skip


def _outputs(card: ModelCard, steps: int) -> dict[str, Any]:
    classes = len(card.classes)
    summed = card.compat == "reference"
    found = {
        "logits": {"shape": ["N", classes, steps], "meaning": "of each class at each time step"},
        "scores": {
            "shape": ["N", classes],
            "meaning": f"softmax of each time step, summed over {steps}" if summed else "probability of each class",
        },
    }
    if card.attention:
        channels, time = card.feature_shape[:2]
        found["attention"] = {"shape": ["N", channels, time], "meaning": "weight, 0 to 1, of each channel at each time"}
    return found


def _architecture(card: ModelCard) -> dict[str, Any]:
    top_heavy = card.model.temporal == "top_heavy"
    return {
        "network": "I3D (Inception-v1, 3D)", "temporal": card.model.temporal, "width": card.model.width,
        "stem": card.model.stem if top_heavy else "7x7x7, stride 2", "attention": card.attention,
        "compat": card.compat, "features": list(card.feature_shape),
        # Under compat=reference one ratio weights the features of a whole batch.
        "depends_on_batch": card.compat == "reference" and card.attention and card.modality == "rgb",
    }  # fmt: skip


def _metrics(run: Path, config: TrainConfig, weights: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    results = recorded.evaluation(run, weights)
    if results:
        found["evaluation"] = {key: results[key] for key in _EVALUATION_KEYS if key in results}
    measured = recorded.training(run, config, weights)
    if measured:
        about = {"split": config.data.eval_split, "clips": config.data.eval_clips, "crops": 1}
        found["training"] = about | measured
    return found


def _teacher(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"place": config.teacher, "method": config.distill.method}
    try:
        card = read_card(config.teacher)
    except UserError:  # moved or gone since; the configuration's word is all there is
        return found
    return found | {"temporal": card.model.temporal, "width": card.model.width, "compat": card.compat}


def _file(path: Path, formats: Sequence[str]) -> dict[str, Any]:
    # A format's weights that do not fit into its file lie beside it, under a longer name.
    form = next((name for name in formats if path.name.startswith(FORMATS[name].file)), None)
    return {"file": path.name, "format": form, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _code(value: object) -> str:
    """value as a code span that fits a table's cell."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _text(value: object) -> str:
    """value as plain text, nothing of it Markdown."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(str(value).split()))


def _big(count: int) -> str:
    """A number of FLOPs or parameters with its prefix, to four digits."""
    value = float(count)
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.4g} {prefix}".rstrip()
        value /= 1000
    return f"{value:.2f} G"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
