"""What the loader benchmark measures, each contender written as its own users would, in a process of its own.

`python loader_contenders.py CONTENDER JOB.json` delivers the job's clips and writes its figures to the job's `result`;
with --versions instead it imports the contender's packages and prints their versions. A script that imports nothing of
genkd (but in the contender of that name), so that a peer can live in another environment.

Peers are handed the clips that genkd draws: the same source frames, crop and flip. They read each video from a plain
MP4 file with an index, which holds the very packets of the shard and suits their seeking best, except DALI's
webdataset reader, which reads the shards.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Batches = Iterator[tuple[torch.Tensor, list[int]]]


class Clip(NamedTuple):
    """frames: of the source video (T,); crop: top, left, bottom, right in pixels."""

    row: int
    label: int
    frames: list[int]
    crop: list[int]
    flip: bool


@dataclass(frozen=True)
class Job:
    """What to deliver and when to measure.

    data, split, config: the shard data set and genkd's DataConfig. files: folder of ROW.mp4; frames: folder of
    ROW/FRAME.jpg. batches: numbers of `clips`. archives: (tar, index) of the wanted samples for DALI's webdataset
    reader, which delivers the clips in the order `archived`. The rate is measured over `measured` batches after the
    first `warm` ones, while there are still more to come. save: file for the first batches, for tests.
    """

    data: str
    split: str
    config: dict[str, Any]
    files: str
    frames: str
    clips: list[Clip]
    batches: list[list[int]]
    archives: list[tuple[str, str]]
    archived: list[int]
    batch: int
    workers: int
    device: str
    warm: int
    measured: int
    result: str = ""
    save: str = ""

    @property
    def size(self) -> int:
        return self.config["size"]

    @property
    def scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of pixels in 0..255, float32 (3,)."""
        return 255 * np.array(self.config["mean"], np.float32), 255 * np.array(self.config["std"], np.float32)


def genkd_batches(job: Job) -> Batches:
    """genkd.pipelines.loader, from the opening of the data set on; it draws the job's clips itself."""
    from genkd.configs.schema import DataConfig
    from genkd.pipelines.loader import Loader
    from genkd.preprocessing.shards import Dataset

    dataset, config = Dataset.open(job.data), DataConfig(**job.config)
    with Loader(dataset, job.split, config, batch_size=job.batch, training=True, device=job.device) as loader:
        while True:
            for batch in loader:
                yield batch.clips, batch.ids.tolist()


class Clips(torch.utils.data.Dataset):
    """A map-style data set of the job's clips.

    pictures(job, clip) gives (T,size,size,3), not yet flipped: uint8, or float32 that is normalized already.
    """

    def __init__(self, job: Job, pictures: Callable[[Job, Clip], np.ndarray]):
        self.job, self.pictures = job, pictures
        # Rows of an image rather than pixels: numpy is several times as fast where the innermost axis is not just 3.
        self.mean, self.std = (np.tile(value, job.size) for value in job.scaled)

    def __len__(self) -> int:
        return len(self.job.clips)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, int]:
        clip = self.job.clips[number]
        images = self.pictures(self.job, clip)
        if clip.flip:
            images = images[:, :, ::-1]
        images = np.ascontiguousarray(images)
        # A GPU normalizes by itself, and a quarter of the bytes need be sent.
        if images.dtype == np.uint8 and self.job.device == "cpu":
            rows = np.subtract(images.reshape(len(images), self.job.size, -1), self.mean, dtype=np.float32)
            rows /= self.std
            images = rows.reshape(images.shape)
        return torch.from_numpy(images), clip.label, clip.row


def _loaded(job: Job, pictures: Callable[[Job, Clip], np.ndarray]) -> Batches:
    """PyTorch's DataLoader: a worker a core that stays, two batches ahead for each, pinned memory for a GPU."""
    on_gpu = job.device == "cuda"
    loader = torch.utils.data.DataLoader(
        Clips(job, pictures), batch_sampler=job.batches, num_workers=job.workers, persistent_workers=True,
        prefetch_factor=2, pin_memory=on_gpu, worker_init_fn=_one_thread,
    )  # fmt: skip
    mean, std = (torch.from_numpy(value).to(job.device) for value in job.scaled)
    for clips, _, rows in loader:
        if on_gpu:
            clips = clips.to("cuda", non_blocking=True)
        if clips.dtype == torch.uint8:
            clips = clips.to(torch.float32).sub_(mean).div_(std)
        yield clips.permute(0, 4, 1, 2, 3), rows.tolist()


def _one_thread(_: int) -> None:
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)  # there is a worker a core


def _cropped(images: list[np.ndarray], clip: Clip, size: int) -> np.ndarray:
    import cv2

    top, left, bottom, right = clip.crop
    out = np.empty((len(images), size, size, 3), np.uint8)
    for number, image in enumerate(images):
        part = image[top:bottom, left:right]
        if part.shape[:2] == (size, size):
            out[number] = part
        else:
            cv2.resize(part, (size, size), dst=out[number], interpolation=cv2.INTER_LINEAR)
    return out


