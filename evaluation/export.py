"""Exports a recognizer: files that others can run, each compared with the network itself, and a card about them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, explained
from ..files import is_leftover, sync, temporary_name
from ..models.checkpoints import ModelCard
from ..pipelines.loader import Loader
from ..pipelines.streams import is_flow
from ..preprocessing.shards import Dataset
from . import model_card, recorded
from .formats import FORMATS, Outputs, Source, require_packages
from .recognition import data_config

TOLERANCE = 1e-4  # of an output's largest absolute value


def export(
    place: str | Path,
    out: Path,
    formats: Sequence[str] = ("safetensors",),
    *,
    data: str | Path | None = None,
    split: str | None = None,
    clips: int = 4,
    name: str | None = None,
    force: bool = False,
    on_start: Callable[[int], None] = lambda steps: None,
    on_step: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Writes weights in some of FORMATS, model.json and README.md into the folder `out`; returns model.json's content.

    place: run folder or weights. Each file is loaded back and run on `clips` real clips, one alone and the rest in a
    batch, of `split` of the data set `data`, by default the run's own; where that cannot be read, on random clips, and
    the card says so. `out` appears when all is done or not at all; force replaces an earlier export in it.
    Raises UserError for a place without weights, an `out` that holds something, a data set that does not fit, a
    missing package, and outputs further from the network's own than TOLERANCE.
    """
    formats = list(dict.fromkeys(formats))
    require_packages(formats)
    refuse_occupied(out, force)
    source = Source(place)
    on_start(1 + len(formats))
    run = recorded.run_folder(source.weights)
    batches, about = _batches(source, data, split, clips)
    wanted = [_run(source.graph, batch) for batch in batches]
    if not all(value.isfinite().all() for outputs in wanted for value in outputs.values()):
        raise UserError(f"{source.weights} gives values that are not finite on {about['clips']}: it cannot be used")
    on_step(1)
    with explained(f"writing {out}"), complete_folder(out) as folder:
        found = {}
        for format_name in formats:
            form = FORMATS[format_name]
            form.write(source, folder / form.file)
            graph = form.load(folder / form.file)
            got = [_run(graph, batch) for batch in batches]
            found[format_name] = compare(got, wanted, f"the {format_name} export of {source.weights}")
            on_step(1)
        check = {
            **about, "batches": [len(batch) for batch in batches], "tolerance": TOLERANCE,
            "differences": found, "runtimes": _runtimes(formats),
        }  # fmt: skip
        values = model_card.describe(source, run, folder, formats, check, name or _name(source.weights, run))
        model_card.write(folder, values)
    return values


def compare(got: Sequence[Outputs], wanted: Sequence[Outputs], what: str) -> dict[str, dict[str, float]]:
    """The largest absolute difference of each output over all batches, and its share of the output's largest value.

    Raises UserError if an output is missing, has another shape or differs by more than TOLERANCE of that value.
    """
    found = {}
    for output in wanted[0]:
        if any(
            output not in mine or mine[output].shape != theirs[output].shape
            for mine, theirs in zip(got, wanted, strict=True)
        ):
            raise UserError(f"{what} does not give the network's {output}; nothing was written")
        pairs = [(mine[output].double(), theirs[output].double()) for mine, theirs in zip(got, wanted, strict=True)]
        absolute = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
        largest = max(float(theirs.abs().max()) for _, theirs in pairs)
        relative = absolute / largest if largest else absolute
        if not relative <= TOLERANCE:  # also a nan
            raise UserError(
                f"{what} differs from the network by {absolute:.3g} in its {output}, {relative:.3g} of the largest "
                f"value where {TOLERANCE:g} is allowed; nothing was written. Try another version of "
                "the format's package, and report it"
            )
        found[output] = {"absolute": absolute, "relative": relative}
    return found


