"""What the loader benchmark reads: data sets of videos, the clips to deliver, and the files that peers want instead."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from ..configs.schema import DataConfig
from ..errors import UserError
from ..pipelines import plan
from ..preprocessing import sources
from ..preprocessing.convert import convert
from ..preprocessing.shards import Dataset
from ..preprocessing.synthetic import CLASSES, SynthSettings, render, write_video
from ..preprocessing.video import VideoSettings
from .loader_contenders import Clip, Job, pyav_frames

SPLIT = "train"
JPEG_QUALITY = 95


class Workload(NamedTuple):
    """What is asked of a loader. batch: clips a batch; source: of which videos, a name of SYNTHETIC."""

    config: DataConfig
    batch: int
    source: str


class Synthetic(NamedTuple):
    """Videos to measure on where no data set is given. repeats: how many such videos make one."""

    videos: int
    render: SynthSettings
    short_side: int
    repeats: int = 1


LONG = "256x96-long"  # a workload
SHORT = "30 s"  # the videos that those of LONG are made of
# 112 px stored and 96 px cut out of it, without scaling: the detection data of the original implementation.
_WINDOW = DataConfig(clip_length=256, stride=1, size=96, scales=(96 / 112,), max_distort=0)
_DETECTION = SynthSettings(seconds=30, fps=10, width=112, height=112)
SYNTHETIC = {
    "trimmed": Synthetic(24, SynthSettings(seconds=4, fps=25, width=320, height=240), 256),
    SHORT: Synthetic(4, _DETECTION, 112),
    "1 h": Synthetic(4, _DETECTION, 112, repeats=120),
}
WORKLOADS = {
    "16x224": Workload(DataConfig(clip_length=16, stride=2, size=224), 8, "trimmed"),
    "64x224": Workload(DataConfig(clip_length=64, stride=1, size=224), 4, "trimmed"),
    LONG: Workload(_WINDOW, 2, "1 h"),
}


def synthetic_set(folder: Path, name: str, codec: str, wanted: Synthetic) -> Dataset:
    """The synthetic videos as a data set below `folder`; one that is there already is opened again."""
    out = folder / f"{name} {codec}"
    if out.is_dir():
        return Dataset.open(out)
    cores = len(os.sched_getaffinity(0))
    settings = VideoSettings(codec, short_side=wanted.short_side)
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as temporary:
        if wanted.repeats > 1:
            # Encoded once and copied often: an hour of video costs a second instead of minutes.
            once = synthetic_set(folder, f"{name} once", codec, wanted._replace(repeats=1))
            payloads = [_payload(once, int(row)) for row in once.rows(SPLIT)]
            for number in range(len(payloads)):
                _join(payloads[number:] + payloads[:number], wanted.repeats, _video_path(temporary, number, "mp4"))
            settings = VideoSettings("copy", short_side=0)
        else:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(lambda number: _draw(wanted.render, number, temporary), range(wanted.videos)))
        summary = convert(sources.folder(Path(temporary)), out, settings, workers=cores)
        assert summary.info is not None and not summary.rejected and not summary.info.get("reencoded")
    return Dataset.open(out)


def _video_path(folder: str, number: int, suffix: str) -> Path:
    path = Path(folder, CLASSES[number % len(CLASSES)], f"{number:03d}.{suffix}")
    path.parent.mkdir(exist_ok=True)
    return path


def _draw(settings: SynthSettings, number: int, folder: str) -> None:
    group, name = number // len(CLASSES), CLASSES[number % len(CLASSES)]
    write_video(_video_path(folder, number, "avi"), render(settings, name, group, 0), settings.fps)


def _join(payloads: list[bytes], repeats: int, path: Path) -> None:
    """`repeats` payloads in turn, one after the other, as one MP4 file, without encoding anything."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(av.open(str(path), "w"))
        stream, frames = None, 0
        for number in range(repeats):
            source = stack.enter_context(av.open(BytesIO(payloads[number % len(payloads)]), "r"))
            given = source.streams.video[0]
            stream = stream or target.add_stream_from_template(given)
            assert given.average_rate is not None and given.time_base is not None
            ticks = round(1 / (given.average_rate * given.time_base))
            for packet in source.demux(given):
                if packet.size:
                    packet.stream = stream
                    packet.pts = packet.dts = frames * ticks  # there are no B-frames
                    packet.duration = ticks
                    target.mux(packet)
                    frames += 1


