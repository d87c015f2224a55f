"""What the shard benchmark measures, each contender written as its own users would, in a process of its own.

`python shard_contenders.py CONTENDER JOB.json` does the job; with --versions instead it imports the contender's
packages and prints their versions. A script that imports nothing of genkd (but in the contender of that name), so that
a peer can live in another environment: mosaicml-streaming needs an older numpy than genkd is tested with.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to convert and how. videos: (key, path, label); frames_log: a line a video with its number of frames."""

    data: str
    videos: list[tuple[str, str, int]]
    out: str
    frames_log: str
    workers: int
    codec: str
    short_side: int
    gop: int
    crf: int
    preset: str

    @property
    def x264(self) -> dict[str, str]:
        """genkd's options of libx264: fixed GOPs of one IDR frame and P frames, one thread."""
        params = f"keyint={self.gop}:min-keyint={self.gop}:scenecut=0:bframes=0:open-gop=0:mbtree=0:threads=1"
        return {"preset": self.preset, "tune": "fastdecode", "crf": str(self.crf), "x264-params": params}

    def log_frames(self, number: int) -> None:
        """Lines this short are appended whole, whichever process writes."""
        with open(self.frames_log, "a", encoding="ascii") as file:
            file.write(f"{number}\n")


def run_genkd(job: Job) -> None:
    """genkd.preprocessing.convert, as `genkd shard` calls it."""
    from genkd.preprocessing import sources
    from genkd.preprocessing.convert import convert
    from genkd.preprocessing.video import VideoSettings

    settings = VideoSettings(codec=job.codec, short_side=job.short_side, gop=job.gop, crf=job.crf, preset=job.preset)
    summary = convert(sources.folder(Path(job.data)), Path(job.out, "data"), settings, workers=job.workers)
    if summary.rejected:
        bad = summary.rejected[0]
        sys.exit(f"{len(summary.rejected)} videos cannot be measured with, e.g. {bad.path}: {bad.reason}")
    assert summary.info is not None, "only slices have no index"
    if summary.info["reencoded"]:
        sys.exit(f"not every video was copied: {summary.info['reencoded']}")
    job.log_frames(sum(entry["frames"] for entry in summary.info["splits"].values()))


def run_ffmpeg(job: Job) -> None:
    """The command line, job.workers processes at a time with one thread each."""
    side, colour = job.short_side, "out_color_matrix=bt601:out_range=limited"
    size = f"w='if(gt(iw,ih),-2,{side})':h='if(gt(iw,ih),{side},-2)'"
    options = [part for name, value in job.x264.items() for part in (f"-{name}", value)]

    def convert(entry: tuple[str, str, int]) -> None:
        path = _folder_of(job, entry) + ".mp4"
        command = [
            "ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-filter_threads", "1", "-i", entry[1],
            "-map", "0:v:0", "-an", "-vf", f"scale={size}:flags=bicubic+accurate_rnd:{colour}", "-pix_fmt", "yuv420p",
            "-c:v", "libx264", "-threads", "1", *options,
            "-movflags", "frag_keyframe+empty_moov+default_base_moof", path,
        ]  # fmt: skip
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(job.workers) as pool:
        list(pool.map(convert, job.videos))


def run_jpeg(job: Job) -> None:
    """OpenCV frame by frame to folders of image_00001.jpg and so on, with a file n_frames, a pool over videos."""
    for frames in _pooled(_write_jpegs, job):
        job.log_frames(frames)


def _write_jpegs(entry: tuple[str, str, int], job: Job) -> int:
    import cv2

    cv2.setNumThreads(1)  # the pool has a process a core
    folder = _folder_of(job, entry)
    os.makedirs(folder)
    capture = cv2.VideoCapture(entry[1])
    number = 0
    while True:
        there, frame = capture.read()
        if not there:
            break
        number += 1
        if job.short_side:
            frame = cv2.resize(frame, _size(frame.shape[1], frame.shape[0], job.short_side))
        cv2.imwrite(f"{folder}/image_{number:05d}.jpg", frame)
    Path(folder, "n_frames").write_text(str(number), encoding="ascii")
    return number


