"""Scores raw video files with stored weights of recognizers: what they show as a whole, and from when to when."""

from __future__ import annotations

import abc
import glob
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import av
import numpy as np
import torch
from torch import nn

from .. import __version__
from ..configs.schema import DataConfig
from ..errors import UserError, explained
from ..files import write_json
from ..models.checkpoints import ModelCard, find_weights, load_recognizer
from ..preprocessing.decoding import VideoError
from ..preprocessing.lookup import printable
from ..preprocessing.sources import scan
from ..trainers import distributed
from .metrics import REMEDY_NOT_FINITE, NotFinite
from .raw_clips import RawClips, Storing, Window, expected_windows, normalized, storing
from .recognition import data_config
from .timeline import ActionTimeline, Timeline

log = logging.getLogger(__name__)

Line = TypeVar("Line", Timeline, ActionTimeline)


@dataclass(frozen=True)
class PredictSettings:
    """How videos are cut into windows and scored.

    hop: from one window to the next, as a share of a window's length, None for half of it, a detector's as in its
    evaluation; stride_seconds: the same in seconds, which wins; fps, short_side, flow_method: None for those of the
    weights' data set, see raw_clips.storing; top: classes to name, None for 5, or a detector's actions, None for all;
    threshold: the least score of a detector's actions, None for
    predict_actions.THRESHOLD. Raises UserError for a value out of its
    range.
    """

    hop: float | None = None
    stride_seconds: float | None = None
    fps: float | None = None
    short_side: int | None = None
    flow_method: str | None = None
    top: int | None = None
    threshold: float | None = None
    batch_size: int = 8
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.hop is not None and not 0 < self.hop <= 1:
            raise UserError(f"--hop {self.hop:g} is not above 0 and at most 1, a share of a clip's length")
        if self.stride_seconds is not None and not 0 < self.stride_seconds < float("inf"):
            raise UserError(f"--stride-seconds {self.stride_seconds:g} is not above 0")
        if (self.top is not None and self.top < 1) or self.batch_size < 1:
            raise UserError(f"--top {self.top} and --batch-size {self.batch_size} must be 1 or more")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold:g} is not between 0 and 1")


@dataclass(frozen=True)
class Prediction(Generic[Line]):
    """What was found in one video. timeline is None where nothing of it could be read; error: why it could not be read
    to its end, None if it could; fps: pictures a second that the network saw; frames: how many."""

    path: Path
    fps: float = 0.0
    frames: int = 0
    timeline: Line | None = None
    error: str | None = None


class RawVideos(abc.ABC, Generic[Line]):
    """Stored weights on a device, ready to see raw videos; `Predictor` has recognizers, `ActionPredictor` detectors.

    Raises UserError for unusable weights or settings.
    """

    def __init__(self, weights: Path, settings: PredictSettings, model: nn.Module, card: ModelCard):
        self.weights, self.settings, self.card = weights, settings, card
        self.config: DataConfig = data_config(card)
        self.storing: Storing = storing(
            card, fps=settings.fps, short_side=settings.short_side, flow_method=settings.flow_method,
            weights=find_weights(weights),
        )  # fmt: skip
        self.device = distributed.choose_device(settings.device)
        self.dtype = distributed.precision(settings.precision, self.device)
        self.batch_size = settings.batch_size
        self._model = model.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def hop_share(self) -> float:
        """From one window to the next, as a share of a window's length."""
        return 0.5 if self.settings.hop is None else self.settings.hop

    def hop(self, fps: float) -> int:
        """Pictures from one window to the next at a frame rate."""
        if self.settings.stride_seconds is not None:
            return max(1, round(self.settings.stride_seconds * fps))
        return max(1, round(self.hop_share * self.config.clip_length * self.config.stride))

    def expected_windows(self, path: Path) -> int:
        """About how many windows a video gives, by its header."""
        return expected_windows(path, self.config, self.storing, self.hop)

    def predict(self, path: Path, on_window: Callable[[int], None] = lambda windows: None) -> Prediction[Line]:
        """Streams through one video file; an unreadable one gives a Prediction with an error. on_window: windows
        scored since the last call. Raises NotFinite for scores that are nan or infinite."""
        clips = RawClips(path, self.config, self.storing, self.hop)
        try:
            timeline = self.timeline(clips, on_window)
        except VideoError as error:
            return Prediction(path, error=str(error))
        except NotFinite as error:
            raise NotFinite(f"{path}: {error}") from None
        return Prediction(path, clips.rate, clips.count, timeline, clips.problem)

    @abc.abstractmethod
    def timeline(self, clips: RawClips, on_window: Callable[[int], None]) -> Line:
        """What the windows of a video say. Raises VideoError and NotFinite."""

    @abc.abstractmethod
    def video_json(self, found: Prediction[Line]) -> dict[str, Any]:
        """What was found in a video as JSON values."""

    def batches(self, clips: RawClips, on_window: Callable[[int], None]) -> Iterator[list[Window]]:
        """The windows, batch_size at a time."""
        windows = iter(clips)
        while batch := list(itertools.islice(windows, self.batch_size)):
            yield batch
            on_window(len(batch))


