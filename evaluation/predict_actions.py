"""Finds actions in raw untrimmed video files with stored weights of detectors, as `genkd detect` does in shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..models.checkpoints import load_detector
from ..models.i3d import fold_batch_norm
from ..preprocessing.lookup import printable
from . import detect
from .metrics import REMEDY_NOT_FINITE, NotFinite
from .predict import Prediction, PredictSettings, RawVideos
from .raw_clips import RawClips, normalized
from .timeline import Action, ActionTimeline

THRESHOLD = 0.1


class ActionPredictor(RawVideos[ActionTimeline]):
    """A stored detector. Windows lie as in its evaluation unless the settings say otherwise.

    Raises UserError for unusable weights or settings.
    """

    def __init__(self, weights: Path, settings: PredictSettings | None = None):
        settings = settings or PredictSettings()
        model, card = load_detector(weights)
        fold_batch_norm(model)
        self.threshold = THRESHOLD if settings.threshold is None else settings.threshold
        super().__init__(weights, replace(settings, threshold=self.threshold), model, card)
        if self.config.padding == "loop":  # actions would come again; the evaluation refuses it too
            self.config = self.config.model_copy(update={"padding": "fail"})
        if self.config.stride != 1:
            raise UserError(f"{weights} takes every {self.config.stride}th frame, but a detector takes all of them")
        self.decoding = detect.decoding_for(card.modality == "flow", card.compat)
        self._labels = {name: label for label, name in enumerate(card.classes)}

    @property
    def hop_share(self) -> float:
        """From one window to the next, as a share of a window's length."""
        if self.settings.hop is not None:
            return self.settings.hop
        return self.config.eval_window_stride / self.config.clip_length

    def timeline(self, clips: RawClips, on_window: Callable[[int], None]) -> ActionTimeline:
        """The actions that the windows of a video have together. Raises VideoError and NotFinite."""
        found: list[detect.Found] = []
        flow = self.card.modality == "flow"
        for windows in self.batches(clips, on_window):
            pixels = normalized(windows, self.config, self.device, flow=flow)
            starts = [window.start for window in windows]
            seen = detect.score([self._model], [pixels], [0] * len(starts), starts, self.dtype)
            for entry in seen:
                if not np.isfinite(entry.scores).all():
                    raise NotFinite(
                        f"the window from frame {entry.offset} has scores that are nan or infinite; {REMEDY_NOT_FINITE}"
                    )
            found += seen
        every = detect.actions_of(found, self.card.classes, clips.rate, clips.count, self.decoding)
        return self._chosen(every, clips.count / clips.rate, len(found))

    def _chosen(self, every: list[dict[str, Any]], duration_s: float, windows: int) -> ActionTimeline:
        """Those of all actions, highest score first, that are to be named."""
        actions = [
            Action(start, end, self._labels[entry["label"]], entry["score"])
            for entry in every
            for start, end in [entry["segment"]]
        ]
        passing = sum(action.score >= self.threshold for action in actions)
        count = passing if self.settings.top is None else min(passing, self.settings.top)
        best = actions[count] if count < len(actions) else None
        return ActionTimeline(tuple(sorted(actions[:count])), duration_s, windows, len(actions) - count, best)

    def video_json(self, found: Prediction[ActionTimeline]) -> dict[str, Any]:
        """The video's actions in order of time, and what of them was left out."""
        line = found.timeline
        values: dict[str, Any] = {
            "path": printable(str(found.path)), "fps": None, "frames": None, "duration_s": None, "windows": 0,
            "segments": [], "left_out": 0, "best_left_out": None, "error": found.error,
        }  # fmt: skip
        if line is None:
            return values
        best = line.best_left_out
        return {
            **values, "fps": round(found.fps, 4), "frames": found.frames, "duration_s": round(line.duration_s, 3),
            "windows": line.windows, "segments": [self._json(action) for action in line.actions],
            "left_out": line.left_out, "best_left_out": None if best is None else self._json(best),
        }  # fmt: skip

    def _json(self, action: Action) -> dict[str, Any]:
        return {
            "start_s": round(action.start_s, 3), "end_s": round(action.end_s, 3),
            "class": self.card.classes[action.label], "score": round(action.score, 6),
        }  # fmt: skip