def run_files(job: Job) -> None:
    """PyAV in a pool to one MP4 file a video: no contender, it makes the sources that fit for the copy."""
    for entry, payload, frames in _pooled(_encoded, job):
        Path(_folder_of(job, entry) + ".mp4").write_bytes(payload)
        job.log_frames(frames)


def run_webdataset(job: Job) -> None:
    """PyAV in a pool, webdataset.ShardWriter in the parent."""
    import webdataset

    with webdataset.ShardWriter(f"{job.out}/%06d.tar", maxsize=256 << 20, verbose=0) as writer:
        for (key, _, label), payload, frames in _pooled(_encoded, job):
            writer.write({"__key__": key, "mp4": payload, "cls": str(label)})
            job.log_frames(frames)


def run_mds(job: Job) -> None:
    """PyAV in a pool, MosaicML's MDSWriter in the parent."""
    from streaming import MDSWriter

    columns = {"key": "str", "label": "int", "mp4": "bytes"}
    with MDSWriter(columns=columns, out=f"{job.out}/data", size_limit=256 << 20) as writer:
        for (key, _, label), payload, frames in _pooled(_encoded, job):
            writer.write({"key": key, "label": label, "mp4": payload})
            job.log_frames(frames)


def run_litdata(job: Job) -> None:
    """litData's optimize with its own workers."""
    import litdata

    litdata.optimize(
        fn=_with_settings(_litdata_sample, job), inputs=job.videos, output_dir=f"{job.out}/data",
        chunk_bytes="256MB", num_workers=job.workers, verbose=False,
    )  # fmt: skip


def _litdata_sample(entry: tuple[str, str, int], job: Job) -> dict[str, Any]:
    (key, _, label), payload, frames = _encoded(entry, job)
    job.log_frames(frames)
    return {"key": key, "label": label, "mp4": payload}


def _pooled(function: Callable[..., Any], job: Job) -> Iterator[Any]:
    with multiprocessing.Pool(job.workers) as pool:
        yield from pool.imap_unordered(_with_settings(function, job), job.videos)


def _with_settings(function: Callable[..., Any], job: Job) -> Callable[..., Any]:
    """What goes to a worker with every video, so without the list of them."""
    return functools.partial(function, job=dataclasses.replace(job, videos=[]))


def _encoded(entry: tuple[str, str, int], job: Job) -> tuple[tuple[str, str, int], bytes, int]:
    """The entry, its video as H.264 in an MP4 file in memory, and the number of frames."""
    import av
    from av.video.frame import PictureType

    buffer = io.BytesIO()
    number = 0
    with av.open(entry[1]) as source, av.open(buffer, "w", format="mp4") as target:
        video = source.streams.video[0]
        video.codec_context.thread_count = 1
        assert video.average_rate is not None
        stream: Any = target.add_stream("libx264", rate=video.average_rate, options=job.x264)
        width, height = _size(video.width, video.height, job.short_side)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = job.gop, 0
        for frame in source.decode(video):
            frame = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base, frame.pict_type = number, 1 / video.average_rate, PictureType.NONE
            target.mux(stream.encode(frame))
            number += 1
        target.mux(stream.encode(None))
    return entry, buffer.getvalue(), number


def _size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even sides, the short one as asked for."""
    scale = short_side / min(width, height) if short_side else 1.0
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _folder_of(job: Job, entry: tuple[str, str, int]) -> str:
    path = Path(job.out, entry[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


CONTENDERS: dict[str, Callable[[Job], None]] = {
    "genkd": run_genkd, "ffmpeg": run_ffmpeg, "jpeg": run_jpeg, "files": run_files, "webdataset": run_webdataset,
    "litdata": run_litdata, "mds": run_mds,
}  # fmt: skip
_MODULES = {
    "jpeg": ["cv2"],
    "webdataset": ["av", "webdataset"],
    "litdata": ["av", "litdata"],
    "mds": ["av", "streaming"],
}


def _versions(contender: str) -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in _MODULES.get(contender, [])}


if __name__ == "__main__":
    if sys.argv[2] == "--versions":
        print(json.dumps(_versions(sys.argv[1])))
    else:
        values = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        values["videos"] = [tuple(entry) for entry in values["videos"]]
        CONTENDERS[sys.argv[1]](Job(**values))
