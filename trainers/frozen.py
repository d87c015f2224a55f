"""The teacher of a distillation: loaded, checked against its student, frozen, and remembered where views come again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..configs.schema import TrainConfig
from ..errors import UserError, explain_os_error
from ..files import sha256_of, write_atomically
from ..models import checkpoints
from ..models.i3d import fold_batch_norm
from ..models.recognizer import ENDPOINT
from ..pipelines.loader import Batch
from .methods import Method, Outputs

log = logging.getLogger(__name__)


class FrozenTeacher:
    """A trained recognizer, and its conditional VAE where the method follows it, in eval mode and without gradients.

    Raises UserError for weights that do not fit the student: other classes, clips, modality or feature shape.
    """

    def __init__(self, config: TrainConfig, student: checkpoints.ModelCard, method: Method):
        self.place = config.teacher
        self.digest = ""
        if not self.place:
            raise UserError(
                f"method {config.distill.method} of the distill phase needs teacher=RUN, the folder of a finished "
                "representation run"
            )
        self.recognizer, self.card = checkpoints.load_recognizer(self.place)
        self.method, self.config = method, config
        refuse_unfit(f"teacher={self.place}", self.card, student, attention="attention" in method.teacher)
        files = [checkpoints.find_weights(self.place)]
        if method.follows_vae:
            files.append(checkpoints.find_weights(self.place, checkpoints.CVAE_FILE))
        self.digest = " ".join(sha256_of(path) for path in files)
        self.modules: dict[str, nn.Module] = {"teacher": self.recognizer}
        if method.follows_vae:
            self.modules["teacher_cvae"] = checkpoints.load_cvae(self.place)
        fold_batch_norm(self.recognizer)
        for module in self.modules.values():
            module.requires_grad_(False)
        self._cache: TeacherCache | None = None

    def remember(self, folder: Path, index_digest: str, rows: np.ndarray, dtype: torch.dtype) -> None:
        """Keeps its outputs for every (video, view) on disk from here on; rows: the videos of the training split."""
        about = {
            "weights": self.digest.split()[0],
            "index": index_digest, "seed": self.config.seed, "dtype": str(dtype),
            "data": self.config.data.model_dump(mode="json", exclude={"dataset", *_NO_PIXELS}),
        }  # fmt: skip
        try:
            self._cache = TeacherCache(folder, about, rows, self.config.data.fixed_views)
        except OSError as error:
            raise UserError(explain_os_error(error, f"opening distill.teacher_cache={folder}")) from None

    def outputs(self, batch: Batch, draw: int) -> Outputs:
        """What the method compares with, of the batch's clips, (N,...) each; draw: the loader's epoch, from 0."""
        wanted = self.method.teacher
        if not wanted:
            return {}
        if self._cache is None:
            return self._run(batch.clips, wanted)
        view = draw % self.config.data.fixed_views
        rows = batch.ids.tolist()
        known = self._cache.read(rows, view, wanted)
        if known is None:
            known = self._run(batch.clips, wanted)
            try:
                self._cache.write(rows, view, known)
            except OSError as error:
                raise UserError(
                    explain_os_error(
                        error, f"writing distill.teacher_cache, which takes {self._cache.gigabytes:.1f} GB"
                    )
                ) from None
        return {name: value.to(batch.clips.device, non_blocking=True) for name, value in known.items()}

    def reconstruct(self, features: Tensor, attention: Tensor, noise: Tensor) -> Tensor:
        """Its VAE's reconstruction of the student's features (N,C,T,H,W), without gradients."""
        with torch.inference_mode():
            found = self.modules["teacher_cvae"](features, attention, noise).reconstruction
        return found.clone()  # the copy may take part in a loss, which a tensor made in inference mode may not

    def _run(self, clips: Tensor, wanted: tuple[str, ...]) -> Outputs:
        with torch.inference_mode():
            output = self.recognizer(clips)
        found = {"logits": output.logits, "features": output.features[ENDPOINT], "attention": output.attention}
        return {name: found[name].clone() for name in wanted}


class FrozenDetector:
    """A trained detector, and its conditional VAEs where the method follows them; as FrozenTeacher."""

    def __init__(self, config: TrainConfig, student: checkpoints.ModelCard, method: Method):
        self.place = config.teacher
        if not self.place:
            raise UserError(
                f"method {config.distill.method} of the detect-distill phase needs teacher=RUN, the folder of a "
                "finished detect-representation run"
            )
        self.detector, self.card = checkpoints.load_detector(self.place)
        refuse_unfit(f"teacher={self.place}", self.card, student, attention="attention" in method.teacher)
        files = [checkpoints.find_weights(self.place)]
        self.modules: dict[str, nn.Module] = {"teacher": self.detector}
        if method.follows_vae:
            files.append(checkpoints.find_weights(self.place, checkpoints.CVAE_FILE))
            self.modules["teacher_cvae"] = checkpoints.load_cvae(self.place)
        self.digest = " ".join(sha256_of(path) for path in files)
        fold_batch_norm(self.detector)
        for module in self.modules.values():
            module.requires_grad_(False)

    def attention(self, clips: Tensor) -> dict[str, Tensor]:
        """Its attention (N,C,T) for clips, by endpoint, without gradients."""
        with torch.inference_mode():
            found = self.detector(clips, detect=False).attention
        return {name: value.clone() for name, value in found.items()}

    def reconstruct(
        self, features: dict[str, Tensor], attention: dict[str, Tensor], noise: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Its VAEs' reconstructions of the student's features, by endpoint, without gradients."""
        with torch.inference_mode():
            found = self.modules["teacher_cvae"](features, attention, noise)
        return {name: output.reconstruction.clone() for name, output in found.items()}


