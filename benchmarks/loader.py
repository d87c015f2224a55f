"""Clips a second of the Loader against PyTorch's DataLoader with PyAV, on the same bytes and output shape."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..configs.schema import DataConfig
from ..errors import UserError
from ..pipelines import plan
from ..pipelines.loader import Loader
from ..pipelines.pyav import decode_rgb
from ..preprocessing.shards import Dataset
from .common import compare, shards_of

CONFIG = DataConfig(clip_length=16, stride=2, size=224)
BATCH = 8


class PyAVClips(TorchDataset):
    """The usual way: read the whole video, decode up to the last frame, crop, resize and normalize with OpenCV."""

    def __init__(self, dataset: Dataset, rows: np.ndarray):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        cv2.setNumThreads(0)
        video = self.dataset.video(int(self.rows[item]))
        with open(self.dataset.path / "shards" / video.shard, "rb") as file:
            file.seek(video.offset)
            data = np.frombuffer(file.read(video.size), np.uint8)
        sample = plan.train_sample(CONFIG, 0, 0, video.row, video.num_frames, video.width, video.height)
        top, left, bottom, right = sample.crop
        clip = np.stack(
            [cv2.resize(f[top:bottom, left:right], (CONFIG.size, CONFIG.size)) for f in decode_rgb(data, sample.frames)]
        )
        if sample.flip:
            clip = clip[:, :, ::-1]
        clip = (clip.astype(np.float32) / 255 - np.array(CONFIG.mean, np.float32)) / np.array(CONFIG.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), video.label


def run(data: Path | None, repeats: int) -> dict[str, Any]:
    """Measures on the training split of `data`, or on synthetic VP9 videos of 256 px."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with shards_of(data, "h264" if device == "cuda" else "vp9") as dataset:
        rows = dataset.rows("train")
        contenders: dict[str, Callable[[], tuple[float, dict]]] = {
            "DataLoader + PyAV": lambda: _torch(dataset, rows, device)
        }
        for decoder in ("auto", "pyav"):
            contenders[f"genkd ({decoder})"] = functools.partial(_genkd, dataset, decoder, device)
        about = {
            "clip_length": CONFIG.clip_length, "stride": CONFIG.stride, "size": CONFIG.size, "batch_size": BATCH,
            "codec": dataset.info["video"]["codec"], "videos": len(rows), "device": device,
        }  # fmt: skip
        return compare("loader", "clips/s", contenders, repeats, about)


def _genkd(dataset: Dataset, decoder: str, device: str) -> tuple[float, dict]:
    config = CONFIG.model_copy(update={"decoder": decoder})
    with Loader(dataset, "train", config, batch_size=BATCH, training=True, device=device) as loader:
        started = time.perf_counter()
        first, count = _consume(iter(loader), lambda batch: batch.count)
        return _rate(started, first, count, {"decoder": loader.decoder})


def _torch(dataset: Dataset, rows: np.ndarray, device: str) -> tuple[float, dict]:
    workers = min(8, len(os.sched_getaffinity(0)))
    loader = DataLoader(
        PyAVClips(dataset, rows), BATCH, shuffle=True, num_workers=workers, multiprocessing_context="spawn"
    )
    started = time.perf_counter()
    first, count = _consume((clips.to(device) for clips, _ in loader), len)
    return _rate(started, first, count, {"workers": workers})


def _consume(batches, size: Callable) -> tuple[tuple[float, int], int]:
    """When the first batch came and how many clips it had; clips of the whole epoch."""
    count, first = 0, (0.0, 0)
    for batch in batches:
        count += size(batch)
        if not first[1]:
            first = (time.perf_counter(), count)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return first, count


def _rate(started: float, first: tuple[float, int], count: int, notes: dict) -> tuple[float, dict]:
    """Clips a second after the first batch; start-up is a note, as it is paid once a run."""
    if count <= first[1]:
        raise UserError(f"the training split must hold more than one batch of {BATCH} clips to measure a rate")
    rate = (count - first[1]) / (time.perf_counter() - first[0])
    return rate, {**notes, "first_batch_s": round(first[0] - started, 2)}
