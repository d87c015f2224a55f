"""A detector's windows a second beside the original implementation's loops: in an untrimmed video, and in training.

Inference goes from the stored video (H.264 shards here, an array of frames there) to each class's segments in seconds,
before soft-NMS, which random weights would give another amount of work than trained ones. Training has its windows in
memory; each counts once for all that an epoch does with it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..configs.load import load
from ..configs.schema import DataConfig, TrainConfig
from ..evaluation.detect import Decoding, Found, candidates, windows
from ..models.checkpoints import load_cvae, load_detector, save_weights
from ..models.detector import Detector, EndpointVAEs
from ..models.i3d import fold_batch_norm
from ..pipelines.loader import Batch, Loader
from ..preprocessing import thumos
from ..preprocessing.convert import convert
from ..preprocessing.shards import Dataset
from ..preprocessing.untrimmed import UntrimmedSettings, synthesize_untrimmed
from ..preprocessing.video import VideoSettings
from ..trainers import phases
from ..trainers.distributed import Ranks, choose_device, precision
from ..trainers.metrics import Meter
from ..trainers.step import Stepper
from .common import compare
from .detect_schedule import OriginalTraining, Seen, Window, slide

log = logging.getLogger(__name__)

LOOP, GENKD, FULL_PRECISION = "original's loop", "genkd", "genkd, fp32"
FPS = 10.0


@dataclass(frozen=True)
class Size:
    """What is measured: a preset, and a video's length in seconds; windows: of the training workload, a multiple of
    batch; batch: of genkd's training, eval_batch: of its inference."""

    preset: str
    seconds: float
    windows: int
    batch: int
    eval_batch: int


# An hour at full size is 280 windows, each of some seconds on a CPU core, for two contenders in every turn.
ON_CPU = Size("detect-demo", 120.0, 8, 4, 4)
ON_GPU = Size("thumos14", 3600.0, 64, 8, 16)


@dataclass(frozen=True)
class Setting:
    """Where both workloads run: a synthetic data set of one video in each split, the configuration of a student's
    training on it, and a folder for its teacher."""

    size: Size
    data: Dataset
    config: TrainConfig
    device: torch.device
    teacher: Path

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.data.classes)


@contextlib.contextmanager
def setting(size: Size | None = None) -> Iterator[Setting]:
    """Makes the videos: of the size for this machine by default, with a GPU or without."""
    device = choose_device("auto")
    size = size or (ON_GPU if device.type == "cuda" else ON_CPU)
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        root = Path(folder)
        pixels = load(size.preset, "detect-teacher").data
        side = round(pixels.size / pixels.eval_scale)
        videos = UntrimmedSettings(
            validation_videos=1, test_videos=1, seconds=(size.seconds, size.seconds), width=side, height=side
        )
        log.info("%s: two videos of %.0f s of %d px", size.preset, size.seconds, side)
        workers = 2 if size.seconds > 600 else 0  # one for each video, where that pays their start
        synthesize_untrimmed(root / "videos", videos, workers=workers)
        convert(thumos.thumos14(root / "videos"), root / "data", VideoSettings("h264", side, fps=FPS), workers=workers)
        data = Dataset.open(root / "data")
        options = [f"data.dataset={root / 'data'}", "data.train_split=val", "data.eval_split=test"]
        options += [f"batch_size={size.batch}", "model.freeze_bn=always"]
        options += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]  # -1 to 1, as the original has its clips
        teacher = phases.build(load(size.preset, "detect-representation", options), tuple(data.classes))
        save_weights(root / "teacher", teacher.card, teacher.modules)
        config = load(size.preset, "detect-distill", [*options, f"teacher={root / 'teacher'}"])
        yield Setting(size, data, config, device, root / "teacher")


def _about(place: Setting, **more: Any) -> dict[str, Any]:
    config = place.config
    return {
        "preset": place.size.preset, "clip_length": config.data.clip_length, "size": config.data.size,
        "width": config.model.width, "fps": FPS, "device": place.device.type, "threads": torch.get_num_threads(),
        **more,
    }  # fmt: skip


