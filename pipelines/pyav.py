"""Frames of an encoded slice by PyAV on CPU cores: those that are used, cropped and resized as they come."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from ..preprocessing.shards import Corrupt

_local = threading.local()


def decode_rgb(data: np.ndarray, frames: Iterable[int]) -> np.ndarray:
    """Whole frames of an encoded slice as RGB, in the order asked for: uint8 (T,H,W,3).

    data: a playable video, uint8 1-D; frames: numbers within it, any order, repeats allowed. Raises Corrupt if one
    cannot be decoded.
    """
    order, inverse = np.unique(np.asarray(list(frames)), return_inverse=True)
    return np.stack([np.array(picture) for picture in _pictures(data, order)])[inverse]


def decode_clip(
    data: np.ndarray, frames: np.ndarray, crop: tuple[int, int, int, int], size: int, *, flip: bool, flow: bool = False
) -> np.ndarray:
    """A window of some frames of an encoded slice, resized: uint8 (T,size,size,3), or (T,size,size,2) for flow.

    crop: top, left, bottom, right in pixels of the picture, which for flow is the left half (x) and the right half (y)
    of a frame; flip mirrors, and turns x around. Resizing averages areas where it shrinks and is bilinear where it
    enlarges (OpenCV). Raises Corrupt if a frame cannot be decoded.
    """
    order, inverse = np.unique(frames, return_inverse=True)
    top, left, bottom, right = crop
    shrinks = bottom - top > size or right - left > size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    clip = np.empty((len(order), size, size, 2 if flow else 3), np.uint8)
    for picture, out in zip(_pictures(data, order), clip, strict=True):
        if flow:
            middle = picture.shape[1] // 2
            halves = (picture[top:bottom, x + left : x + right, 0] for x in (0, middle))
            region = np.stack(list(halves), axis=-1)
        else:
            region = picture[top:bottom, left:right]
        resized = cv2.resize(region, (size, size), dst=None if flip else out, interpolation=method)
        if flip:
            cv2.flip(resized, 1, dst=out)
    if flow and flip:
        np.subtract(255, clip[..., 0], out=clip[..., 0])
    return clip if len(order) == len(inverse) and (np.diff(inverse) == 1).all() else clip[inverse]


def _pictures(data: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of sorted numbers as views of RGB pictures, uint8 (H,W,3), each valid until the next is asked for."""
    reformatter = _reformatter()
    found = 0
    try:
        with av.open(io.BytesIO(data.data), mode="r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number == order[found]:
                    # Only frames that are used pay for the colour conversion, which costs a third of decoding them.
                    rgb = reformatter.reformat(frame, format="rgb24")
                    shape, strides = (rgb.height, rgb.width, 3), (rgb.planes[0].line_size, 3, 1)
                    yield np.ndarray(shape, np.uint8, memoryview(rgb.planes[0]), strides=strides)
                    found += 1
                    if found == len(order):
                        return
    except (av.FFmpegError, IndexError) as error:
        raise Corrupt(f"cannot be decoded ({getattr(error, 'strerror', None) or error})") from None
    raise Corrupt(f"frame {order[found]} of the slice cannot be decoded")


def _reformatter() -> VideoReformatter:
    """One a thread: it keeps its scaling tables, which makes it 1.5 times as fast as Frame.to_ndarray alone."""
    if not hasattr(_local, "reformatter"):
        _local.reformatter = VideoReformatter()
    return _local.reformatter
