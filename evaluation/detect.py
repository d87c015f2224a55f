"""From windows of untrimmed videos to actions in seconds: decoding, suppression, mAP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..configs.schema import DataConfig
from ..errors import UserError
from ..files import sha256_of
from ..models.checkpoints import ModelCard, find_weights, load_detector, unnamed
from ..models.detector import DetectorOutput
from ..models.i3d import fold_batch_norm
from ..pipelines.loader import Loader
from ..pipelines.streams import is_flow
from ..preprocessing.shards import Dataset
from ..trainers import distributed
from ..trainers.distributed import Ranks
from .detection import mean_average_precision, soft_nms
from .metrics import NotFinite
from .recognition import data_config

TIOUS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Decoding:
    """threshold: scores below are dropped before suppression; sigma, top_k, floor: of soft-NMS, a class and video at a
    time; floor is where a decayed score ends. The defaults are the original implementation's for RGB."""

    threshold: float = 0.01
    sigma: float = 0.1
    top_k: int = 5000
    floor: float = 0.001
    compat: str = "none"


class Found(NamedTuple):
    """A window's anchors: the video's row in the index, the window's first frame, segments (A,2) in frames of the
    window, scores (A,K) of the actions."""

    row: int
    offset: int
    segments: np.ndarray
    scores: np.ndarray


def decode(output: DetectorOutput, clip_length: int) -> tuple[Tensor, Tensor]:
    """Segments (N,A,2) in frames of the window, clamped to it, and scores (N,A,K) without the background: the mean of
    coarse and refined class probabilities times the quality. As AFSD (CVPR 2021) does."""
    loc, prop_loc = output.loc.float(), output.prop_loc.float()
    loc = 0.5 * loc.sum(2, keepdim=True) * prop_loc + loc
    center = output.priors[None] * clip_length
    segments = torch.cat([center - loc[..., :1], center + loc[..., 1:]], 2).clamp(0, clip_length)
    scores = (output.conf.float().softmax(2) + output.prop_conf.float().softmax(2)) / 2
    return segments, (scores * output.center.float().sigmoid())[..., 1:]


def average(outputs: Iterable[DetectorOutput]) -> DetectorOutput:
    """The mean of several detectors' outputs for the same windows; so does the original fuse RGB and flow."""
    together = list(outputs)
    return DetectorOutput(*(sum(values) / len(together) for values in zip(*together, strict=True)))


def windows(
    models: Sequence[nn.Module], loader: Loader, place: Ranks, dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Found]:  # fmt: skip
    """What detectors find in every window of an evaluation loader; the same list, by video and time, on every rank.

    models: one for the loader's clips, or two for RGB and flow of the same windows, whose outputs are averaged.
    Raises NotFinite for scores that are not.
    """
    found, modes = [], [model.training for model in models]
    for model in models:
        model.eval()
    for batch in loader:
        place.alive()
        assert batch.windows is not None
        clips = [batch.clips] if batch.flow is None else [batch.clips, batch.flow]
        rows, offsets = batch.ids[: batch.count].tolist(), batch.windows.offsets[: batch.count].tolist()
        found += score(models, clips, rows, offsets, dtype)
        on_batch(batch.count)
    for model, training in zip(models, modes, strict=True):
        model.train(training)
    place.waits("waits for the others' windows")
    every = sorted((entry for part in place.gather(found) for entry in part), key=lambda entry: entry[:2])
    for entry in every:
        if not np.isfinite(entry.scores).all():
            key = loader.dataset.table["key"][entry.row].as_py()
            raise NotFinite(f"scores of {key} are not finite; the weights are damaged, or the run diverged")
    return every


