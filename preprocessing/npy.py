"""Videos and their optical flow as .npy arrays at a low frame rate, as the original prepares THUMOS14."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError, explain_os_error
from ..files import write_atomically, write_json
from .decoding import VideoError, open_frames
from .flow import FlowSettings, one_thread
from .interop import Written, images, notes_folder, placing, write_each
from .sources import MAX_FPS, MIN_FPS, SourceList, SourceVideo, source_video

_COLUMNS = ("video", "fps", "sample_fps", "count", "sample_count")


def sample_frames(fps: float, sample_fps: float, count: int) -> np.ndarray:
    """Which of `count` frames at `fps` are kept for `sample_fps` frames a second: their numbers from 0, int64.

    As the original chooses: a float that gains 1 a frame; when it reaches fps / sample_fps, that frame is kept and
    the step subtracted. Raises UserError if sample_fps is not above 0 or greater than fps.
    """
    if not 0 < sample_fps <= fps:
        raise UserError(f"{fps:g} frames/s cannot be sampled at {sample_fps:g}; choose a rate above 0 up to {fps:g}")
    return np.fromiter(itertools.compress(range(count), _keeps(fps / sample_fps)), np.int64)


def _keeps(step: float) -> Iterator[bool]:
    waited = 0.0
    while True:
        waited += 1
        keep = waited >= step
        if keep:
            waited -= step
        yield keep


def write_npy(
    source: SourceList,
    out: Path,
    *,
    sample_fps: float = 10.0,
    resolution: int = 112,
    workers: int,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes OUT/KEY.npy, uint8 (T,resolution,resolution,3) RGB, for every video, and OUT/SPLIT_video_info.csv.

    Frames are chosen by sample_frames from the decoded ones, and stretched to a square by Pillow's bicubic filter,
    which is what the original uses. The information file has the columns video, fps, sample_fps, count (decoded
    frames) and sample_count (T). Memory does not grow with a video's length. An array appears once it is complete,
    so a killed run is continued by the next; a bad source, or one slower than sample_fps, is recorded in
    OUT.genkd/errors.parquet and the run goes on. Raises UserError for values out of range, and as write_each does.
    """
    if not MIN_FPS <= sample_fps <= MAX_FPS:
        raise UserError(f"sample rate {sample_fps:g} is not between {MIN_FPS:g} and {MAX_FPS:g} frames/s")
    if not 16 <= resolution <= 4096:
        raise UserError(f"resolution {resolution} is not between 16 and 4096 pixels")
    out, sample_fps = Path(out).absolute(), float(sample_fps)
    written = write_each(
        source,
        out,
        {"format": "npy", "sample_fps": sample_fps, "resolution": resolution},
        lambda key: (out / f"{key}.npy").is_file() and _read_info(out, key) is not None,
        lambda key: out / f"{key}.npy",
        functools.partial(_write_rgb, out=out, sample_fps=sample_fps, resolution=resolution),
        workers=workers,
        on_start=on_start,
        on_videos=on_videos,
    )
    split_of = {video.key: video.split for video in source.videos}
    try:
        for split in sorted({split_of[key] for key in written.keys}):
            keys = sorted(key for key in written.keys if split_of[key] == split)
            write_atomically(out / f"{split}_video_info.csv", _info_csv(out, keys, sample_fps))
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {out}")) from None
    return written


def _write_rgb(video: SourceVideo, beat: Callable[[], None], *, out: Path, sample_fps: float, resolution: int) -> int:
    with open_frames(video) as frames:
        if frames.first.format.name == "gray" and frames.codec == "npy":
            raise VideoError("open", "the array holds flow, not pictures")
        if frames.rate is None:
            raise VideoError("open", "the video states no usable frame rate")
        fps = float(frames.rate)
        if fps < sample_fps:
            raise VideoError("open", f"its {fps:g} frames/s are fewer than the {sample_fps:g} to sample")
        kept = itertools.compress(images(frames, "rgb24"), _beating(_keeps(fps / sample_fps), beat))
        squares = (_square(image, resolution) for image in kept)
        with placing(out, f"{video.key}.npy") as temporary:
            sample_count = write_array(temporary, squares, (resolution, resolution, 3))
            if not sample_count:
                raise VideoError("encode", f"no frame is left at {sample_fps:g} frames/s")
            frames.refuse_damaged()
        info = {"fps": fps, "count": frames.count, "sample_count": sample_count}
    path = _info_path(out, video.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, info)
    return sample_count


