"""The DALI graph: encoded slices or decoded windows -> crop, resize, flip, colour, normalize -> clips."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from ..configs.schema import DataConfig
from ..errors import UserError

log = logging.getLogger(__name__)

BLOCK = 16  # pixels; see preprocessing.video
CPU_CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = (*CPU_CODECS, "av1", "mpeg4", "h264", "hevc")
MOST_UNEVEN = 0.1  # share of videos for which DALI cannot use a decoder again
# Mean pixels of a frame from which NVDEC through DALI should beat eight CPU cores. On an H100 it gave 660 frames of
# 448x256 a second where they gave 6,100; their time grows with the pixels.
LARGE = 1_000_000
_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16}


@dataclass(frozen=True)
class Spec:
    """What a graph does. encoded: its media are slices that DALI decodes, else windows that are cropped, resized and
    flipped already; flow: two channels from the halves of a grey frame; colour: it jitters colours; batch: samples at
    the most."""

    encoded: bool
    flow: bool
    colour: bool
    batch: int
    threads: int

    @property
    def inputs(self) -> list[tuple[str, int, object, str]]:
        """(name, dimensions, type, layout) of what the source gives for a batch: a list each, an entry a sample."""
        if self.encoded:
            given = [("media", 1, types.UINT8, ""), ("frames", 1, types.INT32, ""), ("start", 1, types.FLOAT, ""),
                     ("end", 1, types.FLOAT, ""), ("flip", 0, types.INT32, "")]  # fmt: skip
        else:
            given = [("media", 4, types.UINT8, "FHWC")]
        if self.colour:
            given += [(name, 0, types.FLOAT, "") for name in ("brightness", "contrast", "saturation", "hue")]
        return given


class Kind(NamedTuple):
    """Videos alike: their codec, width and height in pixels, and how many there are."""

    codec: str
    width: int
    height: int
    number: int

    @property
    def least(self) -> tuple[int, int]:
        """Smallest width and height that NVDEC decodes (NVIDIA's video codec SDK, Hopper)."""
        return {"hevc": (144, 144), "vp9": (128, 128), "av1": (128, 128)}.get(self.codec, (48, 16))

    @property
    def uneven(self) -> bool:
        """Whether DALI cannot use an NVDEC decoder again. Of MJPEG, every frame is a picture of its own."""
        return self.codec != "mjpeg" and bool(self.width % BLOCK or self.height % BLOCK)


def choose_decoder(wanted: str, kinds: Sequence[Kind], device: str) -> str:
    """ "dali", "pyav" or "hybrid" for the videos that will be read, on a device ("cpu" or "cuda").

    "auto" is DALI on a GPU for large frames that NVDEC decodes, from LARGE pixels on, and PyAV else: on CPU cores alone
    it takes half of the time that DALI's decoder and resizing take, and DALI waits for each frame that NVDEC decodes,
    which costs the same however small it is (benchmarks/results). Raises UserError where DALI was asked for in vain.
    """
    on_gpu = device == "cuda"
    unknown = sorted({kind.codec for kind in kinds}.difference(GPU_CODECS if on_gpu else CPU_CODECS))
    problem = f"DALI does not decode {', '.join(unknown)} on {device}" if unknown else ""
    small = next((kind for kind in kinds if kind.width < kind.least[0] or kind.height < kind.least[1]), None)
    if on_gpu and small and not problem:
        problem = (
            f"NVDEC decodes {small.codec} from {small.least[0]}x{small.least[1]} pixels on, and there are videos of "
            f"{small.width}x{small.height}"
        )
    if wanted in ("dali", "hybrid") and problem:
        raise UserError(
            f"data.decoder={wanted}: {problem}; use data.decoder=pyav, or shard with --codec vp9"
            + (" and a larger --short-side" if small else "")
        )
    count = max(1, sum(kind.number for kind in kinds))
    uneven = sum(kind.number for kind in kinds if kind.uneven) / count
    if wanted == "auto":
        pixels = sum(kind.number * kind.width * kind.height for kind in kinds) / count
        return "dali" if on_gpu and not problem and uneven <= MOST_UNEVEN and pixels >= LARGE else "pyav"
    if on_gpu and wanted != "pyav" and uneven > MOST_UNEVEN:
        log.warning(
            "%.0f %% of the videos have sides that are no multiples of %d pixels, so DALI makes a new NVDEC decoder "
            "for each of their clips; `genkd shard dataset --short-side 256` mends that, data.decoder=pyav avoids it",
            100 * uneven, BLOCK,
        )  # fmt: skip
    return wanted


def build(source: Callable[[], tuple], config: DataConfig, spec: Spec, device: torch.device) -> Pipeline:
    """A built pipeline whose run() gives one batch (N,T,size,size,C) of config.dtype on the device.

    source is called once a batch and gives a list for each of spec.inputs; StopIteration ends it.
    """
    on_gpu = device.type == "cuda"

    @pipeline_def(  # type: ignore[call-overload]
        batch_size=spec.batch,
        num_threads=spec.threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
        exec_dynamic=True,  # its outputs own their memory, so they can be handed to torch without a copy
    )
    def graph():
        names, ndim, dtypes, layouts = zip(*spec.inputs, strict=True)
        nodes = fn.external_source(
            source=source,
            num_outputs=len(names),
            batch=True,
            dtype=list(dtypes),
            ndim=list(ndim),
            layout=list(layouts),
            # Windows are large, and stay as they are until run() has returned what was made of them. On a GPU the copy
            # is into pinned memory; and what leaves the graph unchanged must not be the source's own memory.
            no_copy=not spec.encoded and not on_gpu and config.dtype != "uint8",
        )
        given: dict[str, DataNode] = dict(zip(names, nodes, strict=True))
        clip: DataNode
        if spec.encoded:
            frames = fn.decoders.video(given["media"], frames=given["frames"], device="mixed" if on_gpu else "cpu")
            clip = _flow_window(frames, given, config, on_gpu) if spec.flow else _window(frames, given, config)
        else:
            clip = given["media"].gpu() if on_gpu else given["media"]
        if spec.colour:
            clip = fn.color_twist(
                clip, brightness=given["brightness"], contrast=given["contrast"], saturation=given["saturation"],
                hue=given["hue"],
            )  # fmt: skip
        mirror = given["flip"] if spec.encoded and not spec.flow else None
        if config.dtype == "uint8":
            return clip if mirror is None else fn.flip(clip, horizontal=mirror)
        mean, std = (config.flow_mean, config.flow_std) if spec.flow else (config.mean, config.std)
        return fn.crop_mirror_normalize(
            clip,
            mirror=0 if mirror is None else mirror,
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            dtype=_TYPES[config.dtype],
            output_layout="FHWC",
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def _window(frames: DataNode, given: dict[str, DataNode], config: DataConfig) -> DataNode:
    """The crop of every frame, resized. Antialiased, as a crop may be several times as large as the clip."""
    return fn.resize(
        frames, roi_start=given["start"], roi_end=given["end"], size=[config.size, config.size],
        interp_type=types.INTERP_LINEAR, antialias=True,
    )  # fmt: skip


def _flow_window(frames: DataNode, given: dict[str, DataNode], config: DataConfig, on_gpu: bool) -> DataNode:
    """x and y from the left and the right half of grey frames as two channels; a flip turns x around too."""
    grey = fn.slice(frames, 0, 1, axis_names="C")
    halves = [fn.slice(grey, place, 0.5, axis_names="W") for place in (0.0, 0.5)]
    x, y = (fn.flip(_window(half, given, config), horizontal=given["flip"]) for half in halves)
    flip = given["flip"].gpu() if on_gpu else given["flip"]
    turned = fn.cast(x * (1 - 2 * flip) + 255 * flip, dtype=types.UINT8)
    return fn.cat(turned, y, axis=-1)


def reason(error: Exception) -> str:
    """What DALI says itself, out of the text in which it wraps it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for number, line in enumerate(lines[:-1]):
        if line.endswith("encountered:"):
            told = lines[number + 1]
            return told.split("] ", 1)[-1] if told.startswith(("Error in", "[")) else told
    return lines[0] if lines else type(error).__name__