def refuse_unfit(place: str, own: checkpoints.ModelCard, student: checkpoints.ModelCard, *, attention: bool) -> None:
    """Raises UserError for a teacher that does not fit its student. attention: whether its attention is followed."""
    if attention and not own.attention:
        raise UserError(f"{place} has no attention head; use the run of the representation phase")
    if checkpoints.other_classes(place, own.classes, student.classes):
        raise UserError(f"{place} was trained on {len(own.classes)} other classes than the data set's")
    if (own.clip_length, own.size) != (student.clip_length, student.size):
        raise UserError(
            f"{place} takes {own.clip_length} frames of {own.size} px, this student {student.clip_length} of "
            f"{student.size} px; set data.clip_length and data.size to the teacher's"
        )
    same_preprocessing(place, own, student)
    if own.feature_shape != student.feature_shape:
        raise UserError(
            f"teacher and student differ at {ENDPOINT}: (C,T,H,W) {own.feature_shape} and "
            f"{student.feature_shape}; set model.width={own.model.width}"
        )


def same_preprocessing(
    place: str, stored: checkpoints.ModelCard, own: checkpoints.ModelCard, *, pretraining: bool = False
) -> None:
    """Refuses weights that were trained on otherwise normalized clips; another stride is only mentioned.

    pretraining: the weights come from another data set; another normalization is then only mentioned too.
    """
    if stored.modality != own.modality:
        raise UserError(f"{place} is for {stored.modality} clips, this data set holds {own.modality}")
    prefix = "flow_" if own.modality == "flow" else ""
    mentioned = [f"{prefix}mean", f"{prefix}std", "stride"] if pretraining else ["stride"]
    for key in (f"{prefix}mean", f"{prefix}std", "stride"):
        theirs = stored.data.get(key, own.data[key])
        if theirs == own.data[key]:
            continue
        if key not in mentioned:
            raise UserError(f"{place} was trained with data.{key}={theirs}, this run has {own.data[key]}; use the same")
        log.warning("%s was trained with data.%s=%s, this run has %s", place, key, theirs, own.data[key])


# Keys of the configuration that do not touch a clip's pixels.
_NO_PIXELS = {
    "eval_split", "eval_scale", "eval_clips", "window_stride", "eval_window_stride", "shuffle_shards", "hybrid_share",
    "decoder_threads", "pipelines_per_gpu", "prefetch", "read_ahead", "cache_dir", "cache_gb", "retries", "on_error",
}  # fmt: skip


class TeacherCache:
    """A teacher's outputs of every (video, view), as float32 arrays in memory-mapped files that ranks may share.

    An entry counts only when its mark is set, after its values; a run that was killed leaves no half ones. Another
    teacher, data set, seed or preprocessing has another folder below `folder`.
    """

    def __init__(self, folder: Path, about: dict, rows: np.ndarray, views: int):
        text = json.dumps(about, sort_keys=True)
        self.folder = Path(folder) / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "about.json", f"{text}\n".encode())
        self._place = {int(row): number for number, row in enumerate(rows)}
        self._shape = (len(rows), views)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, np.memmap] = {}

    @property
    def gigabytes(self) -> float:
        """Of all its files that have been begun, 10^9 bytes."""
        return sum(array.nbytes for array in self._files.values()) / 1e9

    def read(self, rows: list[int], view: int, names: tuple[str, ...]) -> Outputs | None:
        """The outputs of these videos, or None if any is missing."""
        places = [self._place[row] for row in rows]
        found = {}
        for name in names:
            shape = self._shapes.get(name)
            if shape is None:
                try:
                    shape = tuple(json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8")))
                except (FileNotFoundError, ValueError):  # not begun, or begun when the machine went down
                    return None
                self._shapes[name] = shape
            if not self._open(f"{name}.done", np.uint8, ())[places, view].all():
                return None
            found[name] = torch.from_numpy(self._open(f"{name}.f32", np.float32, shape)[places, view])
        return found

    def write(self, rows: list[int], view: int, outputs: Outputs) -> None:
        """Stores the outputs of these videos."""
        places = [self._place[row] for row in rows]
        for name, value in outputs.items():
            values = value.float().cpu().numpy()
            if name not in self._shapes:
                write_atomically(self.folder / f"{name}.json", json.dumps(list(values.shape[1:])).encode())
                self._shapes[name] = values.shape[1:]
            stored = self._open(f"{name}.f32", np.float32, values.shape[1:])
            stored[places, view] = values
            stored.flush()
            self._open(f"{name}.done", np.uint8, ())[places, view] = 1

    def _open(self, file: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        if file not in self._files:
            path, whole = self.folder / file, (*self._shape, *shape)
            # All of it is taken from the disk now: a full one would end the process at a later write to the mapping.
            # What other ranks have written stays.
            path.touch()
            with open(path, "r+b") as handle:  # not to append, which file systems without posix_fallocate refuse
                os.posix_fallocate(handle.fileno(), 0, int(np.prod(whole)) * np.dtype(dtype).itemsize)
            self._files[file] = np.memmap(path, dtype, "r+", shape=whole)
        return self._files[file]