def _square(image: np.ndarray, resolution: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC))


def _info_csv(out: Path, keys: list[str], sample_fps: float) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for key in keys:
        info = _read_info(out, key)
        if info is None:
            raise UserError(f"{_info_path(out, key)} is gone or damaged; run the same command again")
        table.writerow([key, info["fps"], sample_fps, float(info["count"]), info["sample_count"]])
    return text.getvalue().encode()


# --- Flow ------------------------------------------------------------------------------------------------------------


def write_flow_npy(
    arrays: Path,
    out: Path,
    *,
    method: str = "tvl1",
    bound: float = 20.0,
    workers: int,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes the flow of every ARRAYS/NAME.npy, uint8 (T,H,W,3) RGB, as OUT/NAME.npy, uint8 (T,H,W,2), x then y.

    Frame t is the flow from t to t+1 by `method` (see flow.FlowEstimator), [-bound, bound] pixels as 0..255; the last
    flow stands twice, so that T stays, and a single frame has zero flow. Killed runs and bad arrays are treated as by
    write_npy. Raises UserError for a folder without arrays or an unknown method, and as write_each does.
    """
    settings = FlowSettings(method=method, bound=bound)
    arrays, out = Path(arrays).absolute(), Path(out).absolute()
    if not arrays.is_dir():
        raise UserError(f"there is no folder of arrays {arrays}")
    paths = sorted(path for path in arrays.rglob("*.npy") if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{arrays} holds no .npy array")
    # The frame rate has no part in it.
    videos = tuple(source_video(str(path), arrays, "", -1, source_fps=1.0) for path in paths)
    return write_each(
        SourceList(arrays.name, arrays, (), videos),
        out,
        {"format": "flow npy", "method": method, "bound": bound},
        lambda key: (out / f"{key}.npy").is_file(),
        lambda key: out / f"{key}.npy",
        functools.partial(_write_flow, out=out, settings=settings),
        workers=workers,
        on_start=on_start,
        on_videos=on_videos,
    )


def _write_flow(video: SourceVideo, beat: Callable[[], None], *, out: Path, settings: FlowSettings) -> int:
    with open_frames(video) as frames, one_thread():
        if frames.first.format.name == "gray":
            raise VideoError("open", "the array holds flow already")
        shape = (frames.first.height, frames.first.width, 2)
        levels = settings.levels(frame.to_ndarray() for frame in frames)
        with placing(out, f"{video.key}.npy") as temporary:
            return write_array(temporary, _beating(levels, beat), shape)


# --- Files -----------------------------------------------------------------------------------------------------------


def write_array(path: Path, rows: Iterable[np.ndarray], shape: tuple[int, ...]) -> int:
    """Writes uint8 rows of one shape as an .npy array (number of rows, *shape), one at a time; returns the number."""
    count = 0
    with open(path, "wb") as file:
        _write_header(file, 0, shape)
        start = file.tell()
        for row in rows:
            assert row.shape == shape and row.dtype == np.uint8, "rows of an array are alike"
            file.write(row.tobytes())
            count += 1
        file.seek(0)
        _write_header(file, count, shape)
        assert file.tell() == start, "NumPy leaves room in a header for the first axis to grow"
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_header(file: Any, count: int, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _beating(items: Iterable[Any], beat: Callable[[], None]) -> Iterator[Any]:
    for number, item in enumerate(items, 1):
        yield item
        if number % 64 == 0:
            beat()


def _info_path(out: Path, key: str) -> Path:
    return notes_folder(out) / "info" / f"{key}.json"


def _read_info(out: Path, key: str) -> dict[str, Any] | None:
    try:
        info = json.loads(_info_path(out, key).read_text(encoding="utf-8"))
        return info if info.keys() == {"fps", "count", "sample_count"} else None
    except (OSError, ValueError, AttributeError):
        return None
