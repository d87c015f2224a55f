"""Optical flow of a video, stored as an 8-bit grey video with x and y side by side (OpenCV, PyAV)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import av
import cv2
import numpy as np

from ..errors import UserError
from .decoding import VideoError, build_graph, filtered, open_frames, upright_filters
from .shards import Encoded, Sink
from .sources import SourceVideo
from .video import Encoder, VideoSettings, output_rate, output_size

METHODS = ("tvl1", "dis", "farneback")
# Finer than for RGB, as an error is a wrong motion: on real clips at 256 px and bound 20, flow comes back within 0.1 px
# on average, of which quantizing alone takes 0.05 to 0.07 (zero flow lies between two levels).
_CRF = {"h264": 18, "hevc": 18, "vp9": 24, "mjpeg": 3}
_LIMITED = np.rint(16 + np.arange(256) * (219 / 255)).astype(np.uint8)  # luma of full range as limited


class FlowEstimator:
    """Dense optical flow between two frames. method:

    tvl1: Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow" (DAGM 2007), as implemented
        by Sanchez, Meinhardt-Llopis, Facciolo (IPOL 2013), at OpenCV's parameters: what I3D and TSN were trained on.
    dis: Kroeger, Timofte, Dai, Van Gool, "Fast Optical Flow using Dense Inverse Search" (ECCV 2016), preset medium.
    farneback: Farneback, "Two-Frame Motion Estimation Based on Polynomial Expansion" (SCIA 2003), 5 pyramid levels of
        scale 0.5, window 15, 3 iterations, polynomials of 5 pixels at sigma 1.1.

    Raises UserError for another method.
    """

    def __init__(self, method: str = "tvl1"):
        self._calc: Callable[..., np.ndarray]
        if method == "tvl1":
            self._calc = cv2.optflow.DualTVL1OpticalFlow.create().calc
        elif method == "dis":
            self._calc = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc
        elif method == "farneback":
            self._calc = _farneback
        else:
            raise UserError(f"unknown flow method {method!r}; there are {', '.join(METHODS)}")
        self.method = method

    def flow(self, previous_gray: np.ndarray, next_gray: np.ndarray) -> np.ndarray:
        """How far each pixel of the first frame moves until the second: float32 (H,W,2), in pixels a frame.

        previous_gray, next_gray: uint8 (H,W). Channel 0 is x, positive to the right; channel 1 is y, positive
        downwards. No call depends on an earlier one. Raises VideoError for frames that are too small for the method.
        """
        try:
            return self._calc(previous_gray, next_gray, None)
        except cv2.error as error:
            height, width = previous_gray.shape
            raise VideoError("encode", f"no {self.method} flow of frames of {width}x{height} ({error.err})") from None


def _farneback(previous: np.ndarray, following: np.ndarray, _: None) -> np.ndarray:
    result = np.empty((*previous.shape, 2), np.float32)
    return np.asarray(cv2.calcOpticalFlowFarneback(previous, following, result, 0.5, 5, 15, 3, 5, 1.1, 0))


def quantize(flow: np.ndarray, bound: float = 20.0) -> np.ndarray:
    """Flow in pixels a frame as uint8 of the same shape: (flow + bound) * 255 / (2 * bound), clipped and rounded.

    A level is 2 * bound / 255 pixels. Zero flow lies between two levels, at 127.5, and becomes 128 (half to even).
    """
    return np.rint(np.clip(flow, -bound, bound) / bound * 127.5 + 127.5).astype(np.uint8)


def dequantize(levels: np.ndarray, bound: float = 20.0) -> np.ndarray:
    """The flow that levels stand for, float32 in pixels a frame; off by at most bound / 255 where none was clipped.

    So much is what level 128, that of zero flow, gives: the line from -bound to bound has no level for 0.
    """
    return (np.asarray(levels, np.float32) - np.float32(127.5)) * np.float32(bound / 127.5)


@dataclass(frozen=True)
class FlowSettings:
    """How the flow of videos is computed and stored.

    method: see FlowEstimator; bound: pixels a frame that the values 0 and 255 stand for; codec, gop, preset: as in
    VideoSettings; crf None: 18 for h264 and hevc, 24 for vp9, 3 for mjpeg; short_side: pixels that frames are scaled
    to before their flow is computed, 0 keeps their size. Raises UserError for a value outside its range.
    """

    modality: ClassVar[str] = "flow"

    method: str = "tvl1"
    bound: float = 20.0
    codec: str = "h264"
    gop: int = 16
    crf: int | None = None
    preset: str = "medium"
    short_side: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown flow method {self.method!r}; there are {', '.join(METHODS)}")
        if not 0 < self.bound <= 1000:
            raise UserError(f"bound {self.bound} is not between 0 and 1000 pixels a frame")
        if self.codec not in _CRF:
            raise UserError(f"flow cannot be stored as {self.codec!r}; there are {', '.join(_CRF)}")
        self.video_settings()  # checks the rest

    def video_settings(self) -> VideoSettings:
        """How the grey video is encoded."""
        crf = _CRF[self.codec] if self.crf is None else self.crf
        return VideoSettings(self.codec, self.short_side, None, self.gop, crf, self.preset)

    def encode(self, video: SourceVideo, sink: Sink, on_frame: Callable[[], None] = lambda: None) -> Encoded:
        """Writes the flow of a source to `sink`: a grey video (2W x H, x left and y right) at the source's frame rate.

        Frame t is the flow from frame t to t+1 of the source's grey pictures, quantized; the last flow stands twice,
        so that there are as many frames as in the source, and a single frame has zero flow. Grey is
        0.299 R + 0.587 G + 0.114 B, as other flow extractors compute it. An ordinary decoder's RGB gives the levels
        back: the luma is of limited range (full for mjpeg), the chroma neutral. on_frame is called for every written
        frame and may raise to stop. OpenCV runs on one thread meanwhile. Raises VideoError for a source that is no
        usable video, is flow already, or is too small for the method.
        """
        settings = self.video_settings()
        with open_frames(video) as frames:
            if frames.codec == "npy" and frames.first.format.name == "gray":
                raise VideoError("open", "the array holds flow already")
            rate = output_rate(frames, settings)
            width, height = output_size(frames, settings)
            filters = [
                *upright_filters(frames),
                ("scale", f"{width}:{height}:flags=bicubic+accurate_rnd"),
                ("format", "rgb24"),
            ]
            try:
                images = (frame.to_ndarray() for frame in filtered(build_graph(frames, filters), frames))
                encoder = Encoder(sink, settings, 2 * width, height, rate, on_frame)
                with contextlib.closing(encoder), one_thread():
                    encoder.write(_grey_frame(levels, settings.codec) for levels in self.levels(images))
            except av.FFmpegError as error:
                raise VideoError(
                    "encode", f"flow cannot be encoded as {settings.codec} {2 * width}x{height} ({error.strerror})"
                ) from None
            frames.refuse_damaged()
            return Encoded(
                2 * width, height, float(rate), encoder.num_frames, (*encoder.key_frames, encoder.num_frames),
                settings.codec, float(frames.rate or rate), frames.count,
            )  # fmt: skip

    def levels(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The quantized flow of each RGB image (H,W,3) to the next one: uint8 (H,W,2)."""
        estimator = FlowEstimator(self.method)
        previous = levels = None
        for image in images:
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            if previous is not None:
                levels = quantize(estimator.flow(previous, grey), self.bound)
                yield levels
            previous = grey
        if levels is not None:
            yield levels
        elif previous is not None:
            yield quantize(np.zeros((*previous.shape, 2), np.float32), self.bound)


def _grey_frame(levels: np.ndarray, codec: str) -> av.VideoFrame:
    """Levels (H,W,2) as one 4:2:0 picture, 2W x H, with neutral chroma; the luma's range is the codec's usual one."""
    height, width = levels.shape[:2]
    picture = np.full((height * 3 // 2, 2 * width), 128, np.uint8)
    luma = levels if codec == "mjpeg" else _LIMITED[levels]
    picture[:height, :width], picture[:height, width:] = luma[..., 0], luma[..., 1]
    return av.VideoFrame.from_ndarray(picture, format="yuvj420p" if codec == "mjpeg" else "yuv420p")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Workers share the cores already, and OpenCV does not promise the same flow for any number of threads."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