def inference(place: Setting, repeats: int) -> dict[str, Any]:
    """Windows a second through the test video. Raises AssertionError where the contenders find different things."""
    config, device = place.config.data, place.device
    network = cast(Detector, phases.build(_alone(place.config, "compat=reference"), place.classes).network)
    # Segments of some 20 frames to either side, as of a trained detector, instead of one.
    torch.nn.init.constant_(cast(torch.Tensor, network.pyramid.loc_head.conv1d.bias), 3.0)
    network.eval().to(device)
    own = cast(Detector, phases.build(_alone(place.config, "compat=reference"), place.classes).network)
    own.load_state_dict(network.state_dict())
    own.eval()
    fold_batch_norm(own)
    own.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        frames = Path(folder, "video.npy")
        _write_frames(place, frames)
        length = len(np.load(frames, mmap_mode="r"))
        steps = range(0, length - config.clip_length + 1, config.eval_window_stride)
        count = len(steps) + bool((length - config.clip_length) % config.eval_window_stride)
        found: dict[str, Seen] = {}

        def loop() -> Seen:
            return slide(
                network, np.load(frames), config.size, config.eval_window_stride, FPS, Decoding().threshold, device
            )  # fmt: skip

        work: dict[str, Callable[[], Seen]] = {LOOP: loop, GENKD: partial(_covered, place, own, torch.float32)}
        if (fast := precision("auto", device)) != torch.float32:
            work[GENKD] = partial(_covered, place, own, fast)
            work[FULL_PRECISION] = partial(_covered, place, own, torch.float32)

        def timed(label: str) -> tuple[float, dict]:
            clock = _Clock(count, device)
            found[label] = work[label]()
            return clock.read()

        for own_work in work.values():
            own_work()  # allocates, and chooses cuDNN's algorithms
        about = _about(
            place, video_seconds=length / FPS, windows=count, batch_size=place.size.eval_batch,
            note="on a GPU an hour at full size; on a CPU, too slow for that, a small preset and a shorter video",
        )  # fmt: skip
        contenders = {label: partial(timed, label) for label in work}
        result = compare("detect", "windows/s", contenders, repeats, about)
    result["about"]["same"] = _same(found[LOOP], found.get(FULL_PRECISION, found[GENKD]))
    return result


def _alone(config: TrainConfig, *changes: str) -> TrainConfig:
    """The student without a teacher or a VAE."""
    values = config.model_dump()
    values |= {"teacher": "", "distill": {**values["distill"], "method": "none"}}
    values |= dict(change.split("=") for change in changes)
    return TrainConfig(**values)


def _covered(place: Setting, network: Detector, dtype: torch.dtype) -> Seen:
    """As `genkd detect` does it: the loader's windows in batches through the network."""
    with Loader(
        place.data, "test", place.config.data, batch_size=place.size.eval_batch, training=False, device=place.device,
        detection=True,
    ) as loader:  # fmt: skip
        found: list[Found] = windows([network], loader, Ranks(0, 1, place.device), dtype)
    by_class = candidates(found, FPS, place.data.num_frames[found[0].row], Decoding().threshold)
    return Seen(
        torch.from_numpy(np.stack([one.segments for one in found])),
        torch.from_numpy(np.stack([one.scores for one in found])),
        [torch.from_numpy(rows) for rows in by_class],
    )


def _same(wanted: Seen, found: Seen) -> dict[str, float]:
    """The largest differences of segments, in frames, and of scores. A rounded boundary on the edge between two steps
    may fall to either side, and moves a level's refinements: of 1,000 anchors, 10 may differ by more than rounding."""
    far = {}
    for number, (rows, own) in enumerate(zip(wanted.by_class, found.by_class, strict=True), 1):
        differing = abs(len(rows) - len(own))  # of scores at the threshold, or refinements as above
        assert differing <= 0.01 * len(rows), f"{len(own)} of {len(rows)} segments of class {number}"
    for name, one, other, bound in (
        ("segments", wanted.segments, found.segments, 0.05),
        ("scores", wanted.scores, found.scores, 1e-4),
    ):
        difference = (one - other).abs()
        share = (difference > bound).float().mean().item()
        assert share <= 0.01, f"{100 * share:.1f} % of the {name} differ by more than {bound}"
        far[f"{name}_max"] = difference.max().item()
    return far