class Predictor(RawVideos[Timeline]):
    """A stored recognizer.

    Raises UserError for unusable weights or settings.
    """

    def __init__(self, weights: Path, settings: PredictSettings = PredictSettings()):
        if settings.threshold is not None:
            raise UserError(f"--threshold {settings.threshold:g} is for detectors, {weights} holds a recognizer")
        super().__init__(weights, replace(settings, top=settings.top or 5), *load_recognizer(weights))
        # The reference's sums run over a batch: alone, a window's scores do not depend on its neighbours.
        self.batch_size = 1 if self.card.compat == "reference" else self.batch_size

    def timeline(self, clips: RawClips, on_window: Callable[[int], None]) -> Timeline:
        """The windows' scores and attention. Raises VideoError and NotFinite."""
        starts: list[int] = []
        scores, attention = [], []
        for windows in self.batches(clips, on_window):
            starts += [window.start for window in windows]
            found, seen = self.score(windows)
            scores.append(found)
            attention += [] if seen is None else [seen]
        return Timeline(
            np.array(starts) / clips.rate, self.config.clip_length * self.config.stride / clips.rate,
            clips.count / clips.rate, np.concatenate(scores), np.concatenate(attention) if attention else None,
        )  # fmt: skip

    def video_json(self, found: Prediction[Timeline]) -> dict[str, Any]:
        """Classes, windows, segments and attention."""
        assert self.settings.top is not None
        return _video_json(found, self.card, self.settings.top)

    def score(self, windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores (N,K) that add up to 1, and attention (N,T') averaged over the channels, None without a head.

        Raises NotFinite.
        """
        clips = normalized(windows, self.config, self.device, flow=self.card.modality == "flow")
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self._model(clips)
        sums = output.scores.double()
        scores = (sums / sums.sum(1, keepdim=True)).cpu().numpy()
        attention = None if output.attention is None else output.attention.float().mean(1).cpu().numpy()
        finite = np.isfinite(scores).all(1)
        if not finite.all():
            at = windows[int(np.argmin(finite))].start
            raise NotFinite(f"the window from frame {at} has scores that are nan or infinite; {REMEDY_NOT_FINITE}")
        return scores, attention


def find_videos(places: Iterable[str]) -> list[Path]:
    """The video files that are meant: files as they are, folders with everything in them that has a video's extension,
    and patterns such as "clips/**/*.mp4". Each file once, in the order given, those of a folder sorted.

    Raises UserError for a place without any.
    """
    found: dict[str, Path] = {}
    for place in places:
        if "://" in place:
            raise UserError(f"{place} is a URL; videos are read from a local or mounted folder")
        if os.path.lexists(place):  # a name may hold brackets
            matches = [place]
        else:
            matches = sorted(glob.glob(place, recursive=True))
            if not matches:
                raise UserError(f"no file or folder matches {place!r}; check the path, and quote patterns")
        videos = [path for match in matches for path in (_in_folder(match) if os.path.isdir(match) else [match])]
        if not videos:
            raise UserError(f"{place} holds no file with a video's extension; name a file to have it tried")
        for path in videos:
            found.setdefault(os.path.realpath(path), Path(path))
    return list(found.values())


def _in_folder(folder: str) -> list[str]:
    rejected: list = []
    paths = [path for path, usable in scan(Path(folder), Path(folder), rejected) if usable and os.path.isfile(path)]
    for entry in rejected:
        log.warning("%s in %s: %s", entry.path, folder, entry.reason)
    return sorted(path for path in paths if not path.endswith(".npy"))


def to_json(predictor: RawVideos[Line], predictions: Sequence[Prediction[Line]]) -> dict[str, Any]:
    """Everything as JSON values: versions, weights, settings, and what was found in each video."""
    card, stored = predictor.card, predictor.storing
    return {
        "versions": {"genkd": __version__, "torch": torch.__version__, "av": av.__version__},
        "weights": str(predictor.weights),
        "model": {
            "modality": card.modality, "temporal": card.model.temporal, "width": card.model.width,
            "attention": card.attention, "compat": card.compat, "clip_length": card.clip_length,
            "stride": predictor.config.stride, "size": card.size,
        },
        "settings": {
            **asdict(predictor.settings), "hop": predictor.hop_share, "batch_size": predictor.batch_size,
            "device": predictor.device.type, "precision": str(predictor.dtype).removeprefix("torch."),
            "fps": stored.video.fps, "short_side": None if stored.video.size else stored.video.short_side,
            "stored_size": stored.video.size, "flow_method": stored.flow and stored.flow.method,
            "stored_as": stored.origin,
        },
        "classes": list(card.classes),
        "videos": [predictor.video_json(entry) for entry in predictions],
        "failed": sum(entry.error is not None for entry in predictions),
    }  # fmt: skip


def _video_json(found: Prediction[Timeline], card: ModelCard, top: int) -> dict[str, Any]:
    line = found.timeline
    values: dict[str, Any] = {
        "path": printable(str(found.path)), "fps": None, "frames": None, "duration_s": None, "top": [], "windows": [],
        "segments": [], "attention": None, "error": found.error,
    }  # fmt: skip
    if line is None:
        return values
    attention = line.attention_by_second()
    windows = [
        {
            "start_s": round(float(line.starts[n]), 3), "end_s": round(float(line.ends[n]), 3),
            "top": top_classes(line.scores[n], card.classes, top),
            "attention": None if line.attention is None else _rounded(line.attention[n]),
        }
        for n in range(len(line.starts))
    ]  # fmt: skip
    segments = [
        {"start_s": round(entry.start_s, 3), "end_s": round(entry.end_s, 3), "class": card.classes[entry.label],
         "score": round(entry.score, 6), "windows": entry.windows}
        for entry in line.segments()
    ]  # fmt: skip
    return {
        **values, "fps": round(found.fps, 4), "frames": found.frames, "duration_s": round(line.duration_s, 3),
        "top": top_classes(line.mean_scores, card.classes, top), "windows": windows, "segments": segments,
        "attention": attention and {"step_s": 1.0, "values": _rounded(attention)},
    }  # fmt: skip


def top_classes(scores: np.ndarray, classes: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The best `count` of scores (K,) as [{"class", "score"}], the best first."""
    best = np.argsort(-scores, kind="stable")[:count]
    return [{"class": classes[label], "score": round(float(scores[label]), 6)} for label in best]


def write(path: Path, values: dict[str, Any]) -> None:
    """The JSON values as a file, whole or not at all. Raises UserError where it cannot be written."""
    with explained(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 6) for value in values]