def pyav_frames(path: str, frames: list[int]) -> dict[int, np.ndarray]:
    """Frames of a video file by number as RGB (H,W,3): seek to the key frame before the first, decode to the last."""
    import av
    from av.video.reformatter import VideoReformatter

    wanted, found = set(frames), {}
    reformatter = VideoReformatter()  # keeps its tables from frame to frame, which Frame.to_ndarray does not
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None and stream.time_base is not None
        stream.codec_context.thread_count = 1
        ticks = 1 / (stream.average_rate * stream.time_base)
        container.seek(round(min(wanted) * ticks), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            number = round(frame.pts / ticks)
            if number in wanted:
                found[number] = reformatter.reformat(frame, format="rgb24").to_ndarray()
                if len(found) == len(wanted):
                    break
    return found


def _pyav(job: Job, clip: Clip) -> np.ndarray:
    found = pyav_frames(f"{job.files}/{clip.row}.mp4", clip.frames)
    return _cropped([found[number] for number in clip.frames], clip, job.size)


def _decord(job: Job, clip: Clip) -> np.ndarray:
    import decord

    reader = decord.VideoReader(f"{job.files}/{clip.row}.mp4", num_threads=1)
    return _cropped(list(reader.get_batch(clip.frames).asnumpy()), clip, job.size)


def _torchcodec(job: Job, clip: Clip, native: bool) -> np.ndarray:
    """native: the decoder crops and resizes, as its documentation advises; otherwise OpenCV does."""
    from torchcodec.decoders import VideoDecoder

    # Approximate seeking spares a scan of the file, and is exact at a constant frame rate.
    decoder = VideoDecoder(
        f"{job.files}/{clip.row}.mp4", dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate",
        transforms=_torchcodec_transforms(clip, job.size) if native else None,
    )  # fmt: skip
    images = decoder.get_frames_at(clip.frames).data.numpy()
    return images if native else _cropped(list(images), clip, job.size)


def _torchcodec_transforms(clip: Clip, size: int) -> list:
    from torchcodec.transforms import RandomCrop, Resize

    class PlannedCrop(RandomCrop):
        """RandomCrop at the place that the job has drawn."""

        def _make_transform_spec(self, _: object) -> str:
            return f"crop, {bottom - top}, {right - left}, {left}, {top}"

    top, left, bottom, right = clip.crop
    crop = PlannedCrop((bottom - top, right - left))
    return [crop] if (bottom - top, right - left) == (size, size) else [crop, Resize((size, size))]


def _jpeg(job: Job, clip: Clip) -> np.ndarray:
    """An image file a frame, with the same transforms as the other peers."""
    return _cropped([_read_jpeg(job, clip.row, number) for number in clip.frames], clip, job.size)


def _jpeg_numpy(job: Job, clip: Clip) -> np.ndarray:
    """An image file a frame, transformed and normalized frame by frame in float32."""
    import cv2

    top, left, bottom, right = clip.crop
    mean, std = job.scaled
    images = []
    for number in clip.frames:
        image = _read_jpeg(job, clip.row, number)[top:bottom, left:right].astype(np.float32)
        images.append((cv2.resize(image, (job.size, job.size)) - mean) / std)
    return np.stack(images)


def _read_jpeg(job: Job, row: int, number: int) -> np.ndarray:
    import cv2

    image = cv2.imread(f"{job.frames}/{row}/{number:06d}.jpg")
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _dali_batches(job: Job, from_shards: bool) -> Batches:
    """DALI alone: its own reader (of shards or of files) and decoder, the drawn crops and flips beside it."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = job.device == "cuda"
    order = job.archived if from_shards else [number for batch in job.batches for number in batch]
    parts = [order[start : start + job.batch] for start in range(0, len(order) - job.batch + 1, job.batch)]

    outputs = 4 if from_shards else 3

    def draws() -> Iterator[tuple]:
        for part in parts:
            clips = [job.clips[number] for number in part]
            crops = np.array([clip.crop for clip in clips], np.float32)
            flips = np.array([clip.flip for clip in clips], np.int32)
            frames = [np.array(clip.frames, np.int32) for clip in clips]
            yield (list(crops[:, :2]), list(crops[:, 2:]), list(flips), frames)[:outputs]

    @pipeline_def(
        batch_size=job.batch, num_threads=job.workers, device_id=0 if on_gpu else None, prefetch_queue_depth=2,
        exec_dynamic=True,
    )  # fmt: skip
    def graph() -> Any:
        start, end, flip, *frames = fn.external_source(
            source=draws(), num_outputs=outputs, batch=True, ndim=[1, 1, 0, 1][:outputs],
            dtype=[types.FLOAT, types.FLOAT, types.INT32, types.INT32][:outputs],
        )  # fmt: skip
        if from_shards:
            media = fn.readers.webdataset(
                paths=[tar for tar, _ in job.archives], index_paths=[index for _, index in job.archives], ext=["mp4"]
            )
            clip = fn.decoders.video(media, frames=frames[0], device="mixed" if on_gpu else "cpu")
        else:
            clip, _ = fn.experimental.readers.video(  # type: ignore[misc]
                device="gpu" if on_gpu else "cpu", file_list=_file_list(job, order), file_list_format="frames",
                sequence_length=job.config["clip_length"], stride=job.config["stride"], prefetch_queue_depth=2,
                pad_mode="edge",  # or it wants a whole stride after the last frame too; nothing is ever padded
            )  # fmt: skip
        clip = fn.resize(clip, roi_start=start, roi_end=end, size=[job.size, job.size], interp_type=types.INTERP_LINEAR)
        mean, std = (value.tolist() for value in job.scaled)
        return fn.crop_mirror_normalize(clip, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="FHWC")

    pipeline = graph()
    pipeline.build()
    for part in parts:
        (output,) = pipeline.run()
        clips = torch.from_dlpack(output.as_tensor())
        yield clips.permute(0, 4, 1, 2, 3), [job.clips[number].row for number in part]


def _file_list(job: Job, order: list[int]) -> str:
    path = f"{job.result}.files"
    lines = []
    for number in order:
        clip = job.clips[number]
        lines.append(f"{job.files}/{clip.row}.mp4 {clip.label} {clip.frames[0]} {clip.frames[-1] + 1}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")
    return path


CONTENDERS: dict[str, Callable[[Job], Batches]] = {
    "genkd": genkd_batches,
    "pyav": functools.partial(_loaded, pictures=_pyav),
    "decord": functools.partial(_loaded, pictures=_decord),
    "torchcodec": functools.partial(_loaded, pictures=functools.partial(_torchcodec, native=True)),
    "torchcodec-opencv": functools.partial(_loaded, pictures=functools.partial(_torchcodec, native=False)),
    "jpeg": functools.partial(_loaded, pictures=_jpeg),
    "jpeg-numpy": functools.partial(_loaded, pictures=_jpeg_numpy),
    "dali-webdataset": functools.partial(_dali_batches, from_shards=True),
    "dali-reader": functools.partial(_dali_batches, from_shards=False),
}
_MODULES = {
    "genkd": ["genkd.pipelines.loader"], "pyav": ["av", "cv2"], "decord": ["decord", "cv2"],
    "torchcodec": ["torchcodec.decoders", "torchcodec.transforms"],
    "torchcodec-opencv": ["torchcodec.decoders", "cv2"], "jpeg": ["cv2"], "jpeg-numpy": ["cv2"],
    "dali-webdataset": ["nvidia.dali.fn"], "dali-reader": ["nvidia.dali.fn"],
}  # fmt: skip


class _Mark(NamedTuple):
    seconds: float
    cpu: float
    clips: int


def deliver(contender: str, job: Job) -> dict[str, Any]:
    """Runs a contender. clips/s and CPU s/clip over the measured batches; the first batch from construction on."""
    _versions(contender)  # imports are no part of the loader
    clips, marks, saved = 0, [], []
    started = time.perf_counter()
    batches = CONTENDERS[contender](job)
    first = 0.0
    for number, (batch, rows) in enumerate(batches, 1):
        clips += len(rows)
        if number == 1:
            _finish(job)
            first = time.perf_counter() - started
        if job.save and number <= 3:
            saved.append((batch.cpu().numpy(), rows))
        if number in (job.warm, job.warm + job.measured):
            _finish(job)
            marks.append(_Mark(time.perf_counter(), _session_cpu(), clips))
            if len(marks) == 2:
                break
    if len(marks) < 2:
        sys.exit(f"{contender} ended before the {job.warm + job.measured} batches that are measured")
    if job.save:
        np.savez(job.save, clips=np.concatenate([x for x, _ in saved]), rows=np.concatenate([x for _, x in saved]))
    before, after = marks
    count = after.clips - before.clips
    found = {
        "rate": count / (after.seconds - before.seconds), "first_batch_s": first,
        "cpu_s_per_clip": (after.cpu - before.cpu) / count, "shape": list(batch.shape), "dtype": str(batch.dtype),
    }  # fmt: skip
    if job.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["gpu_mb"] = (total - free) / 1e6
    return found


def _finish(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def _session_cpu() -> float:
    """Processor seconds so far of this process and the others of its session, so of its workers."""
    session, ticks = os.getsid(0), 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            text = Path("/proc", name, "stat").read_text(encoding="ascii", errors="replace")
            fields = text.rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _versions(contender: str) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in _MODULES[contender]:
        importlib.import_module(name)
        package = {"torchcodec.decoders": "torchcodec", "nvidia.dali.fn": "nvidia.dali"}.get(name, name)
        if hasattr(sys.modules[package], "__version__"):
            found[package] = sys.modules[package].__version__
    return found


if __name__ == "__main__":
    if sys.argv[2] == "--versions":
        print(json.dumps(_versions(sys.argv[1])))
    else:
        values = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        values["clips"] = [Clip(*clip) for clip in values["clips"]]
        work = Job(**values)
        Path(work.result).write_text(json.dumps(deliver(sys.argv[1], work)), encoding="utf-8")