def _payload(dataset: Dataset, row: int) -> bytes:
    video = dataset.video(row)
    with open(dataset.path / "shards" / video.shard, "rb") as file:
        file.seek(video.offset)
        return file.read(video.size)


def draw_job(dataset: Dataset, workload: Workload, batches: tuple[int, int, int], device: str) -> Job:
    """A job without its files. batches: to warm up, to measure, and to be still at work on.

    The clips are those of genkd's training epochs of seed 0, so that genkd draws the same itself.
    Raises UserError for a data set without a training split.
    """
    rows = dataset.rows(SPLIT)
    clips: list[Clip] = []
    parts: list[list[int]] = []
    epoch = 0
    while len(parts) < sum(batches):
        order = plan.epoch_order(len(rows), 0, epoch)
        for start in range(0, len(rows), workload.batch):
            part = [_clip(dataset, workload.config, epoch, int(rows[at])) for at in order[start:][: workload.batch]]
            parts.append(list(range(len(clips), len(clips) + len(part))))
            clips += part
            if len(parts) == sum(batches):
                break
        epoch += 1
    return Job(
        str(dataset.path), SPLIT, workload.config.model_dump(mode="json"), "", "", clips, parts, [], [],
        workload.batch, len(os.sched_getaffinity(0)), device, batches[0], batches[1],
    )  # fmt: skip


def _clip(dataset: Dataset, config: DataConfig, epoch: int, row: int) -> Clip:
    video = dataset.video(row)
    sample = plan.train_sample(config, 0, epoch, row, video.num_frames, video.width, video.height)
    return Clip(row, video.label, sample.frames.tolist(), [int(side) for side in sample.crop], sample.flip)


def write_files(dataset: Dataset, job: Job, folder: Path) -> None:
    """ROW.mp4: the videos of a job as plain MP4 files with an index at their head, the packets as they are stored."""
    folder.mkdir()

    def write(row: int) -> None:
        with (
            av.open(BytesIO(_payload(dataset, row)), "r") as source,
            av.open(str(folder / f"{row}.mp4"), "w", options={"movflags": "+faststart"}) as target,
        ):
            given = source.streams.video[0]
            stream = target.add_stream_from_template(given)
            for packet in source.demux(given):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)

    with ThreadPoolExecutor(job.workers) as pool:
        list(pool.map(write, sorted({clip.row for clip in job.clips})))


def write_jpegs(job: Job, files: Path, folder: Path) -> None:
    """ROW/FRAME.jpg: the frames that a job uses, at the size they are stored in."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for clip in job.clips:
        wanted[clip.row].update(clip.frames)

    def write(row: int) -> None:
        (folder / str(row)).mkdir(parents=True)
        # Windows of one long video lie far apart: what is between them need not be decoded.
        frames = np.array(sorted(wanted[row]))
        for run in np.split(frames, np.flatnonzero(np.diff(frames) > 64) + 1):
            for number, image in pyav_frames(str(files / f"{row}.mp4"), run.tolist()).items():
                path = str(folder / str(row) / f"{number:06d}.jpg")
                cv2.imwrite(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])

    with ThreadPoolExecutor(job.workers) as pool:
        list(pool.map(write, wanted))


def write_archive_indexes(dataset: Dataset, job: Job, folder: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Index files for DALI's webdataset reader of the job's clips: (tar, index) and the order in which it reads them.

    A tar's samples are read in the order of their offsets; what a job sees twice is listed twice.
    """
    folder.mkdir()
    by_shard: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for number, clip in enumerate(job.clips):
        video = dataset.video(clip.row)
        by_shard[video.shard].append((video.offset, number, video.size))
    archives, order = [], []
    for shard, entries in sorted(by_shard.items()):
        entries.sort()
        path = folder / f"{shard}.idx"
        lines = [f"mp4 {offset} {size} {number}.mp4\n" for offset, number, size in entries]
        path.write_text(f"v1.2 {len(lines)}\n{''.join(lines)}", encoding="ascii")
        archives.append((str(dataset.path / "shards" / shard), str(path)))
        order += [number for _, number, _ in entries]
    return archives, order


def given_codec(dataset: Dataset) -> str:
    """The codec of a data set's training videos. Raises UserError where they have several: no row could name it."""
    codecs = sorted({str(value) for value in dataset.table["codec"].take(dataset.rows(SPLIT)).unique().to_pylist()})
    if len(codecs) > 1:
        raise UserError(f"{dataset.storage} holds videos of {', '.join(codecs)}; give a data set of one codec")
    return codecs[0]