def refuse_occupied(out: Path, force: bool) -> None:
    """Raises UserError for a folder that holds anything, or with `force` anything but an earlier export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to export to")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise UserError(f"{out} is not empty; name another folder, or replace an earlier export in it with --force")
    stranger = model_card.stranger_in(out)
    if stranger:
        raise UserError(f"{out} holds {stranger!r}, which no export put there; --force replaces an earlier export only")


@contextlib.contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, to be filled in the block, then fsynced and put in its place.

    What was in `out` stays until then; if the block raises, nothing is left of the temporary folder.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (out.with_name(temporary_name(name)) for name in (out.name, f"{out.name}-old"))
    try:
        staging.mkdir()
        yield staging
        for path in (*staging.iterdir(), staging):
            sync(path)
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(staging, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        sync(out.parent)
        # What was replaced, and what killed exports to this folder left: .NAME.HOST-PROCESS.tmp
        for path in out.parent.iterdir():
            mine = path.name.count(".") == out.name.count(".") + 3
            if mine and is_leftover(path.name, (f"{out.name}.", f"{out.name}-old.")):
                shutil.rmtree(path, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _batches(
    source: Source, data: str | Path | None, split: str | None, count: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Clips (N,C,T,H,W), first one alone and then the rest, and where they come from."""
    if count < 2:
        raise UserError(f"{count} clips are too few to compare on: it takes one alone and a batch, so 2 at least")
    own = str(source.card.data.get("dataset", ""))
    place, reason = data or own, "the weights name no data set"
    if place:
        try:
            return _real_batches(source.card, place, split, count)
        except UserError as error:
            if data is not None or split is not None:  # what was asked for by name is not done without
                raise
            reason = str(error)
    random = torch.Generator().manual_seed(0)
    channels, time, height, width = source.clip_shape
    # Patches rather than white noise, of which a network makes nearly the same features whatever the clip.
    coarse = torch.randn(count, channels, -(-time // 4), -(-height // 8), -(-width // 8), generator=random)
    clips = F.interpolate(coarse, size=(time, height, width), mode="nearest")
    about = {"real": False, "clips": f"{count} random clips", "reason": reason, "data_set": None}
    return [clips[:1], clips[1:]], about


def _real_batches(
    card: ModelCard, place: str | Path, split: str | None, count: int
) -> tuple[list[Tensor], dict[str, Any]]:
    size = {"clip_length": card.clip_length, "size": card.size, "dtype": "float32"}
    config = data_config(card).model_copy(update=size)
    dataset = Dataset.open(place, cache_dir=config.cache_dir)
    modality = "flow" if is_flow(dataset) else "rgb"
    if tuple(dataset.classes) != card.classes or modality != card.modality:
        raise UserError(
            f"{place} holds {modality} clips of {len(dataset.classes)} classes, not the {len(card.classes)} classes "
            f"of {card.modality} clips that these weights know; name their own data set with --data"
        )
    if split is None:
        known = dataset.info["splits"]
        trained = config.train_split in known and config.eval_split not in known
        split = config.train_split if trained else config.eval_split
    rows = dataset.rows(split)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]
    views = -(-count // len(rows))  # a split of fewer videos gives several clips of each
    with Loader(
        dataset, split, config, batch_size=len(rows) * views, training=False, rows=rows, views=(views, 1)
    ) as loader:
        clips = next(iter(loader)).clips[:count].float().contiguous()
    about = {
        "real": True, "clips": f"{count} clips of the data set {dataset.info['name']}, split {split}", "reason": "",
        "data_set": model_card.data_set(dataset, place),
    }  # fmt: skip
    return [clips[:1], clips[1:]], about


@torch.inference_mode()
def _run(graph: Callable[[Tensor], Outputs], clips: Tensor) -> Outputs:
    return {name: value.clone() for name, value in graph(clips).items()}


def _runtimes(formats: Sequence[str]) -> dict[str, str]:
    packages = {package for name in formats for package in FORMATS[name].packages}
    return {package: importlib.metadata.version(package) for package in sorted(packages)}


def _name(weights: Path, run: Path | None) -> str:
    weights = weights.resolve()
    if run is not None:
        return run.resolve().name
    return weights.parent.name if weights.stem == "recognizer" else weights.stem
