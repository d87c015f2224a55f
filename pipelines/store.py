"""ClipStore: the bytes of any frame range of any video, as a small video of its own."""

from __future__ import annotations

import io
import mmap
import threading
from collections.abc import Iterable

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..errors import UserError
from ..preprocessing.shards import Corrupt, Dataset, Video

_local = threading.local()


class ClipStore:
    """Reads header + GOP range of a video: O(clip) bytes however long the video is. Safe to use from threads."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._shards: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, video: Video, first: int, last: int) -> tuple[np.ndarray, int]:
        """Bytes (uint8, 1-D) of a playable video that holds frames first..last, and the number of its first frame.

        Raises Corrupt if the shard is missing or shorter than the index says, IndexError for frames that do not exist.
        """
        if not 0 <= first <= last < video.num_frames:
            raise IndexError(f"frames {first}..{last} of {video.key}, which has {video.num_frames}")
        shard = self._shard(video)
        begin = int(np.searchsorted(video.gop_frames, first, side="right")) - 1
        end = int(np.searchsorted(video.gop_frames, last, side="right"))
        start, stop = int(video.gop_offsets[begin]), int(video.gop_offsets[end])
        payload = shard[video.offset : video.offset + video.size]
        if begin == 0:
            return payload[:stop], 0
        return np.concatenate([payload[: video.header_size], payload[start:stop]]), int(video.gop_frames[begin])

    def close(self) -> None:
        """Drops the memory maps; arrays already handed out keep theirs alive."""
        with self._lock:
            self._shards.clear()

    def _shard(self, video: Video) -> np.ndarray:
        with self._lock:
            found = self._shards.get(video.shard)
            if found is None:
                found = self._shards[video.shard] = self._map(video)
        if video.offset < 0 or video.offset + video.size > len(found):
            raise Corrupt(f"{video.key}: the index points past the end of shard {video.shard}")
        return found

    def _map(self, video: Video) -> np.ndarray:
        path = self._dataset.path / "shards" / video.shard
        try:
            with open(path, "rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FileNotFoundError:
            raise Corrupt(f"{video.key}: shard {path} is missing; make the data set again") from None
        except ValueError:
            raise Corrupt(f"{video.key}: shard {path} is empty; make the data set again") from None


def decode_rgb(data: np.ndarray, frames: Iterable[int]) -> np.ndarray:
    """Frames of an encoded slice as RGB by PyAV, in the order asked for: uint8 (T,H,W,3).

    frames: numbers within the slice, any order, repeats allowed. Raises Corrupt if one cannot be decoded.
    """
    wanted = np.asarray(list(frames))
    order, inverse = np.unique(wanted, return_inverse=True)
    reformatter = _reformatter()
    found: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data.data), mode="r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number == order[len(found)]:
                    # Only frames that are used pay for the colour conversion, which costs as much as decoding them.
                    found.append(reformatter.reformat(frame, format="rgb24").to_ndarray())
                    if len(found) == len(order):
                        break
    except (av.FFmpegError, IndexError) as error:
        raise Corrupt(f"cannot be decoded ({getattr(error, 'strerror', None) or error})") from None
    if len(found) < len(order):
        raise Corrupt(f"frame {order[len(found)]} of the slice cannot be decoded")
    return np.stack(found)[inverse]


def _reformatter() -> VideoReformatter:
    """One a thread: it keeps its scaling tables, which makes it 1.5 times as fast as Frame.to_ndarray alone."""
    if not hasattr(_local, "reformatter"):
        _local.reformatter = VideoReformatter()
    return _local.reformatter


def require_readable(dataset: Dataset, shard_names: Iterable[str]) -> None:
    """Refuses a data set whose shards are not all there, before any work starts."""
    missing = [name for name in sorted(set(shard_names)) if not (dataset.path / "shards" / name).is_file()]
    if missing:
        raise UserError(
            f"{dataset.path} lacks {len(missing)} of its shards, e.g. {missing[0]}; "
            "run the same `genkd shard` command again"
        )
