"""Frames of an encoded slice by PyAV on CPU cores: those that are used, cropped and resized as they come."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Generator, Iterable, Iterator

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from ..preprocessing.shards import Corrupt
from .demux import Unknown, decode_slice

_MILD = 1.5  # times that a window may be larger than the clip
_local = threading.local()


def decode_rgb(data: np.ndarray, frames: Iterable[int]) -> np.ndarray:
    """Whole frames of an encoded slice as RGB, in the order asked for: uint8 (T,H,W,3).

    data: a playable video, uint8 1-D; frames: numbers within it, any order, repeats allowed. Raises Corrupt if one
    cannot be decoded.
    """
    order, inverse = np.unique(np.asarray(list(frames)), return_inverse=True)
    return np.stack([np.array(picture) for picture in _pictures(data, order)])[inverse]


def decode_clip(
    data: np.ndarray, frames: np.ndarray, crop: tuple[int, int, int, int], out: np.ndarray, *, flip: bool
) -> None:
    """A window of some frames of an encoded slice, resized, into `out`: uint8 (T,H,W,3), or (T,H,W,2) for flow.

    crop: top, left, bottom, right in pixels of the picture, which for flow is the left half (x) and the right half (y)
    of a frame; flip mirrors, and turns x around. Resizing is bilinear, and averages areas where it shrinks much
    (OpenCV). Raises Corrupt if a frame cannot be decoded.
    """
    order, inverse = np.unique(frames, return_inverse=True)
    clip = out[: len(order)]
    top, left, bottom, right = crop
    height, width, channels = out.shape[1:]
    # Below that, bilinear sampling passes over no pixel.
    method = cv2.INTER_AREA if bottom - top > _MILD * height or right - left > _MILD * width else cv2.INTER_LINEAR
    for picture, place in zip(_pictures(data, order), clip, strict=True):
        if channels == 2:
            middle = picture.shape[1] // 2
            halves = [picture[top:bottom, x + left : x + right, 0] for x in (0, middle)]
            region = np.stack(halves, axis=-1)
        else:
            region = picture[top:bottom, left:right]
        if flip:
            cv2.flip(cv2.resize(region, (width, height), interpolation=method), 1, dst=place)
        else:
            cv2.resize(region, (width, height), dst=place, interpolation=method)
    if channels == 2 and flip:
        np.subtract(255, clip[..., 0], out=clip[..., 0])
    if (inverse != np.arange(len(frames))).any():
        out[:] = out[inverse]


def _pictures(data: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of sorted numbers as views of RGB pictures, uint8 (H,W,3), each valid until the next is asked for."""
    reformatter = _reformatter()
    found = 0
    try:
        with contextlib.closing(_frames(data)) as frames:
            for number, frame in enumerate(frames):
                if number == order[found]:
                    # Only frames that are used pay for the colour conversion, which costs a third of decoding them.
                    rgb = reformatter.reformat(frame, format="rgb24")
                    shape, strides = (rgb.height, rgb.width, 3), (rgb.planes[0].line_size, 3, 1)
                    yield np.ndarray(shape, np.uint8, memoryview(rgb.planes[0]), strides=strides)
                    found += 1
                    if found == len(order):
                        return
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:  # the last for metadata that is no text
        raise Corrupt(f"cannot be decoded ({getattr(error, 'strerror', None) or error})") from None
    raise Corrupt(f"frame {order[found]} of the slice cannot be decoded")


def _frames(data: np.ndarray) -> Generator[av.VideoFrame, None, None]:
    try:
        yield from decode_slice(data)
    except Unknown:  # raised before the first frame
        with av.open(io.BytesIO(data.data), mode="r") as container:
            context = container.streams.video[0].codec_context
            if context is None:
                raise Corrupt("is of no known codec") from None
            context.thread_count = 1
            yield from container.decode(video=0)


def _reformatter() -> VideoReformatter:
    """One a thread: it keeps its scaling tables, which makes it 1.5 times as fast as Frame.to_ndarray alone."""
    if not hasattr(_local, "reformatter"):
        _local.reformatter = VideoReformatter()
    return _local.reformatter