def _write_frames(place: Setting, path: Path) -> None:
    """The test video's frames as the original stores them, uint8 (T,H,W,3): the loader's own crops in their place."""
    config = DataConfig(**{**place.config.data.model_dump(), "dtype": "uint8", "padding": "black"})
    table = place.data.table.take(place.data.rows("test")).to_pylist()[0]
    side, inner, length = table["height"], config.size, config.clip_length
    frames = np.lib.format.open_memmap(path, "w+", np.uint8, (table["num_frames"], side, side, 3))
    edge = (side - inner) // 2
    with Loader(place.data, "test", config, batch_size=1, training=False, device="cpu", detection=True) as loader:
        for batch in loader:
            assert batch.windows is not None
            start = int(batch.windows.offsets[0])
            crop = batch.clips[0].permute(1, 2, 3, 0).numpy()
            frames[start : start + length, edge : edge + inner, edge : edge + inner] = crop
    frames.flush()


def training(place: Setting, repeats: int) -> dict[str, Any]:
    """Windows a second of distillation."""
    size, device = place.size, place.device
    samples = _samples(place)
    schedule = OriginalTraining(*_original_modules(place), device)

    def original() -> tuple[float, dict]:
        clock = _Clock(size.windows, device)
        schedule.vae_pass(samples)
        schedule.detector_pass(samples, 1)
        return clock.read()

    contenders: dict[str, Callable[[], tuple[float, dict]]] = {LOOP: original}
    contenders[GENKD] = _steps(place, size.batch)
    contenders["genkd, stages by epoch"] = _steps(place, size.batch, "alternate=epoch")
    contenders["genkd, batches of one window"] = _steps(place, 1)
    if device.type == "cuda":
        contenders[FULL_PRECISION] = _steps(place, size.batch, "precision=fp32")
    for work in contenders.values():
        work()
    about = _about(
        place, windows=size.windows, batch_size=size.batch, spliced=sum(one.spliced is not None for one in samples)
    )
    return compare("detect", "windows/s", contenders, repeats, about)


class _Clock:
    """Windows a second, and beside it the process's own time for each, which other processes disturb less."""

    def __init__(self, count: int, device: torch.device):
        self.count, self.device = count, device
        self.started, self.own = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, dict]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, own = time.perf_counter() - self.started, time.process_time() - self.own
        return self.count / seconds, {"cpu_ms_a_window": 1000 * own / self.count}


def _original_modules(place: Setting) -> tuple[Detector, EndpointVAEs, Detector, EndpointVAEs]:
    student = phases.build(place.config, place.classes)
    return (
        student.network, student.cvae, load_detector(place.teacher)[0], cast(EndpointVAEs, load_cvae(place.teacher)),
    )  # fmt: skip


def _batches(place: Setting, batch_size: int, device: torch.device) -> list[Batch]:
    """The first windows of an epoch; the same ones in batches of any size."""
    with Loader(
        place.data, "val", place.config.data, batch_size=batch_size, training=True, device=device, detection=True
    ) as loader:
        assert loader.count >= place.size.windows, "the video is too short for so many windows"
        return list(itertools.islice(loader, place.size.windows // batch_size))


def _samples(place: Setting) -> list[Window]:
    samples = []
    for batch in _batches(place, 1, place.device):
        seen = batch.windows
        assert seen is not None and seen.boundaries is not None
        actions = seen.actions[0] / seen.actions[0].new_tensor([place.config.data.clip_length] * 2 + [1.0])
        spliced = seen.spliced if seen.with_splice else None
        segments = None if spliced is None or seen.segments is None else seen.segments[0]
        clip = batch.clips.contiguous()
        samples.append(
            Window(clip, actions, seen.boundaries, None if spliced is None else spliced.contiguous(), segments)
        )
    return samples


def _steps(place: Setting, batch_size: int, *changes: str) -> Callable[[], tuple[float, dict]]:
    """A measurement of genkd's steps on an epoch's first windows."""
    values = {**place.config.model_dump(), "batch_size": batch_size, **dict(change.split("=") for change in changes)}
    config, ranks = TrainConfig(**values), Ranks(0, 1, place.device)
    phase = phases.build(config, place.classes)
    phase.place(ranks)
    phase.train()
    batches = _batches(place, batch_size, place.device)
    stepper, meter = Stepper(config, phase, ranks, len(batches)), Meter(ranks)
    step = 0

    def work() -> tuple[float, dict]:
        nonlocal step
        clock = _Clock(len(batches) * batch_size, place.device)
        for draw in range(config.passes):
            for batch in batches:
                stepper.take(batch, draw, step, meter)
                step += 1
        return clock.read()

    return work
