"""A recognizer in the files that other programs run: safetensors, PyTorch's exported programs, ONNX."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.backend import as_formulas
from ..models.checkpoints import RECOGNIZER_FILE, find_weights, load_recognizer
from ..models.recognizer import Recognizer

Outputs = dict[str, Tensor]  # logits (N,K,T'), scores (N,K) and, with an attention head, attention (N,C,T)
METADATA = "genkd"  # the key under which every format holds the weights' card
_EXTRA_FILE = "genkd.json"


class Graph(nn.Module):
    """What is exported: clips (N,C,T,H,W) float32, normalized -> Outputs. Features stay inside."""

    def __init__(self, recognizer: Recognizer):
        super().__init__()
        self.recognizer = recognizer

    def forward(self, clips: Tensor) -> Outputs:
        output = self.recognizer(clips)
        found = {"logits": output.logits, "scores": output.scores}
        return found if output.attention is None else {**found, "attention": output.attention}


class Source:
    """Stored weights, and what formats are written from."""

    def __init__(self, place: str | Path):
        self.weights = find_weights(place)
        self.recognizer, self.card = load_recognizer(place)
        self.graph = Graph(self.recognizer).eval()

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C,T,H,W) of a clip."""
        return self.card.in_channels, self.card.clip_length, self.card.size, self.card.size

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The graph for any number of clips of that shape."""
        example = torch.zeros(2, *self.clip_shape)  # of one clip, the batch would be taken for a constant 1
        shapes = {"clips": {0: torch.export.Dim("batch")}}
        with torch.no_grad(), as_formulas():
            program = torch.export.export(self.graph, (example,), dynamic_shapes=shapes)
        for node in program.graph.nodes:  # where the sources lie on this machine is nothing to hand on
            node.meta.pop("stack_trace", None)
        program.example_inputs = None  # would be stored: 77 MB of zeros for two clips of 64 frames of 224 px
        return program


@dataclass(frozen=True)
class Format:
    """How a format is written to `file` and run from there. packages: what is needed beyond genkd's own needs."""

    file: str
    write: Callable[[Source, Path], None]
    load: Callable[[Path], Callable[[Tensor], Outputs]]
    packages: tuple[str, ...] = ()


def require_packages(names: Iterable[str]) -> None:
    """Raises UserError for a package that a format needs and that cannot be imported."""
    for name in names:
        for package in FORMATS[name].packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    f"--format {name} needs the package {package}, which cannot be imported ({error}): "
                    'pip install "genkd[export]"'
                ) from None


def _copy_weights(source: Source, path: Path) -> None:
    shutil.copyfile(source.weights, path)


def _load_weights(path: Path) -> Callable[[Tensor], Outputs]:
    return Graph(load_recognizer(path)[0]).eval()


def _write_program(source: Source, path: Path) -> None:
    # By way of memory: a full disk is then an OSError, where torch's own writer gives an unexplained RuntimeError.
    buffer = io.BytesIO()
    torch.export.save(source.program, buffer, extra_files={_EXTRA_FILE: source.card.to_json()})
    path.write_bytes(buffer.getbuffer())


def _load_program(path: Path) -> Callable[[Tensor], Outputs]:
    return torch.export.load(path).module()


def _write_onnx(source: Source, path: Path) -> None:
    example = torch.zeros(2, *source.clip_shape)
    names = ["logits", "scores"] + (["attention"] if source.card.attention else [])
    with _without_chatter():
        program = torch.onnx.export(
            source.program, (example,), dynamo=True, verbose=False, input_names=["clips"], output_names=names,
            dynamic_shapes={"clips": {0: "batch"}},
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props[METADATA] = source.card.to_json()
    # Weights go into the file itself, or beside it where they are more than the format's 2 GB.
    program.save(str(path))


def _load_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(clips: Tensor) -> Outputs:
        arrays = session.run(names, {"clips": clips.contiguous().numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The exporter tells of packages for other networks and of its own deprecations: nothing a user could act on."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    "safetensors": Format(RECOGNIZER_FILE, _copy_weights, _load_weights),
    "torch-export": Format("recognizer.pt2", _write_program, _load_program),
    "onnx": Format("recognizer.onnx", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
}