def score(
    models: Sequence[nn.Module], clips: Sequence[Tensor], rows: Sequence[int], offsets: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> list[Found]:  # fmt: skip
    """What detectors in eval mode find in the first len(rows) windows of a batch, by the mean of their outputs.

    clips: (N,C,T,H,W) of each detector, on its device; rows, offsets: the windows' videos and first frames.
    """
    plain = getattr(models[-1], "compat", "none") == "reference"
    with torch.inference_mode(), torch.autocast(clips[0].device.type, dtype, enabled=dtype != torch.float32):
        outputs = [
            # The original's fusion leaves the flow's features unweighted.
            model(own.float() if dtype == torch.float32 else own, attend=not (place and plain))
            for place, (model, own) in enumerate(zip(models, clips, strict=True))
        ]
    segments, scores = decode(average(outputs) if len(outputs) > 1 else outputs[0], clips[0].shape[2])
    arrays = segments.cpu().numpy(), scores.cpu().numpy()
    return [Found(*values) for values in zip(rows, offsets, *arrays, strict=False)]


def candidates(entries: Sequence[Found], fps: float, length: int, threshold: float) -> list[np.ndarray]:
    """What a video's windows have above the threshold: of each class start, end in seconds and score, (n,3) float32.

    length: the video's, in frames, which no segment exceeds.
    """
    segments = np.concatenate([np.minimum(e.segments + e.offset, np.float64(length)) for e in entries]) / fps
    scores = np.concatenate([e.scores for e in entries])
    kept = (scores > threshold) & (segments[:, 1] > segments[:, 0])[:, None]
    return [np.column_stack([segments[own], scores[own, place]]).astype(np.float32) for place, own in enumerate(kept.T)]


def actions(found: list[Found], dataset: Dataset, decoding: Decoding = Decoding()) -> dict[str, list[dict[str, Any]]]:
    """Actions of each video by key, as actions_of() gives them."""
    by_video: dict[int, list[Found]] = {}
    for entry in found:
        by_video.setdefault(entry.row, []).append(entry)
    rates = dataset.table["fps"].to_numpy()
    return {
        dataset.table["key"][row].as_py(): actions_of(
            entries, dataset.classes, float(rates[row]), int(dataset.num_frames[row]), decoding
        )
        for row, entries in by_video.items()
    }


def actions_of(
    entries: Sequence[Found], classes: Sequence[str], fps: float, num_frames: int, decoding: Decoding = Decoding()
) -> list[dict[str, Any]]:
    """Actions of one video: {"label", "score", "segment": [start, end] in seconds}, highest score first.

    classes: with the background first. A class at a time, anchors above the threshold go through Gaussian soft-NMS;
    segments end with the video.
    """
    found: list[dict[str, Any]] = []
    for name, rows in zip(classes[1:], candidates(entries, fps, num_frames, decoding.threshold), strict=True):
        left = soft_nms(rows, decoding.sigma, decoding.top_k, decoding.floor, compat=decoding.compat)
        found += [
            {"label": name, "score": float(score), "segment": [float(start), float(end)]}
            for start, end, score in np.asarray(left).tolist()
            if score > 0
        ]
    return sorted(found, key=lambda entry: -entry["score"])


def decoding_for(flow: bool, compat: str = "none") -> Decoding:
    """The original implementation's settings for a modality."""
    return Decoding(sigma=0.5 if flow else 0.1, compat=compat)


def ground_truth(dataset: Dataset, split: str) -> dict[str, Any]:
    """A split's annotations in the layout of ActivityNet's ground truth, the subset named as the split."""
    table = dataset.table.select(["key", "annotations"]).take(dataset.rows(split)).to_pylist()
    database = {
        entry["key"]: {
            "subset": split,
            "annotations": [
                {"segment": [action["start_s"], action["end_s"]], "label": dataset.classes[action["label"]]}
                for action in entry["annotations"] or ()
            ],
        }
        for entry in table
    }
    return {"database": database}


def evaluate(
    model: nn.Module, loader: Loader, place: Ranks, split: str, dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:  # fmt: skip
    """mAP of a detector on an evaluation loader's split: "map", the mean over tIoU 0.1 to 0.5, and "map_0.5"."""
    found = actions(
        windows([model], loader, place, dtype, on_batch), loader.dataset, decoding_for(is_flow(loader.dataset))
    )
    result = mean_average_precision(ground_truth(loader.dataset, split), {"results": found}, TIOUS, split)
    return {"map": float(np.mean(result.map)), "map_0.5": float(result.map[-1])}


def detect_weights(
    weights: Path, dataset: str | Path, *, flow: tuple[Path, str | Path] | None = None, split: str = "test",
    batch_size: int = 4, precision: str = "auto", device: str = "auto", decoding: Decoding | None = None,
    progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of a results file of ActivityNet's layout, of stored weights on a split.

    flow: weights and data set of a flow detector, whose outputs are averaged with those of RGB. Beside the results,
    "genkd" tells split, data set and the SHA-256 of the weights. Raises UserError for weights and data that do not fit
    each other.
    """
    model, card = load_detector(weights)
    data, models, flow_data = Dataset.open(dataset), [model], None
    _refuse_unsuitable(weights, card, data, split)
    config = data_config(card)
    if flow is not None:
        other, flow_card = load_detector(flow[0])
        flow_data = Dataset.open(flow[1])
        _refuse_unsuitable(flow[0], flow_card, flow_data, split)
        config = _for_both(weights, flow[0], card, flow_card)
        models.append(other)
    with (
        distributed.ranks(device) as place,
        contextlib.closing(_loader(data, split, config, batch_size, place, flow_data)) as loader,
    ):
        for network in models:
            fold_batch_norm(network)
            network.to(place.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if progress:
            progress.start(loader.count)
        dtype = distributed.precision(precision, place.device)
        found = windows(models, loader, place, dtype, progress.add if progress else lambda count: None)
        results = actions(found, data, decoding or decoding_for(card.modality == "flow", card.compat))
    about = {"split": split, "dataset": str(data.storage), "weights_sha256": sha256_of(find_weights(weights))}
    if flow is not None:
        about["flow_weights_sha256"] = sha256_of(find_weights(flow[0]))
    return {"version": "genkd", "results": results, "external_data": {}, "genkd": about}


def require_actions(data: Dataset, split: str) -> None:
    """Raises UserError for a data set that is not of untrimmed videos, for an unknown or empty split, and for one
    without annotations."""
    rows = data.rows(split)
    _require_untrimmed(data)
    if not any(data.table["annotations"].take(rows).to_pylist()):
        raise UserError(f"no video of split {split!r} of {data.storage} has an annotation")


def _require_untrimmed(data: Dataset) -> None:
    if not data.classes or data.classes[0] != "Background":
        raise UserError(
            f"{data.storage} holds no untrimmed videos with annotations, as `genkd shard thumos14` makes them; for "
            "videos of one class each train a recognizer"
        )


def _loader(
    data: Dataset, split: str, config: DataConfig, batch_size: int, place: Ranks, flow: Dataset | None
) -> Loader:
    return Loader(
        data, split, config, batch_size=batch_size, training=False, rank=place.rank, world_size=place.world_size,
        device=place.device, detection=True, flow=flow,
    )  # fmt: skip


def _for_both(weights: Path, flow_weights: Path, card: ModelCard, flow_card: ModelCard) -> DataConfig:
    """How windows are made for RGB and flow together: each normalized as its own weights say."""
    if flow_card.classes != card.classes:
        raise UserError(f"{weights} and {flow_weights} know other classes, or in another order; train both on one list")
    own, flow = data_config(card), data_config(flow_card)
    for key in ("clip_length", "size", "stride", "padding", "eval_scale", "eval_window_stride"):
        if getattr(own, key) != getattr(flow, key):
            raise UserError(
                f"{weights} has data.{key}={getattr(own, key)}, {flow_weights} {getattr(flow, key)}; only detectors of "
                "the same windows can be averaged"
            )
    return own.model_copy(update={"flow_mean": flow.flow_mean, "flow_std": flow.flow_std})


def _refuse_unsuitable(weights: Path, card: ModelCard, data: Dataset, split: str) -> None:
    _require_untrimmed(data)
    if unnamed(card.classes) and len(card.classes) == len(data.classes):
        raise UserError(
            f"{weights} has no names for its classes; if they are those of {data.storage}, import it again with "
            f"--classes {data.storage}"
        )
    if tuple(data.classes) != card.classes:
        raise UserError(
            f"{weights} knows {len(card.classes)} classes, {data.storage} has {len(data.classes)}, or others; use the "
            "data set it was trained on"
        )
    held = "flow" if is_flow(data) else "rgb"
    if held != card.modality:
        raise UserError(f"{weights} takes {card.modality} windows, {data.storage} holds {held}")
    if not len(data.rows(split)):
        raise UserError(f"split {split!r} of {data.storage} has no videos")
