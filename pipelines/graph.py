"""The DALI graph: encoded slices or decoded frames -> crop, resize, flip, normalize -> clips on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from ..configs.schema import DataConfig
from ..errors import UserError

CPU_CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = (*CPU_CODECS, "av1", "mpeg4", "h264", "hevc")


def choose_decoder(wanted: str, codecs: Collection[str], device: str) -> str:
    """ "dali" or "pyav" for videos of some codecs and a device ("cpu" or "cuda").

    Raises UserError where DALI was asked for in vain.
    """
    unknown = sorted(set(codecs).difference(GPU_CODECS if device == "cuda" else CPU_CODECS))
    possible = not unknown
    if wanted == "dali" and not possible:
        raise UserError(
            f"data.decoder: DALI does not decode {', '.join(unknown)} on {device}; use data.decoder=pyav, "
            "or shard with --codec vp9"
        )
    return "dali" if possible and wanted != "pyav" else "pyav"


def build(
    source: Callable[[], tuple], config: DataConfig, decoder: str, device: torch.device, batch: int, threads: int
) -> Pipeline:
    """A built pipeline whose run() gives one float32 batch (N,T,size,size,3), normalized, on the device.

    source is called once a batch and gives lists, an entry a sample: media (encoded bytes, uint8 1-D, or frames, uint8
    (T,H,W,3)), crop start (y, x) and end (y, x) float32, flip int32, and for decoder "dali" the frames to decode,
    (T,) int32. StopIteration ends it.
    """
    on_gpu = device.type == "cuda"

    @pipeline_def(  # type: ignore[call-overload]
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
        exec_dynamic=True,  # its outputs own their memory, so they can be handed to torch without a copy
    )
    def graph():
        encoded = decoder == "dali"
        media, start, end, flip, *frames = fn.external_source(
            source=source,
            num_outputs=5 if encoded else 4,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.INT32][: 5 if encoded else 4],
            ndim=[1 if encoded else 4, 1, 1, 0, 1][: 5 if encoded else 4],
            layout=["" if encoded else "FHWC", "", "", "", ""][: 5 if encoded else 4],
        )
        if encoded:
            clip: DataNode = fn.decoders.video(media, frames=frames[0], device="mixed" if on_gpu else "cpu")
        else:
            clip = media.gpu() if on_gpu else media
        clip = fn.resize(
            clip,
            roi_start=start,
            roi_end=end,
            size=[config.size, config.size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return fn.crop_mirror_normalize(
            clip,
            mirror=flip,
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
            dtype=types.FLOAT,
            output_layout="FHWC",
        )

    pipeline = graph()
    pipeline.build()
    return pipeline
